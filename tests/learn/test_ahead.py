"""Claims about batches that are built ahead: those of the steps, in their order, by other processes, whose errors are heard."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm import api
from pykalm.learn import train as train_module
from pykalm.learn.ahead import built_ahead
from pykalm.model.run import Run
from tests.laws.common import tiny_graph
from tests.learn.workshop import require_same_training

BESIDE_A_GPU = partial(built_ahead, device=torch.device("cuda"))


def test_other_processes_build_the_steps_in_their_order() -> None:
    with BESIDE_A_GPU(lambda step: (step * step, os.getpid()), 12, start=3) as built:
        found = [built(step) for step in range(3, 12)]
    assert [square for square, _ in found] == [step * step for step in range(3, 12)]
    assert os.getpid() not in {process for _, process in found}


def test_a_cpu_builds_when_it_is_asked() -> None:
    asked: list[int] = []
    with built_ahead(asked.append, 12, start=0, device=torch.device("cpu")) as built:
        built(5)
    assert asked == [5]


def test_what_fails_there_fails_here_and_what_is_drawn_here_stays() -> None:
    def fail(step: int) -> int:
        raise MemoryError if step == 2 else ArithmeticError

    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(MemoryError), BESIDE_A_GPU(fail, 3, start=2) as built:
        built(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_training_that_is_built_ahead_and_stopped_ends_with_the_same_bits(
    train: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, and resumed in the middle of an epoch."""
    train("whole", training__save_every=0)

    def ahead(*given: Any, device: torch.device, **more: Any) -> Any:
        return BESIDE_A_GPU(*given, **more)

    def interrupt(report: Any) -> None:
        if report.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_module, "built_ahead", ahead)
    with pytest.raises(KeyboardInterrupt):
        train("run", watch=interrupt, training__save_every=0)
    api.train(tiny_graph(), out=tmp_path / "run", resume=True)
    require_same_training(tmp_path / "run", tmp_path / "whole")
