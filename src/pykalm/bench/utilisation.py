"""Useful operations per second of a training step, beside the best that a matrix product reaches on the same machine."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pykalm.bench.flops import model_cost, useful_flops
from pykalm.bench.machine import matmul_peak
from pykalm.bench.plan import BATCHINGS, Workshop
from pykalm.bench.timing import Spread, interleaved, paired_ratio
from pykalm.bench.training import COMPILED, KalmSystem, maybe_compiled, take_plainly

WARMUPS = 3
"""Steps before those that count. On a CPU each thread holds what its chunks keep; until each has held the most that may come
to it, memory is asked of the system, page by page: over a third of a first step's processor time (docs/log.md)."""


@dataclass(frozen=True)
class Utilisation:
    """Hold the share of the peak that kalm's useful operations reach, by way of batching; how they are counted: flops.py.

    Each way is there as it is by default and, where the machine can, with compiled layers: `random` and `random, compiled`.
    """

    graph: str
    share: dict[str, Spread]
    useful_flops_per_second: dict[str, Spread]
    peak_flops_per_second: Spread

    def lowest(self, *, compiled: bool) -> float | None:
        """Return the lower share of the ways of batching, with compiled layers or without; None where none was measured."""
        found = [spread.median for name, spread in self.share.items() if name.endswith(COMPILED) == compiled]
        return min(found, default=None)


def measure_utilisation(workshop: Workshop, graph: str) -> Utilisation:
    """Measure steps and matrix products in turn; each step is held against the best product of its round."""
    run = workshop.run(graph)
    cost, device = model_cost(run.encoder), workshop.device
    ways = {batching: KalmSystem.build(run, batching, packed=True) for batching in BATCHINGS}

    def peak(number: int) -> float:
        return matmul_peak(device, width=run.encoder.width, dtype=run.encoder.compute_dtype)

    with maybe_compiled(workshop, run.encoder) as compiled:
        systems: dict[str, Callable[[int], Any]] = {}
        for batching, system in ways.items():
            systems[batching] = partial(take_plainly, run.encoder, system)
            if compiled:
                systems[f"{batching}, {COMPILED}"] = system
        timed = interleaved({**systems, "peak": peak}, repeats=workshop.plan.repeats, device=device, warmups=WARMUPS)
    peaks = [call.value for call in timed["peak"]]
    flops = {name: [useful_flops(cost, step.value.batch) / step.seconds for step in timed[name]] for name in systems}
    share = {name: paired_ratio(speeds, peaks) for name, speeds in flops.items()}
    speeds = {name: Spread.of(speeds) for name, speeds in flops.items()}
    return Utilisation(run.graph.name, share, speeds, Spread.of(peaks))
