"""Filtered ranks of the true answers among all entities, and the metrics made from them. EVALUATION.md §1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykalm.graph.graph import IntArray
from pykalm.model.index import entity_scores

FloatArray = npt.NDArray[np.float64]
KnownRows = tuple[IntArray, IntArray]

CHUNK_QUERIES = 256


@dataclass(frozen=True, eq=False)
class RankTable:
    """Hold the ranks of B targets, each (B,), with ties for us, in the mean and against us.

    num_candidates (B,): the entities that took part, with the target. The realistic rank is the reported one:
    (n + 1) / 2 when all n candidates score the same.
    """

    optimistic: IntArray
    realistic: FloatArray
    pessimistic: IntArray
    num_candidates: IntArray

    def __len__(self) -> int:
        return len(self.realistic)

    def select(self, rows: npt.NDArray[np.bool_] | IntArray) -> "RankTable":
        """Take some rows, by number or by a mask (B,)."""
        return RankTable(self.optimistic[rows], self.realistic[rows], self.pessimistic[rows], self.num_candidates[rows])


@dataclass(frozen=True)
class RankMetrics:
    """Summarise realistic ranks: mean rank, mean reciprocal rank, share of ranks up to 1, 3 and 10.

    The adjusted mean rank index is 1 for perfect ranks, 0 for chance, whatever the number of entities.
    """

    mr: float
    mrr: float
    hits_at_1: float
    hits_at_3: float
    hits_at_10: float
    adjusted_mean_rank_index: float
    num_queries: int

    def to_dict(self) -> dict[str, float]:
        """Return the metrics by name, for JSON."""
        return asdict(self)


def rank(
    query: Tensor,
    entities: Tensor,
    *,
    row_of_entity: IntArray,
    targets: IntArray,
    known: KnownRows,
    chunk_queries: int = CHUNK_QUERIES,
) -> RankTable:
    """Rank the target of every query among all entities, without the other entities known to answer it.

    query (B, D); entities (U, D) distinct vectors, of which entity e has row_of_entity[e]; targets (B,);
    known: offsets (B + 1,) and entities, distinct for each query; the target may be among them and is kept.
    Memory grows with chunk_queries * E, not with B; entities need no chunks, for the scores of a query are a
    D-th of the vectors. Raises ModelError where a score is NaN or infinite: it has no rank.
    EVALUATION.md §1.
    """
    offsets, known_entities = known
    assert len(query) == len(targets) == len(offsets) - 1
    rows = torch.from_numpy(row_of_entity)
    better, equal, candidates = (np.empty(len(targets), dtype=np.int64) for _ in range(3))
    for start in range(0, len(targets), chunk_queries):
        chunk = slice(start, min(start + chunk_queries, len(targets)))
        scores = entity_scores(query[chunk], entities, rows).numpy()
        chunk_offsets = offsets[chunk.start : chunk.stop + 1]
        removed = known_entities[chunk_offsets[0] : chunk_offsets[-1]]
        better[chunk], equal[chunk], candidates[chunk] = _count(
            scores, targets[chunk], (chunk_offsets - chunk_offsets[0], removed)
        )
    return _rank_table(better, equal, candidates)


def _count(scores: npt.NDArray[np.float32], targets: IntArray, known: KnownRows) -> tuple[IntArray, IntArray, IntArray]:
    """Count in scores (B, E), which it overwrites, the entities above the target, level with it, and left."""
    offsets, known_entities = known
    queries = np.arange(len(targets))
    target_scores = scores[queries, targets][:, None]
    query_of_known = np.repeat(queries, np.diff(offsets))
    is_other = known_entities != targets[query_of_known]
    _remove(scores, query_of_known[is_other], known_entities[is_other])
    num_removed = np.bincount(query_of_known[is_other], minlength=len(targets))
    better = np.count_nonzero(scores > target_scores, axis=1)
    equal = np.count_nonzero(scores == target_scores, axis=1)
    return better, equal, scores.shape[1] - num_removed


def _remove(scores: npt.NDArray[np.float32], queries: IntArray, entities: IntArray) -> None:
    """Take entities out of the ranking, in place; lowering their scores would not do. METHOD.md §7.3."""
    scores[queries, entities] = -np.inf


def _rank_table(better: IntArray, equal: IntArray, num_candidates: IntArray) -> RankTable:
    """Turn counts (B,) into ranks; the target itself is among the equal ones."""
    optimistic = 1 + better
    pessimistic = better + equal
    return RankTable(optimistic, (optimistic + pessimistic) / 2, pessimistic, num_candidates)


def join_rank_tables(tables: Sequence[RankTable]) -> RankTable:
    """Put the rows of several tables under each other."""
    return RankTable(
        np.concatenate([table.optimistic for table in tables]),
        np.concatenate([table.realistic for table in tables]),
        np.concatenate([table.pessimistic for table in tables]),
        np.concatenate([table.num_candidates for table in tables]),
    )


def rank_metrics(ranks: RankTable) -> RankMetrics:
    """Compute the metrics of at least one realistic rank. EVALUATION.md §1."""
    assert len(ranks), "metrics of no rank"
    realistic = ranks.realistic
    chance = float(np.mean((ranks.num_candidates + 1) / 2))  # the mean rank of random scores
    mean_rank = float(realistic.mean())
    has_choice = chance > 1  # one candidate is ranked first without any skill
    return RankMetrics(
        mr=mean_rank,
        mrr=float((1 / realistic).mean()),
        hits_at_1=float((realistic <= 1).mean()),
        hits_at_3=float((realistic <= 3).mean()),
        hits_at_10=float((realistic <= 10).mean()),
        adjusted_mean_rank_index=1 - (mean_rank - 1) / (chance - 1) if has_choice else 0.0,
        num_queries=len(ranks),
    )
