"""Law 5: pooling does not see the pad side, extra columns, or that pad is the end token."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pykalm.text import trie as trie_module
from pykalm.text.trie import RowGroup, build_trie, row_group
from tests.laws.common import replaced, tiny_encoder, tiny_graph, tiny_verbalizer

END = 2
TEXTS = [np.array(ids) for ids in ([5, 6], [5, 6, 7, 8, 9, 10, 11, 12], [5, 6, END], [END, END], [9], [5, END, 6, END])]


def test_vectors_do_not_depend_on_what_stands_beside_a_text() -> None:
    """Alone, beside longer texts (extra columns), in any order, with end tokens inside: equal to 2e-6 in float32."""
    for packed in (True, False):
        encoder = tiny_encoder(row_tokens=8)
        encoder.packed = packed
        alone = torch.cat([encoder.embed([text]) for text in TEXTS])
        for order in (range(len(TEXTS)), reversed(range(len(TEXTS)))):
            places = list(order)
            together = encoder.embed([TEXTS[i] for i in places])
            assert float((together - alone[places]).abs().max()) < 2e-6
    assert float((alone[0] - alone[2]).norm()) > 0.1  # an end token that belongs to the text is read


def test_a_mean_is_taken_over_the_tokens_of_the_text_alone() -> None:
    """Whatever stands beside it in its row, before, after or in between; float32 rounding is below 2e-6."""
    for family in ("llama", "mistral-sliding"):
        for packed in (True, False):
            encoder = tiny_encoder(family, row_tokens=12, pooling="mean")
            encoder.packed = packed
            with torch.no_grad():
                states = [encoder.causal_lm.base_model(input_ids=torch.from_numpy(text)[None])[0][0] for text in TEXTS]
            means = torch.stack([F.normalize(state.mean(dim=0), dim=0) for state in states])
            assert float((encoder.embed(TEXTS) - means).abs().max()) < 2e-6


def test_pad_token_and_pad_side_of_the_tokenizer_change_nothing() -> None:
    verbalizer, encoder = tiny_verbalizer(tiny_graph()), tiny_encoder()
    before = encoder.embed(verbalizer.candidates(np.arange(6)))
    other = tiny_verbalizer(tiny_graph())
    other.tokenizer.pad_token = other.tokenizer.eos_token
    other.tokenizer.padding_side = "left"
    assert torch.equal(encoder.embed(other.candidates(np.arange(6))), before)


def test_every_text_is_pooled_at_its_own_last_token() -> None:
    trie = build_trie(TEXTS, row_tokens=100)
    assert [int(token) for token in trie.token_ids[trie.last_nodes()]] == [int(text[-1]) for text in TEXTS]
    assert [int(depth) + 1 for depth in trie.depths[trie.last_nodes()]] == [len(text) for text in TEXTS]


def test_a_cut_takes_tokens_and_leaves_the_mark() -> None:
    """METHOD.md §7.10: a byte is a token here, so a cut at 4 leaves a space, 3 letters and, after them, the mark."""
    verbalizer = tiny_verbalizer(tiny_graph(), max_entity_tokens=4, max_relation_tokens=4)
    assert verbalizer.tokenizer.decode(verbalizer.candidate(5)) == "[ eve ]"
    assert verbalizer.tokenizer.decode(verbalizer.query(5, 0)) == "[ eve, kno ]"


def pooled_at_the_last_column() -> AbstractContextManager[None]:
    """Read the last column of the group, as a code for left padding does. METHOD.md §7.9."""
    right = RowGroup.find

    def wrong(self: RowGroup, nodes: Any) -> Any:
        inside, places = right(self, nodes)
        return inside, (places // self.nodes.shape[1] + 1) * self.nodes.shape[1] - 1

    return replaced(RowGroup, "find", wrong)


def padding_is_seen() -> AbstractContextManager[None]:
    """Put the padding before the tokens of a row, where they see it."""

    def wrong(trie: Any, rows: Any) -> RowGroup:
        group = row_group(trie, rows)
        shifts = (group.nodes < 0).sum(axis=1)
        rolled = [np.stack([np.roll(row, s) for row, s in zip(part, shifts, strict=True)])
                  for part in (group.token_ids, group.depths, group.nodes, group.twins)]  # fmt: skip
        ends = np.full_like(group.ends, group.ends.shape[1])
        return RowGroup(rolled[0], rolled[1], ends, rolled[2], rolled[3])

    from pykalm.model import encoder

    return replaced(encoder, "row_group", wrong)


def texts_end_where_the_pad_token_stands() -> AbstractContextManager[None]:
    """Find the end of a text by its first pad token, though pad is the end token and may stand inside."""
    right = trie_module.build_trie

    def wrong(texts: Any, **rest: Any) -> Any:
        cut = [text[: max(1, int(np.argmax(text == END)))] if END in text else text for text in texts]
        return right(cut, **rest)

    from pykalm.model import encoder

    return replaced(encoder, "build_trie", wrong)


def the_mean_takes_the_whole_row() -> AbstractContextManager[None]:
    """Average all that stands before the last token in its row, other texts too."""

    def wrong(self: RowGroup, places: Any) -> Any:
        columns = places % self.ends.shape[1]
        starts = np.concatenate([[0], np.cumsum(columns + 1)])
        return np.concatenate([np.arange(p - c, p + 1) for p, c in zip(places, columns, strict=True)]), starts

    return replaced(RowGroup, "paths_to", wrong)


BREAKS = {
    "pooled at the last column": pooled_at_the_last_column,
    "padding is seen": padding_is_seen,
    "texts end at the first pad token": texts_end_where_the_pad_token_stands,
}
CHECKS = dict.fromkeys(BREAKS, "test_vectors_do_not_depend_on_what_stands_beside_a_text")
BREAKS["the mean takes the whole row"] = the_mean_takes_the_whole_row
CHECKS["the mean takes the whole row"] = "test_a_mean_is_taken_over_the_tokens_of_the_text_alone"
