"""Queries ranked per second: kalm beside the published loop and beside PyKEEN's evaluator, on the same vectors.

The vectors hold whole numbers, so that every score is exact in float32 however a matrix product is cut up, and many are
equal: ranks can be compared to the last tie.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pykalm.bench.machine import peak_memory
from pykalm.bench.plan import Workshop, generator
from pykalm.bench.timing import Spread, interleaved, paired_ratio
from pykalm.evaluate.ranking import FloatArray, rank
from pykalm.graph.graph import IntArray, KnowledgeGraph
from pykalm.graph.known import KnownAnswers, known_answers

T = TypeVar("T")

LARGEST_VALUE = 4
"""Bound of a vector's whole numbers; over a thousand columns scores stay far below 2^24, where float32 is exact."""


@dataclass(frozen=True, eq=False)
class RankingTask:
    """Hold queries (B, D) and entities (E, D), the rows (B, 3) that are asked, N forward and N inverse, and the filter."""

    query: Tensor
    entities: Tensor
    rows: IntArray
    known: KnownAnswers

    @staticmethod
    def build(graph: KnowledgeGraph, *, width: int, seed: int, device: torch.device) -> "RankingTask":
        """Draw vectors for the test queries of a graph (of train where it has no test) and for all entities."""
        rows = graph.both_directions("test" if "test" in graph.splits else "train")
        generator = torch.Generator().manual_seed(seed)
        entities = whole_numbers(graph.num_entities, width, generator)
        query = entities[torch.from_numpy(rows[:, 2])] + whole_numbers(len(rows), width, generator)
        return RankingTask(query.to(device), entities.to(device), rows, known_answers(graph))

    @property
    def num_queries(self) -> int:
        """Return B."""
        return len(self.rows)


@dataclass(frozen=True)
class RankingSpeed:
    """Hold the measurements on one graph.

    triples_per_second: test triples, each asked in both directions; equal_ranks: whether the realistic ranks are those of a
    plain loop on the sampled queries; peak_bytes: the most memory above the vectors, in a process of its own.
    """

    graph: str
    num_entities: int
    num_queries: int
    width: int
    triples_per_second: Spread
    published_triples_per_second: Spread
    ratio_to_published: Spread
    equal_ranks: bool
    peak_bytes: int
    loop_queries: int


def measure_ranking(workshop: Workshop, graph: str) -> RankingSpeed:
    """Measure filtered ranking of a graph's test queries, both directions, with vectors as wide as the model's."""
    plan, device, loaded = workshop.plan, workshop.device, workshop.graph(graph)
    width = workshop.width
    build = partial(RankingTask.build, loaded, width=width, seed=plan.seed, device=device)
    peak = in_own_process(partial(_ranking_peak, build, device, torch.get_num_threads()))
    task = build()
    sample = generator(plan.seed, 4).choice(
        task.num_queries, size=min(plan.loop_queries, task.num_queries), replace=False
    )
    known = {tuple(row) for split in loaded.splits for row in loaded.both_directions(split).tolist()}
    timed = interleaved(
        {"kalm": lambda number: kalm_ranks(task), "published": lambda number: published_ranks(task, sample, known)},
        repeats=plan.repeats,
        device=device,
    )
    kalm = [task.num_queries / 2 / call.seconds for call in timed["kalm"]]
    published = [len(sample) / 2 / call.seconds for call in timed["published"]]
    return RankingSpeed(
        graph=loaded.name,
        num_entities=loaded.num_entities,
        num_queries=task.num_queries,
        width=width,
        triples_per_second=Spread.of(kalm),
        published_triples_per_second=Spread.of(published),
        ratio_to_published=paired_ratio(kalm, published),
        equal_ranks=bool(np.array_equal(timed["kalm"][-1].value[sample], plain_ranks(task, sample))),
        peak_bytes=peak,
        loop_queries=len(sample),
    )


def kalm_ranks(task: RankingTask) -> FloatArray:
    """Return the realistic ranks (B,) as `kalm evaluate links` computes them."""
    return rank(
        task.query,
        task.entities,
        row_of_entity=np.arange(len(task.entities)),
        targets=task.rows[:, 2],
        known=task.known.lookup(task.rows[:, 0], task.rows[:, 1]),
    ).realistic


def published_ranks(task: RankingTask, sample: IntArray, known: set[tuple[int, ...]]) -> FloatArray:
    """Return ranks as the published code computes them: a loop over all entities for every query. METHOD.md §7.3, 7.4, 7.11.

    Known answers lose 1 instead of leaving the ranking, and ties are broken by the order of the sort.
    """
    ranks = []
    for head, relation, target, query in zip(*task.rows[sample].T.tolist(), task.query[sample], strict=True):
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
        others = np.setdiff1d(task.known.answers(head, relation), [target])
        left = np.delete(scores, others)
        ranks.append(1 + np.sum(left > scores[target]) + (np.sum(left == scores[target]) - 1) / 2)
    return np.array(ranks)


def whole_numbers(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix of small whole numbers, as float32."""
    return torch.randint(-LARGEST_VALUE, LARGEST_VALUE + 1, (rows, width), generator=generator).float()


def in_own_process(call: Callable[[], T]) -> T:
    """Call in a fresh process, whose memory nobody else has used."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call).result()


def _ranking_peak(build: Callable[[], RankingTask], device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    task = build()
    kalm_ranks(
        RankingTask(task.query[:2], task.entities[:2], task.rows[:2] * 0, task.known)
    )  # loads what is loaded once
    return peak_memory(lambda: kalm_ranks(task), device).peak_bytes
