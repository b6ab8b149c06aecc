"""What a triple costs as batches and graphs grow: it must stay flat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pykalm.api import batch_builder
from pykalm.bench.machine import peak_memory
from pykalm.bench.plan import BATCHINGS, Workshop, generator
from pykalm.bench.ranking import whole_numbers
from pykalm.bench.timing import interleaved, time_call
from pykalm.evaluate.ranking import rank
from pykalm.graph.graph import IntArray
from pykalm.learn.batches import BatchBuilder, TripleOrder
from pykalm.learn.step import joint_gradient
from pykalm.model.run import Run

HOST_BATCHES = (64, 128, 256, 512, 1024, 2048)
STEP_BATCHES = (32, 64, 128, 256)
GRAPH_SHARES = (0.1, 0.5, 1.0)
GRAPHS = ("wn18rr", "fb15k-237", "wordnet30-full")
RANKED_ENTITIES = (10_000, 100_000, 1_000_000)
RANKED_WIDTH, RANKED_QUERIES = 64, 256
KNOWN_PER_QUERY = 5
BUILT_BATCHES = 3


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


def measure_scaling(workshop: Workshop) -> list[Scaling]:
    """Measure cost against batch size and against graph size, on the host, of whole steps, and of ranking."""
    plan = workshop.plan
    run = workshop.run(plan.graphs[0])
    host_batches = HOST_BATCHES[:2] if plan.quick else HOST_BATCHES
    step_batches = (8, 16) if plan.quick else STEP_BATCHES
    entities = RANKED_ENTITIES[:1] if plan.quick else RANKED_ENTITIES
    found = [_building_by_batch(run, batching, host_batches) for batching in BATCHINGS]
    found += _steps_by_batch(workshop, run, step_batches)
    graphs = plan.graphs if plan.quick else GRAPHS
    found += [_building_by_graph(workshop, name, batching) for name in graphs for batching in BATCHINGS]
    return [*found, _ranking_by_entities(workshop, entities)]


def _building_by_batch(run: Run, batching: str, sizes: Sequence[int]) -> Scaling:
    """Time the ordering and building of batches, on the host, per triple."""
    builder, triples = batch_builder(run), run.graph.triples("train")
    costs = {size: _building_seconds(builder, triples, batching, size, run.config.seed) for size in sizes}
    return Scaling.of(f"building a batch of {run.graph.name}, {batching}, by triples", "seconds per triple", costs)


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


def _steps_by_batch(workshop: Workshop, run: Run, sizes: Sequence[int]) -> list[Scaling]:
    """Time whole steps in one graph and take their peak memory, per triple; the sizes take turns."""
    builder, triples = batch_builder(run), run.graph.triples("train")
    peaks: dict[int, float] = {}

    def step(size: int, number: int) -> float:
        chosen = TripleOrder(triples, size, run.config.seed, "random").at(number)

        def whole_step() -> None:
            batch = builder.build(chosen, generator(run.config.seed, number, 6))
            joint_gradient(run.encoder, batch, run.config.objective, memory_tokens=batch.trie.num_nodes)

        run.encoder.train()
        # Timed inside: the watch over memory has a start and an end of its own, the same for small batches and large.
        measured = peak_memory(lambda: time_call(whole_step, workshop.device), workshop.device)
        run.encoder.zero_grad()
        peaks[size] = measured.peak_bytes / len(chosen)  # of the last round: the first one also loads what stays
        return measured.value.seconds / len(chosen)

    systems = {str(size): lambda number, size=size: step(size, number) for size in sizes}
    timed = interleaved(systems, repeats=1 if workshop.plan.quick else 2, device=workshop.device)
    seconds = {size: min(call.value for call in timed[str(size)]) for size in sizes}
    what = f"a step of {run.graph.name}, random, by triples"
    return [Scaling.of(what, "seconds per triple", seconds), Scaling.of(what, "bytes per triple", peaks)]


def _building_by_graph(workshop: Workshop, name: str, batching: str) -> Scaling:
    """Time ordering and building per triple on parts of a graph, by their number of triples."""
    run, size = workshop.run(name), workshop.batch_size
    triples, builder = run.graph.triples("train"), batch_builder(run)
    costs: dict[int, float] = {}
    for share in GRAPH_SHARES:
        chosen = generator(run.config.seed, 7).choice(len(triples), size=int(share * len(triples)), replace=False)
        part = triples[np.sort(chosen)]
        costs[len(part)] = _building_seconds(builder, part, batching, size, run.config.seed)
    what = f"building a batch of {size} of {run.graph.name}, {batching}, by the triples of the graph"
    return Scaling.of(what, "seconds per triple", costs)


def _ranking_by_entities(workshop: Workshop, sizes: Sequence[int]) -> Scaling:
    """Time ranking per query and entity."""
    costs = {size: _ranking_seconds(size, workshop) for size in sizes}
    return Scaling.of(
        f"ranking {RANKED_QUERIES} queries, width {RANKED_WIDTH}, by entities", "seconds per score", costs
    )


def _ranking_seconds(num_entities: int, workshop: Workshop) -> float:
    draw = torch.Generator().manual_seed(workshop.plan.seed)
    query, entities = (
        whole_numbers(rows, RANKED_WIDTH, draw).to(workshop.device) for rows in (RANKED_QUERIES, num_entities)
    )
    numbers = generator(workshop.plan.seed, 8)
    known = np.stack([numbers.choice(num_entities, KNOWN_PER_QUERY, replace=False) for _ in range(RANKED_QUERIES)])
    offsets = np.arange(RANKED_QUERIES + 1) * KNOWN_PER_QUERY

    def call(number: int) -> object:
        return rank(query, entities, row_of_entity=np.arange(num_entities), targets=known[:, 0],
                    known=(offsets, known.ravel()))  # fmt: skip

    timed = interleaved({"rank": call}, repeats=2, device=workshop.device)["rank"]
    return min(part.seconds for part in timed) / (RANKED_QUERIES * num_entities)
