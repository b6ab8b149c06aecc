"""Claims about batches that are built ahead: those of the steps, in their order, by other processes, whose errors are heard."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm import api
from pykalm.errors import ModelError, TrainingError
from pykalm.files import only_writer
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


def test_what_fails_there_fails_here_in_the_same_words() -> None:
    def fail(step: int) -> int:
        raise {0: ModelError("wanted this, found that. Do so."), 1: MemoryError()}[step]

    for step, kind, words in ((0, ModelError, "wanted this, found that. Do so."), (1, MemoryError, "")):
        with pytest.raises(kind) as raised, BESIDE_A_GPU(fail, 2, start=step) as built:
            built(step)
        assert str(raised.value) == words


def test_a_builder_that_is_killed_is_said() -> None:
    with (
        pytest.raises(TrainingError, match=r"a process that builds batches was killed.*Free memory"),
        BESIDE_A_GPU(lambda step: os.kill(os.getpid(), signal.SIGKILL), 3, start=0) as built,
    ):
        built(0)


def test_no_builder_outlives_the_block_though_its_error_is_kept() -> None:
    """As a notebook keeps it."""
    builders: set[int] = set()

    def train() -> None:
        with BESIDE_A_GPU(lambda step: os.getpid(), 99, start=0) as built:
            builders.update(built(step) for step in range(20))
            raise RuntimeError

    with pytest.raises(RuntimeError) as kept:
        train()
    assert kept.value.__traceback__ is not None
    assert builders
    assert not any(is_alive(builder) for builder in builders)


KILLED = """
import os, signal, sys
import numpy as np
import torch
from pathlib import Path
from pykalm.files import only_writer
from pykalm.learn.ahead import built_ahead

with only_writer(Path(sys.argv[1])), built_ahead(
    lambda step: (os.getpid(), np.zeros(1 << 20)), 99, start=0, device=torch.device("cuda")
) as built:
    print(*{built(step)[0] for step in range(9)}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_builders_end_after_a_killed_training_and_leave_its_folder_free(tmp_path: Path) -> None:
    """They have more to send than a pipe holds, and no one reads it."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, check=False, timeout=60
    )
    builders, given_up = [int(number) for number in ended.stdout.split()], time.monotonic() + 20
    assert builders
    while any(is_alive(builder) for builder in builders):
        assert time.monotonic() < given_up, builders
        time.sleep(0.1)
    with only_writer(tmp_path):
        pass


def test_a_stop_of_the_whole_group_is_none_of_the_builders() -> None:
    """As of `timeout`, a launcher or a terminal."""
    with BESIDE_A_GPU(lambda step: os.getpgid(0), 3, start=0) as built:
        assert all(built(step) != os.getpgid(0) for step in range(3))


def is_alive(process: int) -> bool:
    """Return whether a process is there, and not only waits for someone to ask how it ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


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
