"""The best k candidates of every question, under the filter of link prediction, in memory that does not grow with entities."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pykalm.evaluate.counts import (
    Candidates,
    KnownRows,
    even_slices,
    require_finite_scores,
)
from pykalm.evaluate.ranking import CHUNK_ENTITIES, CHUNK_QUERIES, FloatArray
from pykalm.graph.graph import IntArray
from pykalm.model.index import EntityIndex
from pykalm.model.products import exact_float32, products

Pairs = tuple[IntArray, IntArray]


@dataclass(frozen=True, eq=False)
class Shortlists:
    """Hold for Q questions the k best entities that no split knows as an answer, best first, and for B targets their scores.

    entities, scores (Q, k): −1 and −inf where there are fewer entities; target_scores (B,). Scores are float32 values.
    """

    entities: IntArray
    scores: FloatArray
    target_scores: FloatArray


def shortlist(
    query: Tensor,
    index: EntityIndex,
    *,
    targets: IntArray,
    query_of_target: IntArray,
    known: KnownRows,
    k: int,
    chunk_queries: int = CHUNK_QUERIES,
    chunk_entities: int = CHUNK_ENTITIES,
    device: torch.device | str = "cpu",
) -> Shortlists:
    """Find the k best of all entities for query (Q, D), known answers left out, and the scores of targets (B,).

    known: offsets (Q + 1,) and entities, the targets among them. Scores are those that `ranking.rank` counts, block by
    block, so that memory holds chunk_queries × chunk_entities of them. Raises ModelError where one may be NaN.
    """
    place = torch.device(device)
    candidates = Candidates.cut(index.vectors, index.row_of_entity, block=chunk_entities, device=place)
    require_finite_scores(query, candidates)
    by_row = np.argsort(index.row_of_entity, kind="stable")
    order = by_row, np.argsort(by_row)
    offsets, known_entities = known
    found: list[tuple[IntArray, FloatArray]] = []
    target_scores = np.empty(len(targets))
    with exact_float32():
        for chunk in even_slices(len(query), chunk_queries):
            asked = np.flatnonzero((query_of_target >= chunk.start) & (query_of_target < chunk.stop))
            lengths = np.diff(offsets[chunk.start : chunk.stop + 1])
            hidden = known_entities[offsets[chunk.start] : offsets[chunk.stop]]
            entities, scores, target_scores[asked] = _best(
                query[chunk].to(place).float(),
                candidates,
                order,
                asked=(query_of_target[asked] - chunk.start, targets[asked]),
                hidden=(np.repeat(np.arange(len(lengths)), lengths), hidden),
                k=k,
            )
            found.append((entities, scores))
    best, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Shortlists(best, scores, target_scores)


def _best(
    query: Tensor, candidates: Candidates, order: Pairs, *, asked: Pairs, hidden: Pairs, k: int
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Return entities and scores (Q, k) of the best that are not hidden, and the scores of the asked pairs.

    order: the entities (E,) in the order of their vectors, and the place of each there; asked, hidden: pairs (query, entity).
    """
    by_row, place_of = order
    device, rows = candidates.device, candidates.row_of_entity[by_row]
    best = torch.full((len(query), k), -torch.inf, device=device)
    places = torch.full((len(query), k), -1, dtype=torch.int64, device=device)
    looked_up = np.empty(len(asked[0]))
    for block in candidates.blocks:
        first, stop = np.searchsorted(rows, [block.start, block.stop]).tolist()
        columns = torch.from_numpy(rows[first:stop] - block.start).to(device)
        scores = products(query, candidates.choose(block)).index_select(1, columns)
        inside, cells = _inside(asked, place_of, first, stop)
        looked_up[inside] = scores[cells].double().cpu().numpy()
        scores[_inside(hidden, place_of, first, stop)[1]] = -torch.inf
        here = torch.arange(first, stop, device=device).expand(len(query), -1)
        best, columns = torch.cat([best, scores], dim=1).topk(k)
        places = torch.cat([places, here], dim=1).gather(1, columns)
    chosen = places.cpu().numpy()
    scores_found = best.double().cpu().numpy()
    return np.where(np.isfinite(scores_found), by_row[chosen], -1), scores_found, looked_up


def _inside(pairs: Pairs, place_of: IntArray, first: int, stop: int) -> tuple[IntArray, tuple[Tensor, Tensor]]:
    """Return which pairs (query, entity) have their entity in a block, and their cells in the block's scores."""
    places = place_of[pairs[1]]
    inside = np.flatnonzero((places >= first) & (places < stop))
    return inside, (torch.from_numpy(pairs[0][inside]), torch.from_numpy(places[inside] - first))
