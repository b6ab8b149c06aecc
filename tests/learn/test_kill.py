"""kill -9 at any moment loses nothing: resumed, the training ends with the same bits as an uninterrupted one."""

import logging
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from pykalm import files
from pykalm.learn.state import METRICS_FILE, read_metrics
from tests.learn.workshop import SETTINGS, as_options, leftovers, require_same_training, start, write_graph
from tests.tiny_models import save_tiny_model

log = logging.getLogger(__name__)
pytestmark = pytest.mark.slow

KILLS = 10
KILLS_AT_START = 3
STEPS = 60
PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options that name a tiny model and a graph."""
    folder = tmp_path_factory.mktemp("inputs")
    return ["--model", str(save_tiny_model(folder / "model")), "--graph", str(write_graph(folder / "graph"))]


def begin(run: Path, inputs: list[str], settings: dict[str, Any], before: Any = None) -> BaseProcess:
    """Start training, or go on with it where there is a run."""
    there = (run / "config.yaml").is_file()
    options = ["--resume"] if there else [*inputs, *as_options({**SETTINGS, **settings})]
    return start(["train", "--out", str(run), *options], run.with_suffix(".log"), before)


def finish(process: BaseProcess, run: Path) -> None:
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0, run.with_suffix(".log").read_text(encoding="utf-8")


def wait_for_a_new_line(run: Path, process: BaseProcess, before: int | None) -> None:
    """Wait until the process has put metrics.jsonl in the place of the file numbered `before`, and added a line."""
    file, size, deadline = run / METRICS_FILE, None, time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.is_alive():
        if file.is_file() and file.stat().st_ino != before:
            size = file.stat().st_size if size is None else size
            if file.stat().st_size > size:
                return
        time.sleep(0.001)
    raise AssertionError(f"no step was done: {run.with_suffix('.log').read_text(encoding='utf-8')}")


def file_number(file: Path) -> int | None:
    return file.stat().st_ino if file.is_file() else None


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == -signal.SIGKILL


def test_ten_kills_at_random_moments_end_with_the_same_bits(inputs: list[str], tmp_path: Path) -> None:
    """Every step saves, every third evaluates; three more kills fall before the first step of a resumed training."""
    settings = {"training.max_steps": STEPS, "training.evaluate_every": 3, "training.epochs": 100}
    whole, run = tmp_path / "whole", tmp_path / "killed"
    finish(start(["--version"], tmp_path / "warm-up.log"), tmp_path / "warm-up")
    begun = time.monotonic()
    process = begin(whole, inputs, settings)
    wait_for_a_new_line(whole, process, None)
    first = time.monotonic()
    finish(process, whole)
    start_seconds, step_seconds = first - begun, (time.monotonic() - first) / STEPS
    generator = random.Random(20)
    others = ["step"] * (KILLS - 1) + ["start"] * KILLS_AT_START
    generator.shuffle(others)
    for number, moment in enumerate(["step", *others]):
        before = file_number(run / METRICS_FILE)
        process = begin(run, inputs, settings)
        if moment == "step":
            wait_for_a_new_line(run, process, before)
            time.sleep(generator.uniform(0, 2.5) * step_seconds)
        else:
            time.sleep(generator.uniform(0, 1) * start_seconds)
        kill(process)
        last = read_metrics(run)[-1]["step"]
        log.info(f"kill {number + 1} ({moment}): after step {last} of {STEPS}, left {leftovers(run) or 'no draft'}")
    finish(begin(run, inputs, settings), run)
    require_same_training(run, whole)
    assert leftovers(run) == []


class KillAt:
    """Kill this process as it is about to do its n-th change of a file or folder while saving; picklable."""

    def __init__(self, number: int, count_in: Path | None = None) -> None:
        self.number, self.count_in, self.done = number, count_in, 0

    def __call__(self) -> None:
        for place, name in ((os, "replace"), (os, "fsync"), (Path, "rename"), (files.shutil, "rmtree")):
            setattr(place, name, self.wrapped(getattr(place, name)))

    def wrapped(self, function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.done == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            self.done += 1
            if self.count_in is not None:
                self.count_in.write_text(str(self.done), encoding="utf-8")
            return function(*arguments, **options)

        return counted


def test_a_kill_at_any_change_of_a_file_loses_nothing(inputs: list[str], tmp_path: Path) -> None:
    """Two steps; without a valid split the second one replaces all that the first one saved. A kill at each change."""
    settings = {"training.max_steps": 2, "training.evaluate_every": 1}
    inputs = [*inputs[:2], "--graph", str(write_graph(tmp_path / "graph", valid=0))]
    whole, counter = tmp_path / "whole", tmp_path / "count"
    finish(begin(whole, inputs, settings, KillAt(-1, counter)), whole)
    changes = int(counter.read_text(encoding="utf-8"))
    for number in range(changes):
        run = tmp_path / f"killed-{number}"
        process = begin(run, inputs, settings, KillAt(number))
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == -signal.SIGKILL
        log.info(f"kill at change {number + 1} of {changes}: left {leftovers(run) or 'no draft'}")
        finish(begin(run, inputs, settings), run)
        require_same_training(run, whole)
        assert leftovers(run) == []
