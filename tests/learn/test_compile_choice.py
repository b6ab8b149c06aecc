"""Claims about when a training compiles its layers: as it is told, or where it is long and all machines can."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pykalm import api, cli
from pykalm.errors import ModelError
from pykalm.learn.train import Trainer
from pykalm.model.run import Run, read_run_config
from tests.laws.common import tiny_graph

Train = Callable[..., Run]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the encoders whose layers are compiled, which is left out here. Every training is long enough."""
    encoders: list[Any] = []
    monkeypatch.setattr(api, "compile_layers", encoders.append)
    monkeypatch.setitem(api.WORTH_COMPILING, "cpu", 1)
    return encoders


@pytest.mark.parametrize(("setting", "least", "wanted"), [
    ("auto", 1, True), ("auto", 1e15, False), (True, 1e15, True), (False, 1, False),
])  # fmt: skip
def test_layers_are_compiled_as_told_or_in_a_long_training_which_is_kept_with_the_run(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, setting: Any, least: float, wanted: bool
) -> None:
    monkeypatch.setitem(api.WORTH_COMPILING, "cpu", least)
    run = train(training__compile=setting)
    assert len(compiled) == wanted
    assert run.config.training.compile is wanted
    assert read_run_config(run.path).training.compile is wanted


def test_the_work_of_a_training_is_its_steps_times_the_tokens_of_the_first(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights times that is what counts; twice as many threads, or processes, need twice as much."""
    looked: list[Run] = []
    monkeypatch.setattr(api, "_keep", lambda run, **chosen: None)

    def look(run: Run, trainer: Trainer) -> None:
        batch = trainer.builder.build(trainer.order.at(0), np.random.default_rng([trainer.config.seed, 0, 1]))
        assert trainer.num_tokens() == 6 * batch.trie.num_nodes
        weights = sum(weight.numel() for weight in trainer.encoder.model.parameters())
        work = trainer.num_tokens() * weights
        for threads, processes, least in ((2, 1, work), (4, 1, work / 2), (2, 3, work / 3)):
            for above, wanted in ((0.999, True), (1.001, False)):
                with monkeypatch.context() as patched:
                    patched.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                    patched.setattr(api, "count", lambda processes=processes: processes)
                    patched.setitem(api.WORTH_COMPILING, "cpu", least * above)
                    assert api._is_worth_compiling(trainer) is wanted
        looked.append(run)

    monkeypatch.setattr(api, "_maybe_compile", look)
    train()
    assert looked


@pytest.mark.parametrize("against", ["sharded", "4 bits", "memory", "device"])
def test_auto_leaves_layers_as_they_are_where_something_speaks_against_it(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, against: str
) -> None:
    settings: dict[str, Any] = {"training__memory": "20GB"} if against == "memory" else {}
    if against == "sharded":
        monkeypatch.setattr(api, "is_sharded", lambda encoder: True)
    if against == "device":
        monkeypatch.delitem(api.WORTH_COMPILING, "cpu")
    worth = api._is_worth_compiling

    def look(trainer: Trainer) -> bool:
        if against == "4 bits":
            quantized = trainer.config.adapter.model_copy(update={"quantize": "4bit"})
            object.__setattr__(trainer, "config", trainer.config.model_copy(update={"adapter": quantized}))
        return worth(trainer)

    monkeypatch.setattr(api, "_is_worth_compiling", look)
    train(**settings)
    assert compiled == []


def test_a_resumed_run_keeps_what_was_chosen_and_a_finished_one_compiles_nothing(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash(report: Any) -> None:
        if report.step == 3:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        train(watch=crash)
    monkeypatch.setitem(api.WORTH_COMPILING, "cpu", 1e15)  # as in a version that thinks otherwise
    again = {"training.compile": "auto"}  # as of a settings file that says so, or nothing
    api.train(tiny_graph(), out=tmp_path / "run", resume=True, settings=again)
    assert len(compiled) == 2
    api.train(tiny_graph(), out=tmp_path / "run", resume=True, settings=again)
    assert len(compiled) == 2
    api.train(
        tiny_graph(), out=tmp_path / "run", resume=True, settings={"training.compile": False}
    )  # where there is no compiler
    assert read_run_config(tmp_path / "run").training.compile is False


def test_auto_goes_on_without_a_compiler_and_says_so_where_true_does_not(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undone: list[Any] = []

    def refuse(encoder: Any) -> None:
        raise ModelError("training.compile: wanted to compile Llama, found no C++ compiler.")

    monkeypatch.setattr(api, "compile_layers", refuse)
    monkeypatch.setattr(api, "undo_compiling", undone.append)
    with caplog.at_level(logging.WARNING):
        run = train()
    assert "steps take longer. training.compile: wanted to compile Llama, found no C++ compiler." in caplog.text
    assert run.config.training.compile is False
    assert undone
    with pytest.raises(ModelError, match=r"found no C\+\+ compiler"):
        train("told", training__compile=True)


def test_a_process_that_can_compile_does_not_where_another_cannot(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They would drop other elements, and one would wait for the other."""
    undone: list[Any] = []
    monkeypatch.setattr(api, "undo_compiling", undone.append)
    gather = api.gather

    def with_another(mine: Any) -> list[Any]:
        return [mine, "no compiler there"] if mine is None else gather(mine)

    monkeypatch.setattr(api, "gather", with_another)
    with caplog.at_level(logging.WARNING):
        run = train()
    assert undone == compiled
    assert "no compiler there" in caplog.text
    assert run.config.training.compile is False


def test_a_run_of_an_earlier_version_says_what_it_was_trained_with(
    train: Train, graph_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings name neither; the command goes on with it as the function does."""
    run = train(
        graph=graph_folder, objective__kl_weight=0, objective__self_negatives="among", training__directions="together",
        training__learning_rate=1e-3, training__max_steps=3,
    )  # fmt: skip
    kept = run.path / "config.yaml"
    lines = kept.read_text(encoding="utf-8").splitlines()
    earlier = [line for line in lines if not re.search("kl_weight|self_negatives|directions|learning_rate", line)]
    assert len(earlier) == len(lines) - 4
    kept.write_text("\n".join(earlier), encoding="utf-8")
    config = read_run_config(run.path)
    assert (config.objective.kl_weight, config.objective.self_negatives) == (0, "among")
    assert (config.training.directions, config.training.learning_rate) == ("together", 1e-3)
    assert cli.main(["train", "--out", str(run.path), "--resume", "--set", "objective.self_negatives=capped"]) != 0
    assert "objective.self_negatives: saved 'among', found 'capped'" in capsys.readouterr().err


def test_a_setting_that_is_gone_is_passed_over_in_runs_alone(
    train: Train, graph_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(graph=graph_folder, objective__kl_weight=0, training__max_steps=1)
    kept = run.path / "config.yaml"
    now = kept.read_text(encoding="utf-8")
    kept.write_text(now.replace("objective:\n", "objective:\n  self_negative_weight: 0.2\n"), encoding="utf-8")
    assert read_run_config(run.path) == run.config
    assert cli.main(["train", "--out", str(run.path / "new"), "--config", str(kept)]) != 0
    assert "objective.self_negative_weight is not a setting" in capsys.readouterr().err
