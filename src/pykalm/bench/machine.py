"""What the measurements ran on, how fast its matrix products are, and how much memory something takes at its peak."""

import ctypes
import gc
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, TypeVar

import torch

from pykalm.bench.timing import time_call
from pykalm.model.products import products
from pykalm.model.resident import resident_bytes

T = TypeVar("T")

PACKAGES = ("pykalm", "torch", "transformers", "peft", "numpy", "pykeen")
SQUARES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
ROWS = {"cpu": (512, 2048), "cuda": (8192, 32768)}
SECONDS_A_SHAPE = {"cpu": 0.4, "cuda": 0.1}
SAMPLE_SECONDS = 0.002
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names that glibc's mallopt has for these numbers."""


@dataclass(frozen=True)
class Machine:
    """Name what the figures belong to."""

    device: str
    processor: str
    threads: int
    python: str
    packages: dict[str, str]


def describe_machine(device: torch.device) -> Machine:
    """Describe this machine without naming it."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Machine(name, _processor(), torch.get_num_threads(), platform.python_version(), versions)


def _processor() -> str:
    """Return the name of the processor, and of the instructions that matter for bfloat16."""
    name, flags = platform.processor() or platform.machine(), ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        name = found.get("model name", name)
        flags = " ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in found.get("flags", "").split())
    return f"{name} ({flags})" if flags else name


def matmul_peak(device: torch.device, *, width: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the best operations per second of matrix products: squares, and those of a model of a width."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    shapes = [(size, size, size) for size in SQUARES[kind]]
    shapes += [
        (rows, *sides) for rows in ROWS[kind] for sides in ((width, width), (width, 4 * width), (4 * width, width))
    ]
    return max(_product_speed(shape, device, dtype, SECONDS_A_SHAPE[kind]) for shape in shapes)


def _product_speed(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Return the operations per second of the fastest of several products of one shape."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    ways = (torch.nn.functional.linear, products) if dtype == torch.float32 else (torch.nn.functional.linear,)
    end, best = time.perf_counter() + seconds, float("inf")
    calls = 0
    while calls < 3 or time.perf_counter() < end:
        best = min(best, *(time_call(partial(multiply, left, right), device).seconds for multiply in ways))
        calls += 1
    return 2 * rows * inner * columns / best


@dataclass(frozen=True)
class Measured(Generic[T]):
    """Hold what a call returned and the memory that it took above what was held before, in bytes."""

    peak_bytes: int
    value: T


def peak_memory(call: Callable[[], T], device: torch.device) -> Measured[T]:
    """Call and measure the most memory that was held meanwhile, above what was held before.

    On a GPU what its allocator held; else the resident set of this process, looked at every two milliseconds.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        value = call()
        torch.cuda.synchronize(device)
        return Measured(torch.cuda.max_memory_allocated(device) - before, value)
    _give_back_freed_memory()
    with _ResidentPeak() as peak:
        value = call()
    return Measured(peak.above, value)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what comes next, on a CPU.

    A training comes to that by itself after its first step. Systems that take turns do not: each hands its memory back, and
    the next one begins with a million page faults, which a large step pays for most (docs/log.md).
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def _give_back_freed_memory() -> None:
    """Let the C library return what is freed, where it can be told to: what it keeps would hide what a call takes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _ResidentPeak:
    """Watch the resident set of this process from a thread."""

    def __enter__(self) -> "_ResidentPeak":
        self.before = self.largest = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.largest = max(self.largest, resident_bytes())

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.largest = max(self.largest, resident_bytes())

    @property
    def above(self) -> int:
        """Return the largest set seen, above the one at the start."""
        return self.largest - self.before
