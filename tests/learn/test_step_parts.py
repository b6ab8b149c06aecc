"""Claims about the parts of a step: chunks of few or no rows, and gradients that parameters share."""

import math

import numpy as np
import torch

from pykalm.learn.step import _add, _even_chunks
from pykalm.model.dropout import drawing_from, dropped_places
from pykalm.text.trie import build_trie

NONE = np.zeros(0, dtype=np.int64)
WAYS = [(at_once, padded) for at_once in (1, 2, 4) for padded in (True, False)]
ROWS = build_trie([np.arange(3, 11), np.arange(20, 28)], row_tokens=8)


def test_a_process_without_rows_has_no_chunks() -> None:
    """As one of two, where a batch has one row; whatever the number of threads."""
    assert all(_even_chunks(ROWS, NONE, 64, at_once, padded=padded) == [] for at_once, padded in WAYS)


def test_every_row_is_in_one_chunk() -> None:
    rows = np.arange(len(ROWS.row_lengths))
    for at_once, padded in WAYS:
        assert np.concatenate(_even_chunks(ROWS, rows, 64, at_once, padded=padded)).tolist() == rows.tolist()


def test_chunks_without_padding_have_as_many_tokens_and_no_more_than_one_may_have() -> None:
    """For two threads an even number of chunks, within a row of their mean; also with rows that are long or short."""
    generator = np.random.default_rng(0)
    for others in ((), (700,), (1530, 1000), (5, 6, 7) * 40):
        lengths = [*others, *generator.integers(40, 97, size=200).tolist()]
        trie = build_trie([np.full(length, number) for number, length in enumerate(lengths)], row_tokens=1)
        rows = np.arange(len(lengths))
        chunks = _even_chunks(trie, rows, 1536, 2, padded=False)
        assert sorted(np.concatenate(chunks).tolist()) == rows.tolist()
        assert all(len(chunk) * trie.row_lengths[chunk].max() <= 1536 for chunk in chunks)
        tokens = np.array([trie.row_lengths[chunk].sum() for chunk in chunks])
        assert len(chunks) <= 2 * math.ceil(sum(lengths) / (2 * 1536)) + 4
        if not others:
            assert len(chunks) % 2 == 0
            assert np.abs(tokens - tokens.mean()).max() <= 96


def test_two_parameters_with_one_gradient_do_not_add_to_each_other() -> None:
    """autograd.grad returns one tensor for both of a sum."""
    one, other = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    for _ in range(2):
        gradients = torch.autograd.grad(((one + other) * torch.tensor([1.0, 2.0, 3.0])).sum(), [one, other])
        _add(dict(zip([one, other], gradients, strict=True)))
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad.tolist() == other.grad.tolist() == [2.0, 4.0, 6.0]


def test_generators_of_a_thread_nest() -> None:
    """The inner one is drawn from and left, and the outer one goes on."""
    with drawing_from(1):
        first = dropped_places(0.5, 100)
        second = dropped_places(0.5, 100)
    with drawing_from(1):
        assert torch.equal(dropped_places(0.5, 100), first)
        with drawing_from(2):
            assert not torch.equal(dropped_places(0.5, 100), second)
        assert torch.equal(dropped_places(0.5, 100), second)
