"""Claims about the answers that a model writes: names only, the likeliest first, whatever its maker set."""

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from pykalm.errors import ModelError
from pykalm.model.attention import FLEX
from pykalm.model.encoder import Encoder
from pykalm.model.generate import Speaker, speaking
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.model.name_trie import NameTrie
from pykalm.model.padding import left_padded
from pykalm.text.questions import Question, QuestionWriter
from pykalm.text.texts import Texts
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer
from tests.laws.test_law_11_answers import positions_count_padding


def writer() -> QuestionWriter:
    return QuestionWriter(tiny_verbalizer(tiny_graph()), descriptions=True)


def tail_prompts(words: QuestionWriter, count: int = 6) -> Texts:
    return words.prompts([Question("tail", head, 0, 0) for head in range(count)])


def speaker(encoder: Encoder, words: QuestionWriter, texts: Texts, **changes: Any) -> Speaker:
    arguments = {"end_id": words.end_id(), "stop_ids": words.stop_ids(), "max_new_tokens": 4, **changes}
    return Speaker(encoder, texts, **arguments)


@pytest.mark.parametrize("seed", range(3))
def test_constrained_answers_never_leave_the_names(seed: int) -> None:
    """Random models write bytes at random; "ada" begins "ada b", and both are chosen by some."""
    encoder, words = tiny_encoder(), writer()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    names = words.choices("tail")
    speaking_ = speaker(encoder, words, tail_prompts(words), names=NameTrie(words.answer_tokens("tail")))
    for batch in speaking_.batches:
        chosen, free = speaking_.choose(batch), speaking_.write(batch)
        assert all(0 <= number < len(names) for number in chosen)
        assert not {words.read(tokens) for tokens in free} & set(names)  # left alone it names no one
        for ranked in speaking_.rank(batch, 4):
            assert len({number for number, _ in ranked}) == len(ranked) == 4


def log_likelihood(encoder: Encoder, prompt: np.ndarray, name: np.ndarray, stop_ids: tuple[int, ...]) -> float:
    """Read prompt and name as one text and add up, the end being any of the tokens that end an answer."""
    text = torch.from_numpy(np.concatenate([prompt, name]))
    with torch.no_grad():
        logits = encoder.causal_lm(input_ids=text[None]).logits[0].float().log_softmax(dim=-1)
    steps = [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(name)]
    return sum(steps) + float(logits[-1, list(stop_ids)].logsumexp(dim=-1))


def test_ranked_answers_equal_exact_scoring() -> None:
    """With as many beams as names nothing is missed: order and log-likelihoods are those of a loop, to 1e-4 in float32."""
    encoder, words = tiny_encoder(), writer()
    texts, tokens = tail_prompts(words), words.answer_tokens("tail")
    speaking_ = speaker(encoder, words, texts, names=NameTrie(tokens))
    for batch in speaking_.batches:
        for number, ranked in zip(batch.tolist(), speaking_.rank(batch, len(tokens)), strict=True):
            exact = [log_likelihood(encoder, texts[number], name, speaking_.stop_ids) for name in tokens]
            assert [name for name, _ in ranked] == np.argsort(-np.array(exact)).tolist()
            assert [score for _, score in ranked] == pytest.approx(sorted(exact, reverse=True), abs=1e-4)
            assert len(speaking_.rank(np.array([number]), 1)[0]) == 1


def test_a_greedy_answer_equals_a_loop() -> None:
    encoder, words = tiny_encoder(), writer()
    texts = tail_prompts(words, 3)
    speaking_ = speaker(encoder, words, texts)
    written = {number: tokens for batch in speaking_.batches
               for number, tokens in zip(batch.tolist(), speaking_.write(batch), strict=True)}  # fmt: skip
    for number, prompt in enumerate(texts):
        tokens: list[int] = []
        while len(tokens) < 4 and not set(tokens) & set(speaking_.stop_ids):
            with torch.no_grad():
                text = torch.tensor([[*prompt, *tokens]])
                tokens.append(int(encoder.causal_lm(input_ids=text).logits[0, -1].argmax()))
        assert written[number] == tokens


def test_what_a_maker_set_for_generation_changes_nothing() -> None:
    encoder, words = tiny_encoder(), writer()
    texts = tail_prompts(words)
    plain = speaker(encoder, words, texts)
    before = [plain.write(batch) for batch in plain.batches]
    makers = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=3
    )
    encoder.causal_lm.generation_config = makers
    speaking_ = speaker(encoder, words, texts)
    assert [speaking_.write(batch) for batch in speaking_.batches] == before
    assert encoder.causal_lm.generation_config is makers


def test_attention_for_tries_is_put_aside_and_comes_back() -> None:
    encoder = tiny_encoder()
    encoder.use_attention(MATMUL_ATTENTION)
    encoder.train()
    with speaking(encoder):
        assert encoder.attention == "sdpa"
        assert not encoder.training
    assert encoder.attention == MATMUL_ATTENTION != FLEX
    assert encoder.training


def test_a_shared_prefix_is_computed_once() -> None:
    """Of n prompts that share P tokens, P + Σ (length − P) tokens are read at most before the first new one."""
    encoder, words = tiny_encoder(), writer()
    texts = tail_prompts(words)
    read: list[int] = []
    hook = encoder.causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    speaking_ = speaker(encoder, words, texts, layout="shared", max_new_tokens=1)
    for batch in speaking_.batches:
        speaking_.write(batch)
    hook.remove()
    shared = "Given the head entity and relation, write a tail entity that completes the triple: "
    assert read[0] == len(shared)  # a byte is a token here
    widest = int(texts.lengths.max()) - read[0]
    assert sum(read[1:]) <= widest * len(texts)


def test_a_model_that_reads_padding_gets_batches_of_one_length(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 has a vector for every position; here its positions count the padding."""
    encoder, words = tiny_encoder("gpt2"), writer()
    texts = Texts.chain([tail_prompts(words), tail_prompts(words, 2)])
    alone = [speaker(encoder, words, texts.select(np.array([n]))).write(np.array([0]))[0] for n in range(len(texts))]
    with positions_count_padding(), caplog.at_level(logging.WARNING):
        speaking_ = speaker(encoder, words, texts)
        assert speaking_.layout == "even"
        assert "prompts of one length share a batch" in caplog.text
        for batch in speaking_.batches:
            assert len({len(texts[number]) for number in batch.tolist()}) == 1
            assert speaking_.write(batch) == [alone[number] for number in batch.tolist()]
    assert sorted(itertools.chain(*(batch.tolist() for batch in speaking_.batches))) == list(range(len(texts)))


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "shared"), ("mistral-sliding", "padded"), ("gemma3", "padded")]
)
def test_the_fastest_right_layout_is_taken(family: str, layout: str) -> None:
    words = writer()
    assert speaker(tiny_encoder(family), words, tail_prompts(words)).layout == layout


def test_padding_stands_between_prefix_and_rest() -> None:
    texts = Texts.of([np.array([7, 8, 1]), np.array([7, 8, 1, 2, 3])])
    token_ids, mask = left_padded(texts, prefix=np.array([7, 8]), filler=0)
    assert token_ids.tolist() == [[7, 8, 0, 0, 1], [7, 8, 1, 2, 3]]
    assert mask.tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]


def test_a_prompt_without_room_is_refused() -> None:
    words = writer()
    with pytest.raises(ModelError, match="max_position_embeddings"):
        speaker(tiny_encoder(), words, tail_prompts(words), max_new_tokens=500)
