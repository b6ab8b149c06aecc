"""Batches that are ready when a step begins: beside a GPU other processes build them while it computes."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TypeVar

import torch

from pykalm.errors import TrainingError
from pykalm.model.side_by_side import AHEAD

BUILDERS = 2
"""Processes that build: one keeps up with large steps. A thread would not, for it takes turns with the step's Python."""
SECONDS_BETWEEN_LOOKS = 0.5
Built = TypeVar("Built")


@contextmanager
def built_ahead(
    build: Callable[[int], Built], num_steps: int, *, start: int, device: torch.device
) -> Iterator[Callable[[int], Built]]:
    """Yield what returns `build(step)` for the steps start, start + 1, ... in this order.

    Beside an NVIDIA GPU forked processes build the next ones meanwhile, so that `build` must compute nothing there, where the
    system can fork; a CPU has no time for that. They end with the block, or soon after this process, however it ends. What
    `build` raises there is raised here; raises TrainingError where one of them is killed.
    """
    if device.type != "cuda" or "fork" not in get_all_start_methods():
        yield build
        return
    # Forked processes get `build` as it is; nothing of it is sent.
    with ProcessPoolExecutor(BUILDERS, get_context("fork"), _begin, (build, os.getpid())) as pool:
        to_come, waiting = iter(range(start, num_steps)), deque[Future[Built]]()

        def built(step: int) -> Built:
            while len(waiting) < AHEAD * BUILDERS and (next_step := next(to_come, None)) is not None:
                waiting.append(pool.submit(_build, next_step))
            return waiting.popleft().result()

        try:
            yield built
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process that builds batches was killed, as systems do where memory runs out. Free memory of the machine "
                "(not of the GPU), then go on with --resume."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_own_build: Callable[[int], Any]


def _begin(build: Callable[[int], Any], parent: int) -> None:
    """Begin as a process that builds: out of the group that a terminal or a launcher stops, and not without its parent."""
    global _own_build
    _own_build = build
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _build(step: int) -> Any:
    return _own_build(step)
