"""Claims about timing: systems take turns, warm-up rounds are dropped, ratios are taken round by round."""

import platform
import subprocess
import sys
import time

import pytest
import torch

from pykalm.bench.machine import describe_machine, matmul_peak, peak_memory
from pykalm.bench.timing import Spread, interleaved, paired_ratio

CPU = torch.device("cpu")


def test_systems_take_turns_and_the_first_round_is_not_kept() -> None:
    calls: list[str] = []
    systems = {name: lambda number, name=name: calls.append(f"{name}{number}") for name in "ABC"}
    timed = interleaved(systems, repeats=2, device=CPU, warmups=1)
    assert calls == ["A0", "B0", "C0", "A1", "B1", "C1", "A2", "B2", "C2"]
    assert {name: len(steps) for name, steps in timed.items()} == {"A": 2, "B": 2, "C": 2}


def test_a_call_is_timed_and_its_value_kept() -> None:
    def sleeping(number: int) -> int:
        time.sleep(0.02)
        return number

    (step,) = interleaved({"A": sleeping}, repeats=1, device=CPU)["A"]
    assert step.value == 1
    assert 0.02 <= step.seconds < 2


def test_a_spread_is_median_smallest_and_largest() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)


def test_ratios_are_taken_round_by_round() -> None:
    """Both are twice as slow in the second round; the ratio is 4 in every one."""
    assert paired_ratio([8.0, 4.0, 8.0], [2.0, 1.0, 2.0]) == Spread(4.0, 4.0, 4.0)


def test_peak_memory_is_what_was_held_at_once() -> None:
    def call() -> int:
        held = torch.ones(64 << 18)  # 64 MiB
        held.mul_(2)
        return len(held)

    measured = peak_memory(call, CPU)
    assert measured.value == 64 << 18
    assert 60 << 20 <= measured.peak_bytes <= 100 << 20


def test_the_peak_of_matrix_products_is_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pykalm.bench.machine.SQUARES", {"cpu": (64,)})
    monkeypatch.setattr("pykalm.bench.machine.SECONDS_A_SHAPE", {"cpu": 0.01})
    assert 1e6 < matmul_peak(CPU, width=16) < 1e15


def test_the_machine_is_described_with_versions() -> None:
    machine = describe_machine(CPU)
    assert machine.packages["torch"] == torch.__version__
    assert machine.threads == torch.get_num_threads()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_kept_for_what_comes_next_and_measured_all_the_same() -> None:
    script = """
import resource, torch
from pykalm.bench.machine import keep_freed_memory, peak_memory
def step(): [torch.ones(4_000_000) for _ in range(20)]
keep_freed_memory(); step()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))  # a machine may take idle pages back now and then
print(peak_memory(lambda: torch.ones(50_000_000).sum(), torch.device("cpu")).peak_bytes)
"""
    faults, peak = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    ).stdout.split()
    assert int(faults) < 10_000  # 78,000 pages of 4 KiB
    assert 200e6 <= int(peak) < 220e6
