"""A full disk, wherever it strikes a save, leaves the previous save whole and is named as the cause."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm import api, cli
from pykalm.errors import TrainingError
from pykalm.learn import state
from pykalm.learn.state import METRICS_FILE, STATE_FILE
from pykalm.model.run import Run, load_run
from tests.laws.common import tiny_graph
from tests.learn.workshop import SETTINGS, as_options, leftovers, require_same_training, start

Train = Callable[..., Run]


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (torch, "save", 3),
        (os, "replace", 6),
        (os, "fsync", 10),
        (Path, "rename", 2),
        (Path, "rename", 3),
    ],
)
def test_a_full_disk_leaves_the_previous_save_whole(
    place: Any, name: str, call: int, train: Train, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the n-th call of a function; with room again, the run goes on to the same bits."""
    run = tmp_path / "run"
    right, count = getattr(place, name), 0

    def until_full(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, until_full)
        with pytest.raises(
            TrainingError, match=r"No space left on device. Free some space; what was saved before is whole"
        ):
            train()
    assert leftovers(run) == []
    load_run(run, graph=tiny_graph())
    assert torch.load(run / STATE_FILE, weights_only=True)["progress"]["step"] >= 1
    api.train(tiny_graph(), out=run, resume=True)
    require_same_training(run, whole)


def test_a_full_disk_while_metrics_are_written_is_said(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullJson:
        @staticmethod
        def dumps(value: Any) -> str:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "json", FullJson)
    with pytest.raises(TrainingError, match=rf"{METRICS_FILE}: cannot save.*Free some space"):
        train()


def only_small_files() -> None:
    """Let no file of this process grow beyond 20 kB: a write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
def test_a_write_that_truly_fails_is_one_message(model: str, graph_folder: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    settings = as_options({**SETTINGS, "objective.kl_weight": 0})  # the base model's own texts would not fit either
    arguments = ["train", "--out", str(run), "--graph", str(graph_folder), "--model", model, *settings]
    process = start(arguments, log, only_small_files)
    process.join(60)
    printed = log.read_text(encoding="utf-8")
    assert process.exitcode == 1
    assert "latest.pt: cannot save: [Errno 27] File too large" in printed
    assert "what was saved before is whole" in printed
    assert "Traceback" not in printed
    assert leftovers(run) == []
    assert cli.main(["train", "--out", str(run), "--resume", "--json"]) == 0
    assert json.loads((run / "adapter" / "alignment.json").read_text(encoding="utf-8"))["format"] == 1
