"""What the tests of training share: a tiny model on disk, made once, and short trainings on a graph of six people."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pykalm import api
from pykalm.model.run import Run
from tests.laws.common import tiny_graph
from tests.learn.workshop import SETTINGS, write_graph
from tests.tiny_models import save_tiny_model

Train = Callable[..., Run]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny model."""
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def graph_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small graph; not to be changed."""
    return write_graph(tmp_path_factory.mktemp("graph"))


SIX_STEPS = {**SETTINGS, "training.batch_size": 2, "training.epochs": 2, "training.evaluate_every": 1}


@pytest.fixture(scope="session")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an uninterrupted run of what `train` does by itself."""
    return api.train(tiny_graph(), out=tmp_path_factory.mktemp("whole") / "run", model=model, settings=SIX_STEPS).path


@pytest.fixture
def train(model: str, tmp_path: Path) -> Train:
    """Return a function that trains on the six people (6 triples, 3 steps of 2) in a folder of the test."""

    def train_in(name: str = "run", *, graph: Any = None, watch: Any = None, **changes: Any) -> Run:
        settings = {key.replace("__", "."): value for key, value in changes.items()}
        return api.train(
            graph or tiny_graph(), out=tmp_path / name, model=model, settings=SIX_STEPS | settings, watch=watch
        )

    return train_in
