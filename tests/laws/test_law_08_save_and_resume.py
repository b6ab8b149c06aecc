"""Law 8: save → load → encode is bitwise equal; stop and resume = uninterrupted; a wrong fingerprint raises."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pykalm import api
from pykalm.errors import ConfigError, RunError
from pykalm.learn import train as train_module
from pykalm.learn.state import read_metrics
from pykalm.learn.train import StepReport
from pykalm.model import run as run_module
from pykalm.model.encoder import Encoder
from pykalm.model.run import Run, load_run
from tests.laws.common import replaced, tiny_graph
from tests.tiny_models import save_tiny_model

SETTINGS = {
    "training.max_steps": 6, "training.batch_size": 3, "training.precision": "fp32", "training.device": "cpu",
    "training.evaluate_every": 2, "training.save_every": 1, "adapter.dropout": 0.2, "adapter.rank": 4,
    "training.learning_rate": 0.01,
}  # fmt: skip


@contextlib.contextmanager
def workshop() -> Iterator[tuple[Path, str]]:
    """Yield a folder for runs and a tiny model's folder."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name), str(save_tiny_model(Path(name) / "model"))


def trained(folder: Path, model: str, **settings: Any) -> Run:
    return api.train(tiny_graph(), out=folder, model=model, settings={**SETTINGS, **settings})


def stopped_and_resumed(folder: Path, model: str, *, stop_after: int, settings: dict[str, Any]) -> Run:
    """Stop as a crash does, in the middle of a step, and go on."""

    def crash(report: StepReport) -> None:
        if report.step == stop_after:
            raise ConnectionError("crash")

    with contextlib.suppress(ConnectionError):
        api.train(tiny_graph(), out=folder, model=model, settings=settings, watch=crash)
    return api.train(tiny_graph(), out=folder, resume=True)


def learned(folder: Path) -> dict[str, Tensor]:
    """Return the last weights and optimiser moments of a run."""
    state = torch.load(folder / "state" / "latest.pt", weights_only=True)
    moments = {f"{i}.{key}": value for i, entry in state["optimizer"]["state"].items() for key, value in entry.items()}
    return {**state["parameters"], **moments}


def texts_of(run: Run) -> list[Any]:
    return [*run.verbalizer.queries(np.arange(6), np.arange(6) % 4), *run.verbalizer.candidates(np.arange(6))]


def test_a_saved_run_encodes_the_same_bits() -> None:
    """Vectors and temperature after training and after loading, in another folder too: a run moves between machines."""
    with workshop() as (folder, model):
        seen: dict[str, Any] = {}
        save_aligned = Run.save_aligned

        def keep(self: Run, **facts: Any) -> None:
            save_aligned(self, **facts)
            seen.update(
                vectors=self.encoder.embed(texts_of(self)), τ=float(self.encoder.log_inverse_temperature.detach())
            )

        with replaced(Run, "save_aligned", keep):
            trained(folder / "run", model)
        (folder / "run").rename(folder / "moved")
        run = load_run(folder / "moved", graph=tiny_graph())
        assert torch.equal(run.encoder.embed(texts_of(run)), seen["vectors"])
        assert float(run.encoder.log_inverse_temperature.detach()) == seen["τ"] != float(np.float32(np.log(1 / 0.05)))


def test_stop_and_resume_equals_uninterrupted() -> None:
    """Weights, optimiser and metrics, with dropout and KL to the base model; stopped after a save and between two."""
    with workshop() as (folder, model):
        trained(folder / "whole", model, **{"objective.kl_weight": 1.0})
        whole = learned(folder / "whole")
        for stop_after, save_every in ((3, 1), (5, 0)):
            settings = {**SETTINGS, "training.save_every": save_every, "objective.kl_weight": 1.0}
            resumed = folder / f"resumed-{stop_after}"
            stopped_and_resumed(resumed, model, stop_after=stop_after, settings=settings)
            found = learned(resumed)
            assert found.keys() == whole.keys()
            assert all(torch.equal(found[name], whole[name]) for name in whole)
            losses, expected = ([line["loss"] for line in read_metrics(path)] for path in (resumed, folder / "whole"))
            assert losses == expected
        assert all(line["kl"] > 0 for line in read_metrics(folder / "whole")[1:])


def test_wrong_fingerprint_raises() -> None:
    with workshop() as (folder, model):
        trained(folder / "run", model)
        other = dataclasses.replace(tiny_graph(), entity_names=("x", "ada b", "bo", "cy", "dan", "eve"))
        with pytest.raises(RunError, match="graph has changed"):
            api.train(other, out=folder / "run", resume=True)
        save_tiny_model(Path(model), seed=5)
        with pytest.raises(RunError, match="wanted fingerprint"):
            load_run(folder / "run", graph=tiny_graph())


def test_index_of_other_weights_is_refused() -> None:
    with workshop() as (folder, model):
        run = trained(folder / "run", model)
        api.open_index(run)
        assert api._fresh_index(run) is not None
        with torch.no_grad():
            next(iter(run.encoder.trainable().values())).add_(0.5)
        assert api._fresh_index(run) is None


def test_a_run_is_never_overwritten_and_never_resumed_with_other_settings() -> None:
    with workshop() as (folder, model):
        trained(folder / "run", model)
        with pytest.raises(RunError, match="wanted a new folder"):
            trained(folder / "run", model)
        with pytest.raises(ConfigError, match=r"training\.batch_size: saved 3, found 4"):
            api.train(tiny_graph(), out=folder / "run", resume=True, settings={"training.batch_size": 4})


def temperature_is_not_saved() -> AbstractContextManager[None]:
    """Load with the temperature at its start. METHOD.md §7.2."""
    right = run_module.read_alignment

    def wrong(path: Path) -> dict[str, Any]:
        return {**right(path), "log_inverse_temperature": float(np.float32(np.log(1 / 0.05)))}

    return replaced(run_module, "read_alignment", wrong)


@contextlib.contextmanager
def dropout_goes_on_from_the_process() -> Iterator[None]:
    """Draw dropout from the process's generator, which a restart begins anew."""

    @contextlib.contextmanager
    def wrong(seed: int, step: int, device: Any) -> Iterator[None]:
        yield

    with replaced(train_module, "_step_randomness", wrong):
        torch.manual_seed(0)
        yield


def optimizer_starts_anew() -> AbstractContextManager[None]:
    return replaced(torch.optim.AdamW, "load_state_dict", lambda self, state: None)


def any_fingerprint_will_do() -> AbstractContextManager[None]:
    """Reuse cached vectors whatever the weights. METHOD.md §7.5."""
    return replaced(Encoder, "fingerprint", lambda self: "same")


BREAKS = {
    "the temperature is not saved": temperature_is_not_saved,
    "dropout goes on from the process": dropout_goes_on_from_the_process,
    "the optimiser starts anew": optimizer_starts_anew,
    "any fingerprint will do": any_fingerprint_will_do,
}
CHECKS = {
    "the temperature is not saved": "test_a_saved_run_encodes_the_same_bits",
    "dropout goes on from the process": "test_stop_and_resume_equals_uninterrupted",
    "the optimiser starts anew": "test_stop_and_resume_equals_uninterrupted",
    "any fingerprint will do": "test_index_of_other_weights_is_refused",
}
