"""Run a function in several processes at once that know each other, as a launcher's do, on the CPU with gloo."""

import contextlib
import datetime
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Children fork from a server that has imported everything, so that a process costs a tenth of a second, not four.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.laws.common", "pykalm.api", "accelerate", "peft"])
SECONDS = 120


def run_ranks(
    count: int, work: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> list[Any]:
    """Return what `work(*arguments)`, a function of a module, returns in each of some processes; tensors as they are.

    environment: what a launcher would set besides the number of each. An error in one of them is raised here, and so is
    one that never ends.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workers = [
            PROCESSES.Process(target=_work, args=(folder, rank, count, work, arguments, environment or {}), daemon=True)
            for rank in range(count)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
            if worker.exitcode is None:
                worker.kill()
        results = [_read(folder / f"{rank}.pt") for rank in range(count)]
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [result["value"] for result in results]


def _work(
    folder: Path, rank: int, count: int, work: Callable[..., Any], arguments: tuple[Any, ...],
    environment: Mapping[str, str],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), **environment})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    try:
        result: Any = {"value": work(*arguments)}
    except Exception as error:
        result = f"process {rank}: {type(error).__name__}: {error}"
        torch.save(result, folder / f"{rank}.pt")
        raise
    torch.save(result, folder / f"{rank}.pt")
    with contextlib.suppress(RuntimeError):  # another one may have failed
        dist.barrier()
    dist.destroy_process_group()


def _read(file: Path) -> Any:
    return torch.load(file, weights_only=False) if file.is_file() else f"process {file.stem}: ended without a result"
