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


def side_by_side(work: Callable[[T], R], pieces: Sequence[T], *, at_once: int) -> Generator[R]:
    """Yield work(piece) of every piece, in their order, with up to at_once of them computed at the same time.

    PyTorch's threads are shared out among those at work. Gradients are recorded in them where they are here; an error in
    a piece is raised here, once no other is at work. Who may not come to the end closes the generator (contextlib.closing):
    that too returns once none is at work.
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
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


@torch.no_grad()
def moves_what_is_shared(causal_lm: Any) -> bool:
    """Return whether passes of a model in its present mode move PyTorch's generator, a weight or a buffer; tried on two tokens.

    So does a dropout of the model's own in training, RWKV, which scales its weights as it is first read after training, and
    longrope, which sets its frequencies by the length of each text. Such passes may not stand side by side.
    """
    before = _shared_state(causal_lm)
    with (
        torch.random.fork_rng(devices=[]),
        torch.compiler.set_stance("force_eager"),
    ):  # nothing is compiled for two tokens
        generator = torch.get_rng_state()
        causal_lm.base_model(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False)
        draws = not torch.equal(torch.get_rng_state(), generator)
    return draws or before != _shared_state(causal_lm)


def _shared_state(model: nn.Module) -> list[tuple[int, int]]:
    """Return where all weights and buffers are, and how often each was written to."""
    held = chain(model.parameters(), model.buffers())
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in held]


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
