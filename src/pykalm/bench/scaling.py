"""What a triple costs as batches and graphs grow: it must stay flat."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pykalm.api import batch_builder
from pykalm.bench.machine import peak_memory
from pykalm.bench.own_process import in_own_process
from pykalm.bench.plan import BATCHINGS, Plan, Workshop, generator
from pykalm.bench.ranking import whole_numbers
from pykalm.bench.timing import interleaved, time_call
from pykalm.evaluate.ranking import rank
from pykalm.graph.catalogue import list_graphs
from pykalm.graph.graph import IntArray
from pykalm.learn.batches import BatchBuilder, TripleOrder
from pykalm.learn.step import joint_gradient

HOST_BATCHES = (64, 128, 256, 512, 1024, 2048)
STEP_BATCHES = (32, 64, 128, 256)
GRAPH_SHARES = (0.1, 0.5, 1.0)
LARGE_GRAPH = "wordnet30-full"
"""Measured too where it lies in a folder of $KALM_DATA: it cannot be fetched."""
RANKED_ENTITIES = (10_000, 100_000, 1_000_000)
RANKED_WIDTH, RANKED_QUERIES = 64, 256
KNOWN_PER_QUERY = 5
BUILT_BATCHES = 3
LOADED_BY = 1000
"""Entities, or triples, of a call that only loads code."""
PAGE = 4096
"""Bytes that are the least memory; a slope has no logarithm of 0."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scaling:
    """Hold what a unit costs (seconds or bytes) at growing sizes.

    slope: of log cost against log size, fitted by least squares: 0 is flat, 1 grows with the size.
    """

    what: str
    unit: str
    sizes: list[int]
    cost: list[float]
    slope: float

    @staticmethod
    def of(what: str, unit: str, costs: dict[int, float]) -> "Scaling":
        """Fit the slope of costs by size; of a single size it is 0."""
        sizes, cost = list(costs), list(costs.values())
        slope = float(np.polyfit(np.log(sizes), np.log(cost), 1)[0]) if len(sizes) > 1 else 0.0
        return Scaling(what, unit, sizes, cost, slope)


Part = Callable[[Workshop], list[Scaling]]


def scaling_parts(plan: Plan) -> list[tuple[str, Part]]:
    """Return what is measured against batch size and against graph size, each with a word for it."""
    first = plan.graphs[0]
    host = HOST_BATCHES[:2] if plan.quick else HOST_BATCHES
    steps = (8, 16) if plan.quick else STEP_BATCHES
    entities = RANKED_ENTITIES[:1] if plan.quick else RANKED_ENTITIES
    parts: list[tuple[str, Part]] = []
    for batching in BATCHINGS:
        parts.append((f"building, {batching}", partial(_building_by_batch, graph=first, batching=batching, sizes=host)))
        parts.append((f"steps, {batching}", partial(_steps_by_batch, graph=first, batching=batching, sizes=steps)))
    graphs = [*plan.graphs, *([LARGE_GRAPH] if plan.graphs == Plan.graphs and _is_here(LARGE_GRAPH) else [])]
    for graph in graphs:
        parts += [
            (f"building of {graph}, {name}", partial(_building_by_graph, graph=graph, batching=name))
            for name in BATCHINGS
        ]
    return [*parts, ("ranking", partial(_ranking_by_entities, sizes=entities))]


def _is_here(graph: str) -> bool:
    """Return whether a graph that cannot be fetched is here, and say so where it is not."""
    is_here = any(entry.name == graph and entry.folder is not None for entry in list_graphs())
    if not is_here:
        log.warning("kalm: %s is in none of the folders of $KALM_DATA: scaling is measured without it.", graph)
    return is_here


def _building_by_batch(workshop: Workshop, *, graph: str, batching: str, sizes: Sequence[int]) -> list[Scaling]:
    """Time the ordering and building of batches, on the host, per triple."""
    run = workshop.run(graph)
    builder, triples = batch_builder(run), run.graph.triples("train")
    sizes = _up_to(len(triples), sizes)
    costs = {size: _building_seconds(builder, triples, batching, size, run.config.seed) for size in sizes}
    return [Scaling.of(f"building a batch of {run.graph.name}, {batching}, by triples", "seconds per triple", costs)]


def _up_to(most: int, sizes: Sequence[int]) -> list[int]:
    """Return the sizes that a graph of so many triples has, its own where it is smaller than all."""
    return [size for size in sizes if size <= most] or [most]


def _building_seconds(builder: BatchBuilder, triples: IntArray, batching: str, batch_size: int, seed: int) -> float:
    """Return the seconds per triple that an epoch's order and some batches take; texts are tokenised before."""
    cpu = torch.device("cpu")
    builder.build(triples[:batch_size], generator(seed, 5))
    order = TripleOrder(triples, batch_size, seed, batching)
    ordered = time_call(lambda: order.at(0), cpu).seconds / len(triples)

    def build_some() -> int:
        steps = (order.at(number % order.steps_per_epoch) for number in range(1, 1 + BUILT_BATCHES))
        return sum(builder.build(batch, generator(seed, 5)).num_triples for batch in steps)

    built = time_call(build_some, cpu)
    return ordered + built.seconds / built.value


def _steps_by_batch(workshop: Workshop, *, graph: str, batching: str, sizes: Sequence[int]) -> list[Scaling]:
    """Time whole steps in one graph and take their peak memory, per triple; the sizes take turns."""
    run = workshop.run(graph)
    builder, triples = batch_builder(run), run.graph.triples("train")
    sizes = _up_to(len(triples), sizes)
    peaks: dict[int, float] = {}

    def step(size: int, number: int) -> float:
        chosen = TripleOrder(triples, size, run.config.seed, batching).at(number)

        def whole_step() -> None:
            batch = builder.build(chosen, generator(run.config.seed, number, 6))
            joint_gradient(run.encoder, batch, run.config.objective, memory_tokens=batch.trie.num_nodes)

        run.encoder.train()
        # Timed inside: the watch over memory has a start and an end of its own, the same for small batches and large.
        measured = peak_memory(lambda: time_call(whole_step, workshop.device), workshop.device)
        run.encoder.zero_grad()
        # Of the last round: the first one also loads what stays.
        peaks[size] = max(PAGE, measured.peak_bytes) / len(chosen)
        return measured.value.seconds / len(chosen)

    systems = {str(size): lambda number, size=size: step(size, number) for size in sizes}
    timed = interleaved(systems, repeats=1 if workshop.plan.quick else 2, device=workshop.device)
    seconds = {size: min(call.value for call in timed[str(size)]) for size in sizes}
    what = f"a step of {run.graph.name}, {batching}, by triples"
    return [Scaling.of(what, "seconds per triple", seconds), Scaling.of(what, "bytes per triple", peaks)]


def _building_by_graph(workshop: Workshop, *, graph: str, batching: str) -> list[Scaling]:
    """Time ordering and building per triple on parts of a graph, by their number of triples, and take its memory."""
    run, size = workshop.run(graph), workshop.batch_size
    triples, builder = run.graph.triples("train"), batch_builder(run)
    seconds: dict[int, float] = {}
    memory: dict[int, float] = {}
    for size_of_part in sorted({max(1, int(share * len(triples))) for share in GRAPH_SHARES}):
        chosen = generator(run.config.seed, 7).choice(len(triples), size=size_of_part, replace=False)
        part = triples[np.sort(chosen)]
        seconds[len(part)] = _building_seconds(builder, part, batching, size, run.config.seed)
        memory[len(part)] = in_own_process(partial(_ordering_peak, part, batching, size)) / len(part)
    where = f"of {run.graph.name}, {batching}, by the triples of the graph"
    return [
        Scaling.of(f"building a batch of {size} {where}", "seconds per triple", seconds),
        Scaling.of(f"ordering an epoch {where}", "bytes per triple", memory),
    ]


def _ordering_peak(triples: IntArray, batching: str, batch_size: int) -> int:
    """Return the most memory that ordering all batches of an epoch takes, a page at least."""
    _every_batch(TripleOrder(triples[:LOADED_BY], batch_size, 1, batching))  # loads what the first call loads
    call = partial(_every_batch, TripleOrder(triples, batch_size, 0, batching))
    return max(PAGE, peak_memory(call, torch.device("cpu")).peak_bytes)


def _every_batch(order: TripleOrder) -> None:
    for step in range(order.steps_per_epoch):
        order.at(step)


def _ranking_by_entities(workshop: Workshop, *, sizes: Sequence[int]) -> list[Scaling]:
    """Time ranking per query and entity, and take its memory above the vectors."""
    what = f"ranking {RANKED_QUERIES} queries, width {RANKED_WIDTH}, by entities"
    seed, device = workshop.plan.seed, workshop.device
    seconds = {size: _ranking_seconds(size, seed, device) for size in sizes}
    threads = torch.get_num_threads()
    memory = {size: float(in_own_process(partial(_ranking_peak, size, seed, device, threads))) for size in sizes}
    return [
        Scaling.of(what, "seconds per score", seconds),
        Scaling.of(what, "bytes above the vectors", memory),
    ]


def _ranking_call(num_entities: int, seed: int, device: torch.device) -> Callable[[], object]:
    """Return a call that ranks some queries among so many entities."""
    draw = torch.Generator().manual_seed(seed)
    query, entities = (whole_numbers(rows, RANKED_WIDTH, draw).to(device) for rows in (RANKED_QUERIES, num_entities))
    numbers = generator(seed, 8)
    known = np.stack([numbers.choice(num_entities, KNOWN_PER_QUERY, replace=False) for _ in range(RANKED_QUERIES)])
    offsets, row_of_entity = np.arange(RANKED_QUERIES + 1) * KNOWN_PER_QUERY, np.arange(num_entities)

    def call() -> object:
        return rank(query, entities, row_of_entity=row_of_entity, targets=known[:, 0], known=(offsets, known.ravel()),
                    device=device)  # fmt: skip

    return call


def _ranking_seconds(num_entities: int, seed: int, device: torch.device) -> float:
    call = _ranking_call(num_entities, seed, device)
    timed = interleaved({"rank": lambda number: call()}, repeats=2, device=device)["rank"]
    return min(part.seconds for part in timed) / (RANKED_QUERIES * num_entities)


def _ranking_peak(num_entities: int, seed: int, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    _ranking_call(LOADED_BY, seed, device)()  # loads what the first call loads
    return max(PAGE, peak_memory(_ranking_call(num_entities, seed, device), device).peak_bytes)
