"""Filtered ranks of the true answers among all entities, and the metrics made from them. EVALUATION.md §1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykalm.evaluate.counts import (
    Candidates,
    KnownRows,
    count_targets,
    even_slices,
    require_finite_scores,
)
from pykalm.graph.graph import IntArray
from pykalm.model.products import exact_float32
from pykalm.processes import failing_together, own_part, sum_counts

FloatArray = npt.NDArray[np.float64]

CHUNK_QUERIES = 512
CHUNK_ENTITIES = 1024


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
    query_of_target: IntArray | None = None,
    chunk_queries: int = CHUNK_QUERIES,
    chunk_entities: int = CHUNK_ENTITIES,
    device: torch.device | str | None = None,
) -> RankTable:
    """Rank B targets among all entities, each without the other entities known to answer its query.

    query (Q, D); entities (U, D) distinct vectors, float32 or narrower, of which entity e has row_of_entity[e]; targets
    (B,), asked for by query_of_target (B,), by default target b by query b; known: offsets (Q + 1,) and entities,
    distinct for each query; the target may be among them and is kept. Scores are float32. They are computed on
    `device`, by default where the entities are; these are moved there block by block and may lie on disk.

    Beside what is given, the result and 12 bytes a vector, memory is at most, with c = chunk_queries (256 at least) and
    e = chunk_entities, 12·c·e bytes for scores (16·c·e from 2²⁴ entities on), 4·D·(c + 2·e) + 8·D·c for vectors, and 80
    for each pair of a target and a known answer of c queries: it grows neither with B nor with E. Raises ModelError where
    a score may be NaN or infinite: it has no rank. All processes call it with the same vectors and share the chunks of
    queries out, so that ranks are those of one process. EVALUATION.md §1.
    """
    offsets, known_entities = known
    wanted = np.arange(len(targets)) if query_of_target is None else query_of_target
    assert len(query) == len(offsets) - 1
    assert len(targets) == len(wanted)
    place = entities.device if device is None else torch.device(device)
    candidates = Candidates.cut(entities, row_of_entity, block=chunk_entities, device=place)
    require_finite_scores(query, candidates)
    order = np.argsort(wanted, kind="stable")
    first_target = np.searchsorted(wanted[order], np.arange(len(query) + 1))
    counts = np.zeros((3, len(targets)), dtype=np.int64)
    with exact_float32(), failing_together():
        for chunk in own_part(even_slices(len(query), chunk_queries)):
            chosen = order[first_target[chunk.start] : first_target[chunk.stop]]
            if not len(chosen):
                continue
            first, last = offsets[chunk.start], offsets[chunk.stop]
            counts[:, chosen] = count_targets(
                query[chunk].to(place).float(),
                wanted[chosen] - chunk.start,
                targets[chosen],
                known=(offsets[chunk.start : chunk.stop + 1] - first, known_entities[first:last]),
                candidates=candidates,
            )
    return _rank_table(*sum_counts(counts))


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
