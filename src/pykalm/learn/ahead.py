"""Batches that are ready when a step begins: beside a GPU other processes build them while it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_all_start_methods
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

BUILDERS = 2
"""Processes that build: one keeps up with large steps. A thread would not, for it takes turns with the step's Python."""
Built = TypeVar("Built")


@contextmanager
def built_ahead(
    build: Callable[[int], Built], num_steps: int, *, start: int, device: torch.device
) -> Iterator[Callable[[int], Built]]:
    """Yield what returns `build(step)` for the steps start, start + 1, ... in this order.

    Beside an NVIDIA GPU forked processes build the next ones meanwhile, so that `build` must compute nothing there, where the
    system can fork; a CPU has no time for that.
    """
    if device.type != "cuda" or "fork" not in get_all_start_methods():
        yield build
        return
    loader = DataLoader(
        _Steps(build, num_steps),
        sampler=range(start, num_steps),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=BUILDERS,
        multiprocessing_context="fork",
        pin_memory=torch.cuda.is_available(),  # then a thread of its own receives them
        generator=torch.Generator(),  # not the one that a training draws from
    )
    following = iter(loader)  # whose processes end with it
    yield lambda step: next(following)


class _Steps(Dataset[Built]):
    """Build the batch of a step where it is asked for."""

    def __init__(self, build: Callable[[int], Built], num_steps: int) -> None:
        self.build, self.num_steps = build, num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Built:
        return self.build(step)


def _as_it_is(built: Built) -> Built:
    return built
