"""Time several systems in turn, so that what slows the machine for a while slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Hold the median of a measurement with the smallest and the largest of its repeats."""

    median: float
    smallest: float
    largest: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Summarise the repeats of a measurement, at least one."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timed(Generic[T]):
    """Hold what a call returned and the seconds it took."""

    seconds: float
    value: T


def interleaved(
    systems: Mapping[str, Callable[[int], T]], *, repeats: int, device: torch.device, warmups: int = 1
) -> dict[str, list[Timed[T]]]:
    """Call every system once a round, in the order given, A B C A B C; return the timed calls of each, by round.

    A system is told the number of its call, from 0 on; the first `warmups` rounds are not kept. The work queued on
    a GPU is waited for before and after each call.
    """
    kept: dict[str, list[Timed[T]]] = {name: [] for name in systems}
    for number in range(warmups + repeats):
        for name, system in systems.items():
            timed = time_call(lambda system=system, number=number: system(number), device)  # type: ignore[misc]
            if number >= warmups:
                kept[name].append(timed)
    return kept


def time_call(call: Callable[[], T], device: torch.device) -> Timed[T]:
    """Call and time until the device has done all that was asked of it."""
    synchronise(device)
    started = time.perf_counter()
    value = call()
    synchronise(device)
    return Timed(time.perf_counter() - started, value)


def synchronise(device: torch.device) -> None:
    """Wait for the work that is queued on a GPU; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Spread:
    """Return first / second round by round: both were measured within one round, under the same weather."""
    return Spread.of([a / b for a, b in zip(first, second, strict=True)])
