"""Queries ranked per second: kalm beside the published loop and beside PyKEEN's evaluator, on the same vectors.

The vectors hold whole numbers, so that every score is exact in float32 however a matrix product is cut up, and many are
equal: ranks can be compared to the last tie.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pykalm.bench.machine import peak_memory
from pykalm.bench.own_process import in_own_process
from pykalm.bench.plan import Workshop, generator
from pykalm.bench.pykeen_ranks import MISSING, pykeen_ranking, pykeen_version
from pykalm.bench.timing import Spread, Timed, interleaved, paired_ratio
from pykalm.evaluate.links import rank_links
from pykalm.evaluate.ranking import FloatArray
from pykalm.graph.graph import IntArray, KnowledgeGraph
from pykalm.graph.known import KnownAnswers, known_answers
from pykalm.model.index import EntityIndex

LARGEST_VALUE = 4
"""Bound of a vector's whole numbers; over thousands of columns scores stay below 2^24, where float32 is exact."""


@dataclass(frozen=True, eq=False)
class RankingTask:
    """Hold what is ranked: the rows (B, 3) of a split in both directions, the vectors, and the filter.

    keys (K,), ascending: the distinct head · 2R + relation; distinct (K, D) their vectors; query (B, D) those of the rows.
    """

    graph: KnowledgeGraph
    split: str
    rows: IntArray
    keys: Tensor
    distinct: Tensor
    query: Tensor
    entities: Tensor
    known: KnownAnswers

    @staticmethod
    def build(graph: KnowledgeGraph, *, width: int, seed: int, device: torch.device) -> "RankingTask":
        """Draw vectors for all entities of a graph and for its test queries (those of train where there is no test).

        A query's vector is that of one of its answers with as much noise.
        """
        split = "test" if len(graph.splits.get("test", ())) else "train"
        rows = graph.both_directions(split)
        keys, first, key_of = np.unique(
            rows[:, 0] * (2 * graph.num_relations) + rows[:, 1], return_index=True, return_inverse=True
        )
        draw = torch.Generator().manual_seed(seed)
        entities = whole_numbers(graph.num_entities, width, draw)
        distinct = entities[torch.from_numpy(rows[first, 2])] + whole_numbers(len(keys), width, draw)
        query = distinct[torch.from_numpy(key_of)]
        known, places = known_answers(graph), torch.from_numpy(keys).to(device)
        return RankingTask(
            graph, split, rows, places, distinct.to(device), query.to(device), entities.to(device), known
        )


@dataclass(frozen=True)
class RankingSpeed:
    """Hold the measurements on one graph.

    triples_per_second: test triples, each asked in both directions; equal_ranks: whether all realistic ranks are those of
    PyKEEN, and of a plain loop on the sampled queries; peak_memory: bytes above the vectors, in a process of its own;
    pykeen: its version, or that it is not installed, and then its figures are None.
    """

    graph: str
    num_entities: int
    num_queries: int
    width: int
    triples_per_second: Spread
    published_triples_per_second: Spread
    ratio_to_published: Spread
    pykeen_triples_per_second: Spread | None
    ratio_to_pykeen: Spread | None
    pykeen: str
    equal_ranks: bool
    peak_memory: int
    loop_queries: int


def measure_ranking(workshop: Workshop, graph: str) -> RankingSpeed:
    """Measure filtered ranking of a graph's test queries, both directions, with vectors as wide as the model's."""
    plan, device, loaded = workshop.plan, workshop.device, workshop.graph(graph)
    build = partial(RankingTask.build, loaded, width=workshop.width, seed=plan.seed, device=device)
    peak = in_own_process(partial(_ranking_peak, build, device, torch.get_num_threads()))
    task = build()
    sample = generator(plan.seed, 4).choice(len(task.rows), size=min(plan.loop_queries, len(task.rows)), replace=False)
    known = {tuple(row) for split in loaded.splits for row in loaded.both_directions(split).tolist()}
    systems: dict[str, Callable[[int], FloatArray]] = {
        "kalm": lambda number: kalm_ranks(task),
        "published": lambda number: published_ranks(task, sample, known),
    }
    if pykeen_version():
        pykeen = pykeen_ranking(loaded, task.split, keys=task.keys, query=task.distinct, entities=task.entities)
        systems["pykeen"] = lambda number: pykeen()
    timed = interleaved(systems, repeats=plan.repeats, device=device)
    speed = {name: [len(call.value) / 2 / call.seconds for call in calls] for name, calls in timed.items()}
    return RankingSpeed(
        graph=loaded.name,
        num_entities=loaded.num_entities,
        num_queries=len(task.rows),
        width=workshop.width,
        triples_per_second=Spread.of(speed["kalm"]),
        published_triples_per_second=Spread.of(speed["published"]),
        ratio_to_published=paired_ratio(speed["kalm"], speed["published"]),
        pykeen_triples_per_second=Spread.of(speed["pykeen"]) if "pykeen" in speed else None,
        ratio_to_pykeen=paired_ratio(speed["kalm"], speed["pykeen"]) if "pykeen" in speed else None,
        pykeen=pykeen_version() or MISSING,
        equal_ranks=_ranks_are_equal(timed, sample, plain_ranks(task, sample)),
        peak_memory=peak,
        loop_queries=len(sample),
    )


def kalm_ranks(task: RankingTask) -> FloatArray:
    """Return the realistic ranks (B,) as `kalm evaluate links` computes them."""
    index = EntityIndex(task.entities, np.arange(len(task.entities)), fingerprint="")
    triples = task.graph.triples(task.split)
    sides = rank_links(task.graph, index, task.query, triples, device=task.query.device)
    return np.concatenate([side.realistic for side in sides])


def published_ranks(task: RankingTask, sample: IntArray, known: set[tuple[int, ...]]) -> FloatArray:
    """Return ranks of some queries as the published code computes them. METHOD.md §7.3, 7.4, 7.11.

    A loop asks of every entity whether it is known; known answers lose 1 instead of leaving the ranking, and ties are
    broken by the order of the sort.
    """
    ranks = []
    for (head, relation, target), query in zip(task.rows[sample].tolist(), task.query[sample], strict=True):
        scores = task.entities @ query
        for entity in range(len(task.entities)):
            if entity != target and (head, relation, entity) in known:
                scores[entity] -= 1
        order = torch.sort(scores, descending=True).indices
        ranks.append(1 + int((order == target).nonzero()[0, 0]))
    return np.array(ranks, dtype=np.float64)


def plain_ranks(task: RankingTask, sample: IntArray) -> FloatArray:
    """Return the realistic ranks of some queries, one by one."""
    ranks = []
    for (head, relation, target), query in zip(task.rows[sample].tolist(), task.query[sample], strict=True):
        scores = (task.entities @ query).cpu().numpy()
        left = np.delete(scores, np.setdiff1d(task.known.answers(head, relation), [target]))
        ranks.append(1 + np.sum(left > scores[target]) + (np.sum(left == scores[target]) - 1) / 2)
    return np.array(ranks)


def _ranks_are_equal(timed: dict[str, list[Timed[FloatArray]]], sample: IntArray, plain: FloatArray) -> bool:
    ours = timed["kalm"][-1].value
    pykeen = timed["pykeen"][-1].value if "pykeen" in timed else ours
    return np.array_equal(ours[sample], plain) and np.array_equal(ours, pykeen)


def whole_numbers(rows: int, width: int, draw: torch.Generator) -> Tensor:
    """Draw a matrix of small whole numbers, as float32."""
    return torch.randint(-LARGEST_VALUE, LARGEST_VALUE + 1, (rows, width), generator=draw).float()


def _ranking_peak(build: Callable[[], RankingTask], device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    task = build()
    square = torch.ones(2, 2, device=device)
    square @ square  # loads what the first product loads
    return peak_memory(lambda: kalm_ranks(task), device).peak_bytes
