"""The processes of a launch, taken together: who is main, sums, gathers, shares of work. In one process all are no-ops.

Every function here with "all" in its first sentence is called by every process, in the same order, or they wait forever.
docs/many-processes.md says how they are launched.
"""

import atexit
import contextlib
import datetime
import heapq
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from pykalm.errors import KalmError, ProcessError, UsageError
from pykalm.launch import is_asked_for, launched_local_rank, launched_rank, num_launched
from pykalm.memory import is_out_of_memory

T = TypeVar("T")
IntArray = npt.NDArray[np.int64]

# Long enough for the others to wait while one downloads a model or writes a large state.
PATIENCE = datetime.timedelta(hours=2)
ROWS_AT_ONCE = 1 << 14
NUMBERS_AT_ONCE = 1 << 25


def join(device_name: str) -> None:
    """Let all processes of the launch meet: NCCL where the device (auto, cpu, cuda) is a GPU, else gloo.

    Does nothing in one process, or the second time. Raises UsageError for a launch that kalm cannot serve.
    """
    if num_launched() == 1 or dist.is_initialized():
        return
    _require_servable(device_name)
    if launched_rank() > 0:
        logging.getLogger("pykalm").setLevel(logging.ERROR)  # one process says it for all
    PartialState(cpu=device_name == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    atexit.register(_leave)


def count() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this is the process that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Let all processes wait for each other."""
    if count() > 1:
        with _explained():
            dist.barrier()


def share_out(costs: IntArray) -> IntArray:
    """Return the process (N,) that takes each of N pieces of work, so that all have about the same to do.

    The costliest piece goes to the process with least to do: the same answer in every process, from the costs alone.
    """
    owners = np.zeros(len(costs), dtype=np.int64)
    loads = [(0, process) for process in range(count())]
    if len(loads) > 1:
        for piece in np.argsort(-costs, kind="stable").tolist():
            load, process = heapq.heappop(loads)
            owners[piece] = process
            heapq.heappush(loads, (load + int(costs[piece]), process))
    return owners


def own_part(work: Iterable[T]) -> list[T]:
    """Return the pieces of work that this process does of those that all know, each as costly as the other."""
    return list(work)[rank() :: count()]


def gather_rows(own: Tensor, owners: IntArray) -> Tensor:
    """Return the rows (N, D) of all processes; owners (N,) says whose row each is. METHOD.md §7.13.

    own (n, D): the rows of this process in their order, on any device; so is the result. Its own rows keep their graph,
    those of the others are values.
    """
    assert len(own) == int((owners == rank()).sum())
    if count() == 1:
        return own
    places = [torch.from_numpy(np.flatnonzero(owners == process)) for process in range(count())]
    gathered = own.new_empty(len(owners), *own.shape[1:])
    for start in range(0, max(map(len, places)), ROWS_AT_ONCE):
        width = min(ROWS_AT_ONCE, max(map(len, places)) - start)
        mine = own.detach()[start : start + width].to(device())
        sent = torch.cat([mine, mine.new_zeros(width - len(mine), *own.shape[1:])])
        parts = [torch.empty_like(sent) for _ in range(count())]
        with _explained():
            dist.all_gather(parts, sent)
        for part, place in zip(parts, places, strict=True):
            chosen = place[start : start + width]
            gathered[chosen.to(own.device)] = part[: len(chosen)].to(own.device)
    gathered[places[rank()].to(own.device)] = own
    return gathered


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace each of some tensors by its sum over all processes, many small ones in one message."""
    if count() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with _explained():
            dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_counts(counts: IntArray) -> IntArray:
    """Return the sum of whole numbers over all processes."""
    if count() == 1:
        return counts
    summed = torch.from_numpy(counts).to(device())
    sum_in_place([summed])
    return summed.cpu().numpy()


def any_of(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is True in any of all processes."""
    if count() == 1:
        return list(flags)
    raised = torch.tensor(list(flags), dtype=torch.float32, device=device())
    with _explained():
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def gather(value: T) -> list[T]:
    """Return the values (any that can be pickled) of all processes, by their numbers."""
    if count() == 1:
        return [value]
    values: list[T | None] = [None] * count()
    with _explained():
        dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def on_main(work: Callable[[], T]) -> T:
    """Let the main process do what only one may do, such as writing; all return its result or raise its error."""
    if count() == 1:
        return work()
    outcome: list[object] = [None, None]
    error: Exception | None = None
    if is_main():
        try:
            outcome[0] = work()
        except Exception as raised:
            error, outcome[1] = raised, _portable(raised)
    with _explained():
        dist.broadcast_object_list(outcome)
    if error is None and isinstance(outcome[1], Exception):
        error = outcome[1]
    if error is not None:
        raise error
    return outcome[0]  # type: ignore[return-value]


@contextlib.contextmanager
def holding(resource: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Let the main process hold a resource, such as a lock, while all do the block; none does where it cannot be had."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(resource())

        on_main(take)
        yield


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Let this process compute with all cores that it may use, while the others of its machine wait for it."""
    before = torch.get_num_threads()
    if count() > 1:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(before, usable))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raise in all processes what one of them raises in the block, so that no other waits for it in vain.

    The block itself must not talk to the others.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors = gather(None if error is None else _portable(error))
    error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error


@contextlib.contextmanager
def one_per_machine_first() -> Iterator[None]:
    """Let one process of every machine do the block before all others there, as to fill a cache that they then read."""
    if launched_local_rank() > 0:
        wait()
    try:
        yield
    finally:
        if launched_local_rank() == 0:
            wait()


def may_report_failure() -> bool:
    """Return whether this process is the first that fails; the others fail for the same reason, or because of it."""
    if not dist.is_initialized():
        return launched_rank() == 0
    atexit.unregister(_leave)
    try:
        first: bool = dist.distributed_c10d._get_default_store().add("kalm failures", 1) == 1
    except RuntimeError:  # the process that keeps the count has gone, after its own report
        return False
    return first


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _require_servable(device_name: str) -> None:
    """Raise UsageError for a launch with a device or a way of sharing work that kalm does not have."""
    for what in ("DEEPSPEED", "MEGATRON_LM"):
        if is_asked_for(what):
            raise UsageError(
                f"wanted a launch of plain processes or with --use_fsdp --fsdp_version 2, found {what.lower()}. "
                "docs/many-processes.md has the command lines."
            )
    has_gpu = torch.cuda.is_available()
    if device_name not in ("auto", "cpu", "cuda") or (
        device_name == "auto" and not has_gpu and torch.backends.mps.is_available()
    ):
        raise UsageError(f"wanted device cpu or cuda for several processes, found {device_name}. Launch one process.")
    gpus, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device_name != "cpu" and has_gpu and wanted > gpus:
        raise UsageError(
            f"wanted a GPU for each of the {wanted} processes of this machine, found {gpus}. Launch {gpus}, or set "
            "training.device=cpu."
        )


def device() -> torch.device:
    """Return the device whose tensors the processes can send: the GPU of this one under NCCL, else the CPU."""
    over_gpus = dist.is_initialized() and "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if over_gpus else torch.device("cpu")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups of one dtype and of bounded size."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            bucket.append(tensor)
            if sum(other.numel() for other in bucket) >= NUMBERS_AT_ONCE:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _portable(error: Exception) -> Exception:
    """Return an error as another process can have it: itself, or its words where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return (
            KalmError(str(error)) if isinstance(error, KalmError) else RuntimeError(f"{type(error).__name__}: {error}")
        )
    return error


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn a broken connection into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProcessError(
            f"wanted to hear from the other processes, found that one has ended or cannot be reached: {found}. Its own "
            "message, where it had time for one, says why; what was saved before is whole."
        ) from error
