"""Claims about when a training compiles its layers: as it is told, or where it is long and the machine can."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from pykalm import api
from pykalm.errors import ModelError
from pykalm.learn.train import Trainer
from pykalm.model.run import Run

Train = Callable[..., Run]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the encoders whose layers are compiled, which is left out here."""
    encoders: list[Any] = []
    monkeypatch.setattr(api, "compile_layers", encoders.append)
    return encoders


@pytest.mark.parametrize(("setting", "long", "wanted"), [
    ("auto", True, 1), ("auto", False, 0), (True, False, 1), (False, True, 0),
])  # fmt: skip
def test_layers_are_compiled_as_told_or_in_a_long_training(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch, setting: Any, long: bool, wanted: int
) -> None:
    work: list[float] = []
    count = Trainer.num_tokens
    monkeypatch.setattr(Trainer, "num_tokens", lambda trainer: work.append(count(trainer)) or work[-1])
    monkeypatch.setitem(api.WORTH_COMPILING, "cpu", 1 if long else 1e12)
    run = train(training__compile=setting, training__max_steps=3, training__batch_size=4, objective__kl_weight=0)
    assert len(compiled) == wanted
    assert run.config.training.compile == setting
    if setting == "auto":
        batch = api.batch_builder(run).build(run.graph.triples("train")[:4], api.np.random.default_rng(0))
        assert work[0] % 3 == 0
        assert 0.5 < work[0] / (3 * batch.trie.num_nodes) < 2


def test_on_a_device_for_which_nothing_is_known_auto_leaves_layers_as_they_are(
    train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(api.WORTH_COMPILING, "cpu")
    train(training__max_steps=1)
    assert compiled == []


def test_a_resumed_run_is_as_long_as_it_was(train: Train, compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it may be short, but it shall drop what it would have dropped."""
    found: list[int] = []
    count = Trainer.num_tokens
    monkeypatch.setattr(Trainer, "num_tokens", lambda trainer: found.append(count(trainer)) or found[-1])
    run = train(training__max_steps=4, training__save_every=1)
    api.train(out=run.path, graph=run.graph, resume=True)
    assert len(found) == 2
    assert found[0] == found[1]


def test_auto_goes_on_without_a_compiler_and_says_so_where_true_does_not(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(encoder: Any) -> None:
        raise ModelError("training.compile: wanted to compile Llama, found no C++ compiler.")

    monkeypatch.setattr(api, "compile_layers", refuse)
    monkeypatch.setitem(api.WORTH_COMPILING, "cpu", 1)
    with caplog.at_level(logging.WARNING):
        train(training__max_steps=1)
    assert "found no C++ compiler" in caplog.text
    assert "steps take longer" in caplog.text
    with pytest.raises(ModelError, match="no C"):
        train("told", training__compile=True, training__max_steps=1)
