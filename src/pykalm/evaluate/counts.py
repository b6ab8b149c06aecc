"""Count the entities that score above and level with a target, in blocks of queries × entities that fit a cache."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykalm.graph.graph import IntArray
from pykalm.model.index import require_finite
from pykalm.model.products import products

KnownRows = tuple[IntArray, IntArray]
Counts = tuple[IntArray, IntArray, IntArray]
BoolArray = npt.NDArray[np.bool_]
ScoreArray = npt.NDArray[np.float32]

TARGETS_AT_ONCE = 256
"""Targets are taken in parts of this many, or of as many as there are queries: one query may have thousands."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Hold the distinct vectors (U, D) of E entities, entity e having row_of_entity[e], cut into blocks of rows.

    entities_of_row (U,) counts the entities that share a vector: every distinct vector is scored once.
    """

    vectors: Tensor
    row_of_entity: IntArray
    entities_of_row: Tensor
    blocks: list[slice]
    device: torch.device

    @staticmethod
    def cut(vectors: Tensor, row_of_entity: IntArray, *, block: int, device: torch.device) -> "Candidates":
        """Cut into blocks of at most `block` rows, as even as can be, that are computed on a device."""
        entities_of_row = torch.from_numpy(np.bincount(row_of_entity, minlength=len(vectors)))
        # They are added up in products, and float32 knows the whole numbers up to 2^24.
        exact = torch.float32 if len(row_of_entity) < 1 << 24 else torch.float64
        return Candidates(vectors, row_of_entity, entities_of_row.to(exact), even_slices(len(vectors), block), device)

    def choose(self, rows: slice | IntArray) -> Tensor:
        """Return the vectors (C, D) of some rows in float32, moved to the device."""
        if not isinstance(rows, slice):
            return self.vectors[torch.from_numpy(rows).to(self.vectors.device)].to(self.device).float()
        return self.vectors[rows].to(self.device).float()


def even_slices(num: int, size: int) -> list[slice]:
    """Cut `num` things into slices of at most `size`, as even as can be: a small last one would be slow."""
    count = -(-num // size)
    return [slice(num * i // count, num * (i + 1) // count) for i in range(count)]


def require_finite_scores(query: Tensor, candidates: Candidates) -> None:
    """Raise ModelError unless every product of a query with a candidate is sure to be finite.

    Looks at the vectors, not at the products, which are so many more: D times the two largest numbers bounds these.
    """
    largest = [_largest(query)] + [_largest(candidates.choose(block)) for block in candidates.blocks]
    bound = query.shape[1] * largest[0] * float(np.max(largest[1:], initial=0))  # np.max keeps a NaN
    require_finite(bound if bound <= torch.finfo(torch.float32).max else float("nan"))


def _largest(vectors: Tensor) -> float:
    return float(torch.stack(vectors.aminmax()).abs().amax()) if vectors.numel() else 0.0


def count_targets(
    query: Tensor, query_of_target: IntArray, targets: IntArray, *, known: KnownRows, candidates: Candidates
) -> Counts:
    """Count for P targets the entities above, those level (the target included), and all that are left; each (P,).

    query (Q, D) float32; query_of_target and targets (P,); known: offsets (Q + 1,) and entities, of which those that
    are not the target itself are left out. What shares the target's vector is level, however products round.
    """
    own_rows, known_rows = candidates.row_of_entity[targets], candidates.row_of_entity[known[1]]
    query_of_known = np.repeat(np.arange(len(query)), np.diff(known[0]))
    asked = (np.concatenate([query_of_target, query_of_known]), np.concatenate([own_rows, known_rows]))
    thresholds = _paired_scores(query, query_of_target, own_rows, candidates)
    above, level, scores = _count_rows(query, query_of_target, thresholds, asked=asked, candidates=candidates)
    at_target = thresholds.cpu().numpy()
    own_scores, known_scores = scores[: len(targets)], scores[len(targets) :]
    sharing = candidates.entities_of_row[torch.from_numpy(own_rows)].numpy().astype(np.int64)
    above -= sharing * (own_scores > at_target)
    level += sharing * (own_scores != at_target)

    pair, place = _pairs_with_known(query_of_target, known[0])
    is_other = known[1][place] != targets[pair]
    pair, place = pair[is_other], place[is_other]
    is_above, is_level = _compare(known_scores[place], at_target[pair], known_rows[place] == own_rows[pair])
    above -= np.bincount(pair[is_above], minlength=len(targets))
    level -= np.bincount(pair[is_level], minlength=len(targets))
    return above, level, len(candidates.row_of_entity) - np.bincount(pair, minlength=len(targets))


def _pairs_with_known(query_of_target: IntArray, offsets: IntArray) -> tuple[IntArray, IntArray]:
    """Return a line for every target and every known answer to its query: the target, and the place of the answer."""
    lengths = np.diff(offsets)[query_of_target]
    pair = np.repeat(np.arange(len(query_of_target)), lengths)
    starts = offsets[query_of_target] - np.cumsum(lengths) + lengths
    return pair, np.arange(len(pair)) + np.repeat(starts, lengths)


def _compare(scores: ScoreArray, at_target: ScoreArray, shares_vector: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Return which known answers (N,) were counted above their target and which level with it, to take them out again.

    Taken out they are, not lowered. METHOD.md §7.3.
    """
    return ~shares_vector & (scores > at_target), shares_vector | (scores == at_target)


def _paired_scores(query: Tensor, query_of_target: IntArray, rows: IntArray, candidates: Candidates) -> Tensor:
    """Return the product (P,) of each target's query with its vector.

    They lie on the diagonals of small products, which add up in the order of large ones (a row-wise sum does not), so that
    a vector beside the target that scores the same is level with it to the last bit.
    """
    scores = []
    for part in even_slices(len(rows), TARGETS_AT_ONCE):
        asking = query[torch.from_numpy(query_of_target[part]).to(query.device)]
        scores.append(products(asking, candidates.choose(rows[part])).diagonal())
    return torch.cat(scores)


def _count_rows(
    query: Tensor,
    query_of_target: IntArray,
    thresholds: Tensor,
    *,
    asked: tuple[IntArray, IntArray],
    candidates: Candidates,
) -> tuple[IntArray, IntArray, ScoreArray]:
    """Count for P targets the entities that score above and level with a threshold (P,), and look scores up.

    asked: queries and rows (N,) whose scores are wanted: the numbers that were counted, to the last bit.
    """
    device = candidates.device
    parts = even_slices(len(thresholds), max(len(query), TARGETS_AT_ONCE))
    order = np.argsort(asked[1], kind="stable")
    edges = np.searchsorted(asked[1][order], [block.start for block in candidates.blocks] + [len(candidates.vectors)])
    queries, rows = (torch.from_numpy(side[order]).to(device) for side in asked)
    wanted = torch.from_numpy(query_of_target).to(device)
    one_each = np.array_equal(query_of_target, np.arange(len(query)))
    above, at_least = (torch.zeros(len(thresholds), dtype=torch.int64, device=device) for _ in range(2))
    looked_up = torch.empty(len(order), device=device)
    for block, (start, stop) in zip(candidates.blocks, pairwise(edges.tolist()), strict=True):
        scores = products(query, candidates.choose(block))
        here = slice(start, stop)
        looked_up[here] = scores[queries[here], rows[here] - block.start]
        weights = candidates.entities_of_row[block].to(device)
        for part in parts:
            # Written as numbers: a comparison that writes booleans takes four times as long, and they do not add up.
            chosen = scores if one_each else scores.index_select(0, wanted[part])
            at_threshold = thresholds[part, None]
            found = torch.empty(chosen.shape, dtype=weights.dtype, device=device)
            at_least[part] += (torch.ge(chosen, at_threshold, out=found) @ weights).long()
            above[part] += (torch.gt(chosen, at_threshold, out=found) @ weights).long()
    unsorted = torch.empty_like(looked_up)
    unsorted[torch.from_numpy(order).to(device)] = looked_up
    return above.cpu().numpy(), (at_least - above).cpu().numpy(), unsorted.cpu().numpy()
