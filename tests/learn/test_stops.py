"""Claims about trainings that stop early: Ctrl-C, a polite kill, no number, no memory, no room on the disk."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm import api, cli
from pykalm.errors import ModelError, OutOfMemoryError, TrainingError
from pykalm.learn import train as train_module
from pykalm.learn.state import STATE_FILE, read_metrics
from pykalm.learn.step import StepLoss, joint_gradient
from pykalm.memory import explained_memory
from pykalm.model import packing
from pykalm.model import run as run_module
from pykalm.model.run import Run, load_run
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer
from tests.learn.workshop import SETTINGS, as_options, learned, require_same_training
from tests.tiny_models import save_tiny_model

Train = Callable[..., Run]


def resume(run: Path) -> Run:
    return api.train(tiny_graph(), out=run, resume=True)


def at_step(number: int, act: Callable[[], object]) -> Callable[[Any], None]:
    """Return a watcher that acts when it is told of a step."""
    return lambda report: act() if report.step == number else None  # type: ignore[func-returns-value]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_saves_and_a_resumed_run_ends_with_the_same_bits(
    number: signal.Signals, model: str, graph_folder: Path, tmp_path: Path
) -> None:
    """Sent when the third step is done; nothing else would have saved before the sixth."""
    settings = {**SETTINGS, "training.save_every": 0, "training.max_steps": 12}
    given = ["--graph", str(graph_folder), "--model", model, *as_options(settings)]
    run, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    command = [sys.executable, "-m", "pykalm.cli", "train", "--out", str(run), *given]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        while process.poll() is None and len(read_metrics(run)) < 3:
            time.sleep(0.002)
        process.send_signal(number)
        assert process.wait(60) == 130, log.read_text(encoding="utf-8")
    assert f"Go on with: kalm train --out {run} --resume" in log.read_text(encoding="utf-8")
    saved = torch.load(run / STATE_FILE, weights_only=True)["progress"]["step"]
    assert 3 <= saved == read_metrics(run)[-1]["step"] < 12
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    assert cli.main(["train", "--out", str(whole), *given]) == 0
    require_same_training(run, whole)


def test_an_interrupt_after_a_save_waits_for_the_next_step_and_its_save(train: Train, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(watch=at_step(3, interrupt), training__save_every=0, training__evaluate_every=100)
    assert torch.load(tmp_path / "run" / STATE_FILE, weights_only=True)["progress"]["step"] == 4
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_interrupt_stops_at_once(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(watch=at_step(3, lambda: (interrupt(), interrupt())))
    assert len(read_metrics(tmp_path / "run")) == 3


def test_an_interrupt_before_anything_is_saved_promises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str, graph_folder: Path, tmp_path: Path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # not a signal: a shell's background jobs ignore that one

    monkeypatch.setattr(api, "new_run", interrupted)
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--model", model, "--graph", str(graph_folder)]) == 130
    printed = capsys.readouterr().err
    assert "Nothing is saved yet" in printed
    assert "--resume" not in printed
    assert not (tmp_path / "run").exists()


def test_training_works_beside_the_main_thread(train: Train) -> None:
    """As in a notebook server, where signals cannot be caught."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            train()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []


@contextlib.contextmanager
def spoilt_step(monkeypatch: pytest.MonkeyPatch, number: int, spoil: Callable[[StepLoss], StepLoss]) -> Iterator[None]:
    """Let the step of a number, and those after it, go wrong."""
    count = 0

    def wrong(*arguments: Any, **options: Any) -> StepLoss:
        nonlocal count
        count += 1
        loss = joint_gradient(*arguments, **options)
        return loss if count < number else spoil(loss)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "joint_gradient", wrong)
        yield


@pytest.mark.parametrize("found", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_step(
    found: float, train: Train, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    message = rf"step 4: wanted a finite loss, found loss {found}.*learning_rate.*checkpoint of step \d is whole"
    with (
        spoilt_step(monkeypatch, 4, lambda loss: StepLoss(found, found, 0.0)),
        pytest.raises(TrainingError, match=message),
    ):
        train()
    assert len(read_metrics(run)) == 3
    assert all(tensor.isfinite().all() for tensor in learned(run).values())
    load_run(run, graph=tiny_graph())
    resume(run)
    require_same_training(run, whole)


def test_a_gradient_that_is_no_number_stops_too(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = train_module.clip_gradients
    monkeypatch.setattr(train_module, "clip_gradients", lambda *given: clip(*given) * math.nan)
    with pytest.raises(TrainingError, match=r"step 1: .*gradient norm nan.*nothing was saved yet"):
        train()


def test_a_learning_rate_that_is_far_too_high_is_named_as_the_cause(train: Train, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Lower training\.learning_rate"):
        train(training__learning_rate=1e30, training__warmup_share=0, training__epochs=20)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."),
    ],
)
def test_out_of_memory_says_which_settings_to_lower(
    error: Exception, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(loss: StepLoss) -> StepLoss:
        raise error

    with (
        spoilt_step(monkeypatch, 3, refuse),
        pytest.raises(TrainingError, match=r"out of memory: \w.*training.memory_tokens.*training.chunk_tokens"),
    ):
        train()
    resume(tmp_path / "run")


def test_another_error_is_not_taken_for_memory(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(loss: StepLoss) -> StepLoss:
        raise RuntimeError("shapes differ")

    with spoilt_step(monkeypatch, 1, refuse), pytest.raises(RuntimeError, match="shapes differ"):
        train()


def test_out_of_memory_is_not_taken_for_a_model_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing, "_read_packed", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        packing.choose_passes(tiny_encoder(), tiny_verbalizer(tiny_graph()))


def test_an_evaluation_out_of_memory_keeps_what_was_saved(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> float:
        raise MemoryError

    monkeypatch.setattr(api, "_validation", lambda run: refuse)
    with pytest.raises(TrainingError, match="out of memory: allocation refused"):
        train(training__evaluate_every=3)
    assert torch.load(tmp_path / "run" / STATE_FILE, weights_only=True)["progress"]["step"] == 2


def test_a_model_that_cannot_be_had_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        api.train(tiny_graph(), out=tmp_path / "run", model=str(tmp_path / "nothing.gguf"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["load_base", "choose_passes"])
def test_out_of_memory_at_the_start_and_when_a_run_is_opened_says_what_to_do(
    place: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(training__max_steps=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run_module, place, refuse)
    message = r"out of memory: CUDA out of memory\. The model does not fit: take a smaller one"
    with pytest.raises(OutOfMemoryError, match=message):
        load_run(run.path, graph=tiny_graph())
    with pytest.raises(OutOfMemoryError, match=message):
        train("other")
    assert not (tmp_path / "other").exists()


def test_a_validation_that_runs_out_of_memory_says_how_the_training_goes_on(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `Encoder.embed` says of itself is replaced by what the training knows better."""

    def refuse() -> float:
        with explained_memory("Lower something."):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(api, "_validation", lambda run: refuse)
    with pytest.raises(TrainingError, match=r"out of memory: CUDA out of memory\. Lower training\.memory_tokens"):
        train()


def test_a_tokenizer_without_an_end_token_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            content = json.loads((model / name).read_text(encoding="utf-8"))
            content.pop("eos_token", None)
            (model / name).write_text(json.dumps(content), encoding="utf-8")
    settings = {**SETTINGS, "training.max_steps": 1}
    with pytest.raises(ModelError, match=r"wanted a tokenizer with an end token.*objective\.implicit=false"):
        api.train(tiny_graph(), out=tmp_path / "run", model=str(model), settings=settings)
    assert not (tmp_path / "run").exists()
    api.train(tiny_graph(), out=tmp_path / "run", model=str(model), settings={**settings, "objective.implicit": False})


@pytest.mark.parametrize("rate", [800.0, -800.0])
def test_a_temperature_thrown_out_of_range_is_said_and_never_saved(
    rate: float, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log(1/τ) moves by the whole learning rate in AdamW's first step; the sign of its gradient decides where to."""
    right = train_module.joint_gradient

    def push(encoder: Any, *arguments: Any, **options: Any) -> StepLoss:
        loss = right(encoder, *arguments, **options)
        encoder.log_inverse_temperature.grad.fill_(-1.0 if rate > 0 else 1.0)
        return loss

    monkeypatch.setattr(train_module, "joint_gradient", push)
    with pytest.raises(TrainingError, match=r"step 1: wanted a temperature.*found (0\.0|inf)\. Lower training\.learn"):
        train(training__learning_rate=abs(rate), training__warmup_share=0)
    assert not (tmp_path / "run" / "adapter").exists()
