"""Claims about the training loop: how many steps, at which rate, which weights are kept, when it ends."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm import api
from pykalm.config import Config
from pykalm.errors import ConfigError, ModelError, TrainingError
from pykalm.learn import tracking
from pykalm.learn.state import read_metrics
from pykalm.learn.train import learning_rate
from pykalm.model.run import Run, read_run_config
from tests.laws.common import tiny_graph
from tests.learn.workshop import require_same_training

Train = Callable[..., Run]


def rates(num_steps: int, **training: Any) -> list[float]:
    config = Config(graph="x", training={"learning_rate": 0.8, **training})
    return [learning_rate(step, num_steps, config) for step in range(num_steps)]


def test_the_learning_rate_rises_then_falls_as_worked_out_by_hand() -> None:
    """Ten steps of which two warm up; the eight others fall by eighths of the way, or by a half cosine."""
    rise = [0.4, 0.8]
    constant = rates(10, warmup_share=0.2, schedule="constant")
    linear = rates(10, warmup_share=0.2, schedule="linear")
    cosine = rates(10, warmup_share=0.2, schedule="cosine")
    assert constant == pytest.approx([*rise, *[0.8] * 8])
    assert linear == pytest.approx([*rise, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert cosine[:3] == pytest.approx([*rise, 0.8])
    assert cosine[4] == pytest.approx(0.4 * (1 + math.sqrt(0.5)))
    assert cosine[6] == pytest.approx(0.4)
    assert cosine[8] == pytest.approx(0.4 * (1 - math.sqrt(0.5)))


def test_without_warm_up_the_first_step_has_the_full_rate_and_one_step_is_enough() -> None:
    assert rates(4, warmup_share=0, schedule="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rates(1, warmup_share=0.1, schedule="cosine") == [0.8]
    assert rates(3, warmup_share=0.4, schedule="constant") == pytest.approx([0.4, 0.8, 0.8])  # 1.2 steps count as 2


@pytest.mark.parametrize(
    ("kind", "batch_size", "rate"),
    [
        ("lora", 16, 1e-3), ("lora", 64, 2e-3), ("lora", 128, 2.8e-3), ("lora", 256, 4e-3), ("lora", 4096, 4e-3),
        ("full", 16, 5e-5), ("full", 64, 1e-4), ("full", 4096, 2e-4),
    ],
)  # fmt: skip
def test_the_rate_that_auto_means_goes_by_the_square_root_of_the_triples_of_a_step(
    kind: str, batch_size: int, rate: float
) -> None:
    training = {"batch_size": batch_size, "schedule": "constant", "warmup_share": 0}
    config = Config(graph="x", adapter={"kind": kind}, training=training)
    assert config.training.learning_rate == "auto"
    assert learning_rate(3, 10, config) == rate
    assert config.settled().training.learning_rate == rate


def test_what_auto_meant_is_kept_and_auto_goes_on_with_what_was_kept(train: Train, tmp_path: Path) -> None:
    run = train(training__learning_rate="auto", training__batch_size=4)
    kept = read_run_config(run.path).training.learning_rate
    assert kept == pytest.approx(2e-3 / 4)
    assert max(line["learning_rate"] for line in read_metrics(run.path)) == pytest.approx(kept)
    other = train("other", training__learning_rate=0.02)
    for path, rate in ((run.path, kept), (other.path, 0.02)):
        again = api.train(tiny_graph(), out=path, resume=True, settings={"training.learning_rate": "auto"})
        assert again.config.training.learning_rate == rate
    with pytest.raises(ConfigError, match=r"training.learning_rate: saved 0.02, found 0.03"):
        api.train(tiny_graph(), out=other.path, resume=True, settings={"training.learning_rate": 0.03})


def test_the_rate_of_the_schedule_is_the_one_that_the_optimiser_uses(train: Train) -> None:
    seen = [line["learning_rate"] for line in read_metrics(train(training__schedule="linear").path)]
    config = Config(graph="x", training={"learning_rate": 0.01, "schedule": "linear"})
    assert seen == [learning_rate(step, 6, config) for step in range(6)]


def spy_on_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note, as the optimiser takes a step, what it was given: rate and decay by parameter, and the gradient's length."""
    seen: list[dict[str, Any]] = []
    right = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append({
            "rates": {group["lr"] for group in self.param_groups},
            "decays": {p.dim(): group["weight_decay"] for group in self.param_groups for p in group["params"]},
            "norm": math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients)),
        })  # fmt: skip
        return right(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def test_every_step_is_taken_at_the_rate_of_the_schedule(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_steps(monkeypatch)
    train(training__schedule="linear")
    config = Config(graph="x", training={"learning_rate": 0.01, "schedule": "linear"})
    assert [step["rates"] for step in seen] == [{learning_rate(number, 6, config)} for number in range(6)]


def test_matrices_are_decayed_and_the_temperature_is_not(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decayed log(1/τ) would pull τ towards 1, whatever the loss wants."""
    seen = spy_on_steps(monkeypatch)
    train(training__weight_decay=0.3, training__max_steps=1)
    assert [step["decays"] for step in seen] == [{2: 0.3, 0: 0.0}]


def test_gradients_are_cut_to_the_length_that_is_set(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """metrics.jsonl holds the length before; 1e-6 is what torch adds to it before it divides."""
    seen = spy_on_steps(monkeypatch)
    run = train(training__clip_norm=0.01)
    before = [line["gradient_norm"] for line in read_metrics(run.path)]
    assert min(before) > 0.02
    assert [step["norm"] for step in seen] == pytest.approx([0.01] * 6, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "epochs_seen"),
    [
        # Six triples: two steps an epoch, of four and of two triples.
        ({"training__batch_size": 4, "training__epochs": 2}, [0.5, 1, 1.5, 2]),
        ({"training__batch_size": 100, "training__epochs": 3}, [1, 2, 3]),
        ({"training__batch_size": 2, "training__epochs": 1.5}, [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3]),
        ({"training__batch_size": 2, "training__epochs": 0.01}, [1 / 3]),
        ({"training__batch_size": 1, "training__epochs": 9, "training__max_steps": 2}, [1 / 6, 1 / 3]),
    ],
)
def test_training_takes_as_many_steps_as_the_settings_ask(
    train: Train, settings: dict[str, Any], epochs_seen: list[float]
) -> None:
    lines = read_metrics(train(**settings).path)
    assert [line["epoch"] for line in lines] == pytest.approx(epochs_seen)
    assert [line["step"] for line in lines] == list(range(1, len(epochs_seen) + 1))
    assert {line["num_steps"] for line in lines} == {len(epochs_seen)}


def test_the_loss_is_the_sum_of_its_parts_and_a_part_that_is_off_is_zero(train: Train) -> None:
    for name, settings in {
        "both": {"objective__implicit_weight": 0.3},
        "explicit": {"objective__implicit": False},
        "implicit": {"objective__explicit": False, "objective__implicit_weight": 0.3},
        "no KL": {"objective__implicit_weight": 0.3, "objective__kl_weight": 0},
        "KL": {"objective__implicit_weight": 0.3, "objective__kl_weight": 2.0},
    }.items():
        for line in read_metrics(train(name, **settings).path):
            kl = {"KL": 2, "no KL": 0}.get(name, 1) * line["kl"]
            assert line["loss"] == pytest.approx(line["explicit"] + 0.3 * line["implicit"] + kl, rel=1e-6)
            assert (line["explicit"] > 0) == (name != "implicit")
            assert (line["implicit"] > 0) == (name != "explicit")
            assert (line["kl"] > 0) == (name != "no KL")


def test_a_temperature_that_is_not_learned_stays(train: Train) -> None:
    fixed = read_metrics(train("fixed", objective__learn_temperature=False, objective__temperature=0.07).path)
    learned = read_metrics(train("learned", objective__temperature=0.07).path)
    assert [line["temperature"] for line in fixed] == pytest.approx([0.07] * 6, rel=1e-6)
    assert abs(learned[-1]["temperature"] - 0.07) > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter__kind": "full", "training__learning_rate": 1e-4},
        {"objective__explicit": False},
        {"text__template": "published", "objective__learn_temperature": False},
    ],
)
def test_other_settings_too_resume_to_the_same_bits(train: Train, tmp_path: Path, settings: dict[str, Any]) -> None:
    class Crash(Exception):
        pass

    def crash(report: Any) -> None:
        if report.step == 3:
            raise Crash

    train("whole", **settings)
    with pytest.raises(Crash):
        train("stopped", watch=crash, **settings)
    api.train(tiny_graph(), out=tmp_path / "stopped", resume=True)
    require_same_training(tmp_path / "stopped", tmp_path / "whole")


def test_without_a_valid_split_the_last_weights_are_kept(train: Train) -> None:
    graph = tiny_graph()
    graph = dataclasses.replace(graph, splits={name: rows for name, rows in graph.splits.items() if name != "valid"})
    run = train(graph=graph)
    assert {line["valid_mrr"] for line in read_metrics(run.path)} == {None}
    alignment = json.loads((run.adapter_folder / "alignment.json").read_text(encoding="utf-8"))
    assert (alignment["step"], alignment["valid_mrr"]) == (6, None)


def validate_as(monkeypatch: pytest.MonkeyPatch, *values: float | Exception) -> None:
    """Let the evaluations of a training give these values, one after the other."""
    left = iter(values)

    def validate() -> float:
        value = next(left)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(api, "_validation", lambda run: validate)


def test_the_best_weights_are_kept_not_the_last(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a constant rate, a training of two steps ends with the weights that one of six had after its second."""
    steady = {"training__schedule": "constant", "training__warmup_share": 0}
    validate_as(monkeypatch, 0.1, 0.9, 0.3, 0.8, 0.2, 0.9)
    best = train("best", **steady)
    validate_as(monkeypatch, 0.1, 0.9)
    short = train("short", training__max_steps=2, **steady)
    for file in ("adapter_model.safetensors", "alignment.json"):
        assert (best.adapter_folder / file).read_bytes() == (short.adapter_folder / file).read_bytes()
    assert [line["valid_mrr"] for line in read_metrics(best.path)] == [0.1, 0.9, 0.3, 0.8, 0.2, 0.9]


def test_patience_ends_training_and_a_tie_is_not_better(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better, worse, better, tie, worse: the second evaluation in a row without a better one ends it."""
    validate_as(monkeypatch, 0.2, 0.1, 0.3, 0.3, 0.1, 0.9)
    run = train(training__patience=2)
    assert [line["step"] for line in read_metrics(run.path)] == [1, 2, 3, 4, 5]
    before = (run.path / "metrics.jsonl").read_bytes()
    api.train(tiny_graph(), out=run.path, resume=True)
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_an_evaluation_that_finds_no_numbers_ends_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    validate_as(monkeypatch, 0.2, ModelError("wanted finite scores, found NaN."))
    with pytest.raises(TrainingError, match=r"step 2: wanted finite scores.*Lower.*checkpoint of step 1 is whole"):
        train()


def test_metrics_reach_tensorboard_even_when_training_breaks_off(train: Train, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def crash(report: Any) -> None:
        if report.step == 3:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        train(training__trackers=["tensorboard"], watch=crash)
    (file,) = (tmp_path / "run" / "kalm").glob("events.out.tfevents.*")
    seen = events.EventAccumulator(str(file)).Reload()
    wanted = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert [event.value for event in seen.Scalars("loss")] == pytest.approx(wanted)
    assert [event.step for event in seen.Scalars("loss")] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(TrainingError, match=r"wanted tensorboard.*pip install"):
        train(training__trackers=["tensorboard"])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'cuda' was asked for.*auto or cpu"):
        train(training__device="cuda")
    assert not (tmp_path / "run").exists()
