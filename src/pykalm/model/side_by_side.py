"""Passes side by side: on a CPU every thread computes one of its own, which wastes less than all threads at every product."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
"""Results that may wait to be taken, for each of those at work: a slow piece shall not keep the others waiting."""


def side_by_side(
    work: Callable[[T], R], pieces: Sequence[T], *, at_once: int, stop: Callable[[], None] = lambda: None
) -> Generator[R]:
    """Yield work(piece) of every piece, in their order, with up to at_once of them computed at the same time.

    PyTorch's threads are shared out among those at work. Gradients are recorded in them where they are here; an error in
    a piece is raised here, once no other is at work. Who may not come to the end closes the generator (contextlib.closing):
    that too returns once none is at work. stop: is called first then, as at the end, where a piece is long.
    """
    threads = torch.get_num_threads()
    workers = num_workers(min(at_once, len(pieces)))
    if workers <= 1:
        yield from map(work, pieces)
        return
    records = torch.is_grad_enabled()

    def one(piece: T) -> R:
        with torch.set_grad_enabled(records):
            return work(piece)

    pool, waiting = _pool(workers, threads // workers), deque[Future[R]]()
    try:
        for piece in pieces:
            waiting.append(pool.submit(one, piece))
            if len(waiting) == AHEAD * workers:
                result = waiting[0].result()  # one that is waited for stays among those at work
                waiting.popleft()
                yield result
        while waiting:
            result = waiting[0].result()
            waiting.popleft()
            yield result
    finally:
        stop()
        for future in waiting:
            future.cancel()
        wait(waiting)


@torch.no_grad()
def moves_what_is_shared(model: nn.Module, read: Callable[[], object]) -> bool:
    """Return whether `read`, a short pass of a model in its present mode, moves PyTorch's generator or what modules hold.

    So does a dropout of the model's own in training, RWKV, which scales its weights as it is first read after training,
    longrope, which sets its frequencies by the length of each text, and RecurrentGemma, whose modules hold the cache. Such
    passes may not stand side by side.
    """
    before = _held(model)
    with (
        torch.random.fork_rng(devices=[]),
        torch.compiler.set_stance("force_eager"),
    ):  # nothing is compiled for so little
        generator = torch.get_rng_state()
        read()
        draws = not torch.equal(torch.get_rng_state(), generator)
    after = _held(model)
    return (
        draws
        or len(before) != len(after)
        or any(
            one is not other or version != later for (one, version), (other, later) in zip(before, after, strict=True)
        )
    )


def _held(model: nn.Module) -> list[tuple[Any, int]]:
    """Return all weights, buffers and other tensors that a model's modules hold, with how often each was written to."""
    attributes = (value for module in model.modules() for _, value in sorted(vars(module).items()))
    plain = (value for value in attributes if value is None or isinstance(value, torch.Tensor))
    return [(value, _writes(value)) for value in chain(model.parameters(), model.buffers(), plain)]


def _writes(value: torch.Tensor | None) -> int:
    """Return how often a tensor was written to, as far as that is counted."""
    return 0 if value is None or value.is_inference() else value._version


def num_workers(wanted: int) -> int:
    """Return how many work at once, at most as many as wanted: as many as PyTorch has threads, or else a power of two.

    A pool is kept for every number of workers, so there shall be few such numbers.
    """
    threads = torch.get_num_threads()
    return threads if wanted >= threads else 1 << max(0, wanted.bit_length() - 1)


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return workers, each of which computes with so many of PyTorch's threads."""
    ready, before = threading.Barrier(workers + 1), torch.get_num_threads()

    def take_threads() -> None:
        torch.get_num_threads()  # PyTorch hands a new thread its number when it is first asked, over what was set before
        torch.set_num_threads(threads)
        ready.wait()

    pool = ThreadPoolExecutor(workers, "kalm pass", initializer=take_threads)
    try:
        for _ in range(workers):
            pool.submit(lambda: None)
        ready.wait()
    except BaseException:  # a thread that cannot be had, or an interrupt: let none wait forever
        ready.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(before)  # what a worker set would be handed to all new threads
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a copy of this process has none of its threads
