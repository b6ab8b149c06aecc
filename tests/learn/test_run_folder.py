"""Claims about the folder of a run: one writer at a time, rights, places that cannot be written to."""

import importlib.util
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm import api, cli, files
from pykalm.api import StepReport
from pykalm.errors import ConfigError, RunError, TrainingError
from pykalm.files import only_writer, replace_file, replace_folder
from pykalm.learn.state import Progress, load_state, read_metrics, save_state
from pykalm.model import run as run_module
from pykalm.model.run import Run, load_run
from tests.laws.common import tiny_graph
from tests.learn.workshop import SETTINGS, as_options, learned, start


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(
    model: str, graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused, before and after the first has written its settings; the first goes on."""
    run, log = tmp_path / "run", tmp_path / "log"
    given = ["train", "--out", str(run), "--graph", str(graph_folder), "--model", model]
    options = as_options({**SETTINGS, "training.epochs": 100, "training.max_steps": 60, "training.evaluate_every": 50})
    first = start([*given, *options], log)
    while not read_metrics(run) and first.is_alive():
        time.sleep(0.01)
    capsys.readouterr()
    assert cli.main(["train", "--out", str(run), "--resume"]) == 1
    assert "another training at work" in capsys.readouterr().err
    assert first.is_alive(), log.read_text(encoding="utf-8")
    first.join(120)
    assert first.exitcode == 0
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 61))


def test_a_run_goes_on_with_other_limits_of_memory_and_keeps_them(model: str, tmp_path: Path) -> None:
    """As after running out of memory; gradient caching gives the same result, up to rounding."""
    settings = {**SETTINGS, "adapter.dropout": 0, "training.max_steps": 6, "training.batch_size": 2}
    whole = api.train(tiny_graph(), out=tmp_path / "whole", model=model, settings=settings)

    def crash(report: StepReport) -> None:
        if report.step == 2:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        api.train(tiny_graph(), out=tmp_path / "run", model=model, settings=settings, watch=crash)
    lower = {"training.memory_tokens": 1, "training.chunk_tokens": 128}
    run = api.train(tiny_graph(), out=tmp_path / "run", resume=True, settings=lower)
    assert (run.config.training.memory_tokens, run.config.training.chunk_tokens) == (1, 128)
    losses = [[line["loss"] for line in read_metrics(path)] for path in (run.path, whole.path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ConfigError, match=r"seed: saved 0, found 1\s.*Only these may change: training\.mem"):
        api.train(tiny_graph(), out=tmp_path / "run", resume=True, settings={"seed": 1, "training.memory_tokens": 9})


def test_a_folder_has_one_writer_until_it_lets_go(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path / "run"),
        pytest.raises(RunError, match="another training"),
        only_writer(tmp_path / "run"),
    ):
        pass
    with only_writer(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert (tmp_path / "run" / "kept").exists()


def test_drafts_of_killed_processes_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml-123").touch()
    (tmp_path / "config.yaml").touch()
    with only_writer(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(("place", "found", "remedy"), [
    ("file/run", "wanted a folder, found a file", "Name another one"),
    ("n" * 300, "cannot save", "Check the folder and its rights"),
    ("file", "wanted a folder, found a file", "Name another one"),
])  # fmt: skip
def test_a_place_that_cannot_be_written_to_is_said_before_the_model_is_loaded(
    place: str,
    found: str,
    remedy: str,
    model: str,
    graph_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    given = ["--graph", str(graph_folder), "--model", model]
    assert cli.main(["train", "--out", str(tmp_path / place), *given]) == 1
    printed = capsys.readouterr().err
    assert f"{tmp_path / place}: {found}" in printed
    assert remedy in printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_said(model: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TrainingError, match="Permission denied"):
        api.train(tiny_graph(), out=tmp_path / "run", model=model)


def test_what_others_may_read_they_may_read_all(model: str, tmp_path: Path) -> None:
    """The weights have the rights of the files beside them: a run can be used by a group."""
    settings = {**SETTINGS, "training.max_steps": 1}
    run = api.train(tiny_graph(), out=tmp_path / "run", model=model, settings=settings)
    api.open_index(run)
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.name: path.stat().st_mode for path in run.path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(modes, plain.stat().st_mode)
    assert learned(run.path)


def fail(_: Path) -> Any:
    raise OSError("nothing works")


def test_a_failed_write_leaves_file_and_folder_as_they_were(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    replace_file(file, lambda path: path.write_text("old", encoding="utf-8"))
    replace_folder(folder, lambda path: (path / "inner").write_text("old", encoding="utf-8"))
    for target, replace in ((file, replace_file), (folder, replace_folder)):
        with pytest.raises(TrainingError, match=f"{target}: cannot save: nothing works. Check the folder"):
            replace(target, fail)
    assert file.read_text(encoding="utf-8") == (folder / "inner").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    replace_folder(folder, lambda path: (path / "other").write_text("new", encoding="utf-8"))
    assert [path.name for path in folder.iterdir()] == ["other"]


@pytest.fixture
def trained(model: str, tmp_path: Path) -> Run:
    settings = {**SETTINGS, "training.max_steps": 1}
    return api.train(tiny_graph(), out=tmp_path / "run", model=model, settings=settings)


def test_a_run_is_read_while_its_training_replaces_the_weights(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader comes before every rename and removal of a save; it reads, and the save ends well."""
    vectors, reads = trained.encoder.embed(trained.verbalizer.candidates(torch.arange(6).numpy())), 0

    def reading_before(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal reads
            reads += 1
            texts = trained.verbalizer.candidates(torch.arange(6).numpy())
            assert torch.equal(load_run(trained.path, graph=tiny_graph()).encoder.embed(texts), vectors)
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", reading_before(Path.rename))
        patch.setattr(files.shutil, "rmtree", reading_before(files.shutil.rmtree))
        trained.save_aligned(step=2)
    assert reads >= 3
    assert run_module.read_alignment(trained.path)["step"] == 2


def test_weights_and_temperature_of_two_saves_are_never_mixed(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training saves again after the reader has read alignment.json and before it reads the weights."""
    right, left = run_module.load_adapter, [7.0]

    def load(*arguments: Any, **options: Any) -> Any:
        if left:
            with torch.no_grad():
                trained.encoder.log_inverse_temperature.fill_(left.pop())
                list(trained.encoder.trainable().values())[-1].add_(0.5)
            trained.save_aligned(step=2)
        return right(*arguments, **options)

    monkeypatch.setattr(run_module, "load_adapter", load)
    run = load_run(trained.path, graph=tiny_graph())
    assert float(run.encoder.log_inverse_temperature.detach()) == 7.0
    assert run.encoder.fingerprint() == trained.encoder.fingerprint()


def test_a_run_is_asked_with_the_wordings_that_were_saved_with_it(trained: Run) -> None:
    """Not with those that its template's name stands for in the version of kalm that opens it."""
    file = trained.adapter_folder / "alignment.json"
    alignment = json.loads(file.read_text(encoding="utf-8"))
    alignment["templates"] |= {"query": "about {head} and {relation}?", "candidate": "is it {entity}?"}
    file.write_text(json.dumps(alignment), encoding="utf-8")
    run = load_run(trained.path, graph=tiny_graph())
    decode = run.verbalizer.tokenizer.decode
    assert decode(run.verbalizer.query(2, 1)) == "about bo: a baker of bread and likes?"
    assert decode(run.verbalizer.candidate(1)) == "is it ada b?"


def test_a_run_that_changes_under_every_look_is_said(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right, steps = run_module.load_adapter, iter(range(2, 100))

    def load(*arguments: Any, **options: Any) -> Any:
        trained.save_aligned(step=next(steps))
        return right(*arguments, **options)

    monkeypatch.setattr(run_module, "load_adapter", load)
    with pytest.raises(RunError, match=r"a training replaced them 5 times\. Try again"):
        load_run(trained.path, graph=tiny_graph())


def test_files_are_written_also_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows: no fcntl, and a folder cannot be opened."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert files.__file__ is not None
    specification = importlib.util.spec_from_file_location("files_without_locks", files.__file__)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def refuse(*_: Any) -> int:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "open", refuse)
        with module.only_writer(tmp_path / "run"):
            (tmp_path / "run" / "kept").mkdir()
    assert (tmp_path / "run" / "kept").exists()


@pytest.mark.parametrize(("saved", "own"), [(True, None), (None, True)])
def test_a_resumed_optimiser_steps_as_its_own_device_does(saved: bool | None, own: bool | None, tmp_path: Path) -> None:
    """A training may go on on another device than it began on."""
    weights = {"weight": torch.nn.Parameter(torch.ones(2, 3))}
    weights["weight"].grad = torch.ones(2, 3)
    first, second = (torch.optim.AdamW(weights.values(), fused=fused) for fused in (saved, own))
    first.step()
    save_state(tmp_path, weights, first, Progress(step=1), {})
    assert load_state(tmp_path, weights, second, {}).step == 1
    assert [group["fused"] for group in second.param_groups] == [own]
    second.step()


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_folder(tmp_path: Path) -> None:
    """It has the lock's handle too, for as long as it lives."""
    (tmp_path / "config.yaml").touch()  # an empty folder would be made anew
    with only_writer(tmp_path):
        forked = get_context("fork").Process(target=time.sleep, args=(60,))
        forked.start()
    try:
        with only_writer(tmp_path):
            assert forked.is_alive()
    finally:
        forked.kill()
        forked.join()
