"""How likely a language model finds answers after their prompts, for many at once: one packed pass, few logits."""

from collections.abc import Iterator
from contextlib import closing
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykalm.memory import explained_memory
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.index import distinct_texts
from pykalm.model.sharding import give_back, is_sharded
from pykalm.model.side_by_side import side_by_side
from pykalm.processes import failing_together, gather_rows, rank, share_out
from pykalm.text.texts import IntArray, Texts, ranges, starts_of
from pykalm.text.trie import RowGroup, row_group
from pykalm.text.verbalize import Completions, answer_positions

FloatArray = npt.NDArray[np.float64]

TEXTS_AT_ONCE = 1 << 12
LOGITS_AT_ONCE = 256
"""Positions whose logits (V wide, float32) are held at the same time."""


@torch.no_grad()
def answer_log_likelihoods(
    encoder: Encoder, completions: Completions, *, progress: Progress | None = None
) -> FloatArray:
    """Return Σ log p(token | what stands before it) over the answer and end token of N completions (N,). METHOD.md §3.

    Prompts share their prefixes, and answers theirs; logits are computed once at every node before an answer token, and
    an end token, which predicts nothing, is never read. Log probabilities are float32, in eval mode, summed in float64;
    equal completions get equal numbers. All processes call it with the same completions and share them out. progress is
    called with (tokens done, tokens in all). Raises ModelError for a text longer than the model has positions, and
    OutOfMemoryError.
    """
    encoder.require_room(int(completions.texts.lengths.max(initial=0)))
    distinct, row_of = _distinct(completions)
    slices = [
        np.arange(len(distinct))[start : start + TEXTS_AT_ONCE] for start in range(0, len(distinct), TEXTS_AT_ONCE)
    ]
    costs = np.array([int(distinct.texts.lengths[part].sum()) for part in slices], dtype=np.int64)
    owners, shared_out = share_out(costs), not is_sharded(encoder)  # of shared weights all need every pass
    own = [part for part, owner in zip(slices, owners, strict=True) if owner == rank() or not shared_out]
    sums: list[Tensor] = [torch.zeros(0, 1, dtype=torch.float64)]
    was_training, done, total = encoder.training, 0, sum(int(distinct.texts.lengths[part].sum()) for part in own)
    encoder.eval()
    try:
        with explained_memory("Lower training.chunk_tokens, the tokens that are computed at once."), failing_together():
            for part in own:
                chosen = distinct.select(part)
                sums.append(torch.from_numpy(_sums(encoder, chosen))[:, None])
                done += len(chosen.texts.tokens)
                if progress is not None:
                    progress(done, total)
    finally:
        give_back(encoder)
        encoder.train(was_training)
    found = torch.cat(sums)
    if shared_out:
        found = gather_rows(found, np.repeat(owners, [len(part) for part in slices]))
    return np.asarray(found[:, 0].numpy()[row_of])


def _distinct(completions: Completions) -> tuple[Completions, IntArray]:
    """Keep the first of equal completions; returns the distinct ones and the row there of each."""
    each = np.arange(len(completions))
    starts = Texts(completions.answer_starts.astype(np.int32), np.arange(len(each) + 1))
    _, rows = distinct_texts(Texts.join([(starts, each), (completions.texts, each)]))
    return completions.select(np.unique(rows, return_index=True)[1]), rows


def _sums(encoder: Encoder, completions: Completions) -> FloatArray:
    """Return the summed log probabilities (N,) of some completions, in one trie."""
    trie = encoder.lay_out(without_last_tokens(completions.texts))
    nodes, tokens = answer_positions(trie, completions)
    found = np.empty(len(nodes))
    wanted, of_node = np.unique(nodes, return_inverse=True)
    pairs = np.argsort(of_node, kind="stable")  # the answer tokens, those behind the first wanted node first
    counts = np.bincount(of_node, minlength=len(wanted))
    starts = np.cumsum(counts) - counts

    chunks = trie.chunks(encoder.chunk_tokens)
    at_once = encoder.chunks_at_once(len(chunks))

    def read(rows: IntArray) -> list[tuple[IntArray, FloatArray]]:
        parts = []
        group = row_group(trie, rows)
        for which, states in _states(
            encoder, group, wanted, shared=trie.shared, at_once=part_of(LOGITS_AT_ONCE, at_once)
        ):
            log_probabilities = encoder.logits(states).log_softmax(dim=-1)
            chosen = pairs[ranges(starts[which], counts[which])]
            row = torch.from_numpy(np.repeat(np.arange(len(which)), counts[which])).to(encoder.device)
            column = torch.from_numpy(tokens[chosen]).to(encoder.device)
            parts.append((chosen, log_probabilities[row, column].double().cpu().numpy()))
        return parts

    with closing(side_by_side(read, chunks, at_once=at_once)) as results:
        for chosen, values in chain.from_iterable(results):
            found[chosen] = values
    text = np.repeat(np.arange(len(completions)), completions.num_answer_tokens)
    sums: FloatArray = np.bincount(text, weights=found, minlength=len(completions)).astype(np.float64)
    return sums


def _states(
    encoder: Encoder, group: RowGroup, wanted: IntArray, *, shared: bool, at_once: int
) -> Iterator[tuple[IntArray, Tensor]]:
    """Yield the states of the wanted nodes of a group, some at once, each with the numbers of its nodes."""
    which, places = group.find(wanted)
    states = encoder(group, shared=shared, wanted=places)[torch.from_numpy(places).to(encoder.device)]
    for start in range(0, len(which), at_once):
        yield which[start : start + at_once], states[start : start + at_once]


def part_of(logits: int, passes: int) -> int:
    """Return how many logits, of those that memory has room for, each of some passes side by side may hold."""
    return max(1, logits // passes)


def without_last_tokens(texts: Texts) -> Texts:
    """Return every text without its last token."""
    lengths = texts.lengths - 1
    return Texts(texts.tokens[ranges(texts.offsets[:-1], lengths)], starts_of(lengths))
