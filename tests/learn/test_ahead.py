"""Claims about batches that are built ahead: those of the steps, in their order, by other processes, whose errors are heard."""

import os

import pytest
import torch

from pykalm.learn.ahead import built_ahead


def test_other_processes_build_the_steps_in_their_order() -> None:
    with built_ahead(lambda step: (step * step, os.getpid()), 12, start=3, device=torch.device("cuda")) as built:
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
    with pytest.raises(MemoryError), built_ahead(fail, 3, start=2, device=torch.device("cuda")) as built:
        built(2)
    assert torch.equal(torch.get_rng_state(), before)
