"""The trie of names and the rule made from it, against hand counts."""

import numpy as np
import pytest
import torch

from pykalm.model.name_trie import NamesOnly, NameTrie
from pykalm.text.texts import Texts

# 1 and 1 2 3 are names, so one begins the other; 4 is the end token, 5 another way to end.
NAMES = [[1], [1, 2, 3], [2, 2], [1]]
END, LINE_END = 4, 5


def trie(names: list[list[int]]) -> NameTrie:
    return NameTrie(Texts.of([np.array(name, dtype=np.int64) for name in names]))


def allowed(written: list[int], scores: torch.Tensor | None = None) -> dict[int, float]:
    """Return the tokens that may follow a prompt of two tokens and what was written, with their scores."""
    rule = NamesOnly(trie(NAMES), width=2, end_id=END, stop_ids=(END, LINE_END))
    scores = torch.zeros(1, 6) if scores is None else scores
    (row,) = rule(torch.tensor([[9, 9, *written]]), scores).tolist()
    return {token: score for token, score in enumerate(row) if score > float("-inf")}


def test_only_tokens_that_continue_a_name_are_left() -> None:
    assert set(allowed([])) == {1, 2}
    assert set(allowed([1])) == {2, END}
    assert set(allowed([1, 2])) == {3}
    assert set(allowed([1, 2, 3])) == {END}
    assert set(allowed([2])) == {2}


def test_after_the_end_only_the_end_is_left() -> None:
    assert allowed([1, END]) == {END: 0.0}
    assert allowed([2, 2, END, 0]) == {END: 0.0}


def test_all_ways_to_end_count_as_one() -> None:
    scores = torch.tensor([[0.0, 0.0, 1.5, 0.0, -1.0, 2.0]])
    assert allowed([1], scores) == pytest.approx({2: 1.5, END: float(torch.tensor([-1.0, 2.0]).logsumexp(0))})


def test_names_are_found_by_their_tokens() -> None:
    names = trie(NAMES)
    found = [names.name_at(names.find(tokens)) for tokens in ([1], [1, 2], [1, 2, 3], [2, 2], [3], [1, 2, 3, 1])]
    assert found == [0, None, 1, 2, None, None]
    assert names.longest == 3


def test_a_name_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="none in name 1"):
        trie([[1], []])
