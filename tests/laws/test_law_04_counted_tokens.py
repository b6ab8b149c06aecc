"""Law 4: the completion loss depends only on the multiset of counted tokens: not on padding, order or chunks."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pykalm.learn import batches, step
from pykalm.model.encoder import Encoder
from pykalm.text.texts import Texts
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import build_batch, gradients, replaced, tiny_encoder, tiny_graph, tiny_verbalizer

# Answers of very different length, so that a mean of means is far from the mean.
TRIPLES = np.array([(0, 0, 2), (4, 0, 1), (2, 1, 3), (1, 1, 5)])


def implicit_loss(encoder: Encoder, verbalizer: Verbalizer, triples: Any, **settings: Any) -> float:
    return gradients(encoder, build_batch(encoder, verbalizer, triples), **settings)[0].implicit


def test_completion_loss_is_the_mean_over_all_answer_tokens() -> None:
    """The mean surprise by a loop, every completion read alone, equals the loss of every layout, to 1e-5.

    Every completion is forward here, so that the loop knows which were drawn.
    """
    verbalizer = tiny_verbalizer(tiny_graph(), template="published")
    with replaced(
        batches.BatchBuilder, "_draw_completions", lambda self, directed, generator: directed[: len(directed) // 2]
    ):
        surprises = []
        encoder = tiny_encoder()
        for triple in TRIPLES:
            completion = verbalizer.completion(*map(int, triple))
            logits = encoder.causal_lm(input_ids=torch.from_numpy(completion.tokens)[None]).logits[0]
            log_p = F.log_softmax(logits.float(), -1)
            for place in range(completion.answer_start, len(completion.tokens)):
                surprises.append(-float(log_p[place - 1, completion.tokens[place]]))
        expected = sum(surprises) / len(surprises)
        for layout in ({"row_tokens": 1000}, {"row_tokens": 150, "chunk_tokens": 150}, {"chunk_tokens": 64}):
            encoder = tiny_encoder(**{"chunk_tokens": 2000, **layout})
            for order in (TRIPLES, TRIPLES[::-1]):
                for memory_tokens in (1, 1 << 20):
                    found = implicit_loss(encoder, verbalizer, order, memory_tokens=memory_tokens)
                    assert abs(found - expected) < 1e-5, (layout, memory_tokens, found, expected)


def test_logits_in_parts_give_the_same_loss() -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    whole = implicit_loss(encoder, verbalizer, TRIPLES)
    with replaced(step, "LOGITS_AT_ONCE", 3):  # type: ignore[arg-type]
        assert abs(implicit_loss(encoder, verbalizer, TRIPLES) - whole) < 1e-6


def test_end_token_is_counted_and_the_prompt_is_not() -> None:
    verbalizer = tiny_verbalizer(tiny_graph())
    completion = verbalizer.completion(0, 0, 2)
    prompt, answer = completion.tokens[: completion.answer_start], completion.tokens[completion.answer_start :]
    assert verbalizer.tokenizer.decode(prompt) == "[ ada: a poet, knows ]"
    assert verbalizer.tokenizer.decode(answer) == " bo</s>"
    with replaced(batches.BatchBuilder, "_draw_completions", lambda self, directed, generator: directed[:1]):
        batch = build_batch(tiny_encoder(), verbalizer, TRIPLES)
    assert verbalizer.tokenizer.decode(batch.answer_tokens) == " bo</s>"
    assert verbalizer.tokenizer.decode(batch.trie.token_ids[batch.answer_nodes]) == "] bo"


def mean_of_means() -> AbstractContextManager[None]:
    """Average over a chunk's tokens, then over chunks. METHOD.md §3 forbids it."""
    right = step._written

    def wrong(encoder: Any, batch: Any, states: Any, chunk: Any, **options: Any) -> torch.Tensor:
        total = len(batch.answer_nodes)
        chunks = len(batch.trie.chunks(encoder.chunk_tokens))
        part = right(encoder, batch, states, chunk, **options)
        return part * torch.tensor([total / max(1, len(chunk.answers)) / chunks, 1.0])

    return replaced(step, "_written", wrong)


def labels_are_shifted() -> AbstractContextManager[None]:
    """Let every node predict its own token."""
    right = batches.answer_positions

    def wrong(trie: Any, completions: Any, *, start: int) -> Any:
        nodes, _tokens = right(trie, completions, start=start)
        return nodes, trie.token_ids[nodes].astype(np.int64)

    return replaced(batches, "answer_positions", wrong)


def the_end_is_not_learned() -> AbstractContextManager[None]:
    """Leave the end token out, so that the model never learns to stop. METHOD.md §7.9."""
    right = batches.answer_positions

    def wrong(trie: Any, completions: Any, *, start: int) -> Any:
        endless = Texts.of([text[:-1] for text in completions.texts])
        return right(trie, dataclasses.replace(completions, texts=endless), start=start)

    return replaced(batches, "answer_positions", wrong)


BREAKS = {
    "a mean of the chunks' means": mean_of_means,
    "labels are shifted by one": labels_are_shifted,
    "the end token is not learned": the_end_is_not_learned,
}
CHECKS = dict.fromkeys(BREAKS, "test_completion_loss_is_the_mean_over_all_answer_tokens")
