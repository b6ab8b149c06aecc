"""Law 11: what a model answers depends on its prompt alone: not on the prompts beside it, nor on what is computed once."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers.generation.utils import GenerationMixin

from pykalm.model import generate
from pykalm.model.encoder import Encoder
from pykalm.model.generate import Layout, Speaker
from pykalm.model.name_trie import NameTrie
from pykalm.model.padding import left_padded
from pykalm.text.questions import Question, QuestionWriter
from pykalm.text.texts import Texts
from tests.laws.common import replaced, tiny_encoder, tiny_graph, tiny_verbalizer

# The layout that a family can take: a window would see that padding moves the prefix away, mamba has no keys to share.
FAMILIES: dict[str, tuple[Layout, ...]] = {
    "llama": ("shared", "padded"),
    "gpt2": ("shared", "padded"),
    "opt": ("shared", "padded"),
    "gemma3": ("padded",),
    "mistral-sliding": ("padded",),
}


def prompts() -> tuple[QuestionWriter, Texts]:
    """Return seven prompts of many lengths behind one example, with descriptions."""
    writer = QuestionWriter(tiny_verbalizer(tiny_graph()), descriptions=True)
    pairs = [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0), (5, 1), (0, 1)]
    questions = [Question("tail", head, relation, 0) for head, relation in pairs]
    return writer, writer.prompts(questions, [Question("tail", 4, 0, 2)])


def speaker(encoder: Encoder, writer: QuestionWriter, texts: Texts, layout: Layout) -> Speaker:
    names = NameTrie(writer.answer_tokens("tail"))
    ends = {"end_id": writer.end_id(), "stop_ids": writer.stop_ids()}
    return Speaker(encoder, texts, **ends, max_new_tokens=6, names=names, layout=layout)


def answers(speaking: Speaker) -> list[Any]:
    """Return for every prompt what is written freely, the name chosen, and the three likeliest names."""
    found: dict[int, Any] = {}
    for batch in speaking.batches:
        ranked = [[name for name, _ in names] for names in speaking.rank(batch, 3)]
        written = zip(speaking.write(batch), speaking.choose(batch), ranked, strict=True)
        found |= zip(batch.tolist(), written, strict=True)
    return [found[number] for number in range(len(found))]


def answers_alone(encoder: Encoder, writer: QuestionWriter, texts: Texts) -> list[Any]:
    return [answers(speaker(encoder, writer, texts.select(np.array([n])), "even"))[0] for n in range(len(texts))]


def check_family(family: str) -> None:
    """In float32, where rounding moves a logit by 1e-5 and the two likeliest tokens of these models lie 1e-3 apart."""
    encoder = tiny_encoder(family, chunk_tokens=1000)
    writer, texts = prompts()
    alone = answers_alone(encoder, writer, texts)
    assert len(set(map(str, alone))) > 1  # they differ, so that a mistake can be seen
    for layout in FAMILIES[family]:
        together = speaker(encoder, writer, texts, layout)
        assert max(map(len, together.batches)) > 2
        assert answers(together) == alone, (family, layout)


def test_answers_of_llama_do_not_depend_on_the_batch() -> None:
    check_family("llama")


def test_answers_of_other_families_do_not_depend_on_the_batch() -> None:
    for family in FAMILIES.keys() - {"llama"}:
        check_family(family)


def wrong_padding(wrong: Callable[[np.ndarray, np.ndarray, int], tuple[Any, Any]]) -> AbstractContextManager[None]:
    """Change token ids and mask after they were laid out; `wrong` gets both and the length of the prefix."""

    def padded(texts: Any, *, prefix: Any, filler: int) -> Any:
        return wrong(*left_padded(texts, prefix=prefix, filler=filler), len(prefix))

    return replaced(generate, "left_padded", padded)


def padding_stands_at_the_right() -> AbstractContextManager[None]:
    def wrong(token_ids: np.ndarray, mask: np.ndarray, prefix: int) -> Any:
        moves = (mask == 0).sum(axis=1)
        for part in (token_ids, mask):
            for row, move in enumerate(moves):
                part[row, prefix:] = np.roll(part[row, prefix:], -move)
        return token_ids, mask

    return wrong_padding(wrong)


def padding_is_seen() -> AbstractContextManager[None]:
    return wrong_padding(lambda token_ids, mask, _: (token_ids, np.ones_like(mask)))


def positions_count_padding() -> AbstractContextManager[None]:
    def wrong(self: Any, inputs: torch.Tensor, arguments: Any) -> torch.Tensor:
        return torch.arange(inputs.shape[1]).expand(len(inputs), -1)

    return replaced(GenerationMixin, "_prepare_position_ids_for_generation", wrong)


def the_prefix_is_one_token_short() -> AbstractContextManager[None]:
    """Lose the last key and value of what is computed once."""
    right = Speaker._copied_cache

    def wrong(self: Speaker, rows: int) -> Any:
        found = right(self, rows)
        for layer in found["past_key_values"].layers:
            layer.keys, layer.values = (torch.roll(part, 1, dims=2) for part in (layer.keys, layer.values))
            layer.keys[:, :, 0] = layer.keys[:, :, 1]
        return found

    return replaced(Speaker, "_copied_cache", wrong)


BREAKS = {
    "padding stands at the right": padding_stands_at_the_right,
    "padding is seen": padding_is_seen,
    "positions count padding": positions_count_padding,
    "the prefix is one token short": the_prefix_is_one_token_short,
}
CHECKS = dict.fromkeys(BREAKS, "test_answers_of_llama_do_not_depend_on_the_batch")
