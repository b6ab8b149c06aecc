"""Claims about what `train` takes: folders are folders wherever one stands, and None is a value like others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pykalm import api
from pykalm.config import Config, load_config
from pykalm.errors import ConfigError
from pykalm.graph.catalogue import load_graph
from pykalm.graph.graph import KnowledgeGraph
from tests.laws.common import tiny_graph
from tests.learn.workshop import write_graph
from tests.tiny_models import save_tiny_model

Taken = tuple[Config, KnowledgeGraph]


class Stopped(Exception):
    """Says that the training would begin."""


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a call of `train` that stops where the run would be made, and gives settings and graph."""

    def take(*arguments: Any, **settings: Any) -> Taken:
        found: list[Taken] = []

        def new_run(path: Path, config: Config, graph: KnowledgeGraph, **_: object) -> None:
            found.append((config, graph))
            raise Stopped

        monkeypatch.setattr(api, "new_run", new_run)
        with pytest.raises(Stopped):
            api.train(*arguments, out=tmp_path / "run", **settings)
        return found[0]

    return take


def test_a_path_is_a_folder_even_where_a_graph_has_that_name(
    take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_graph(tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    for given in (Path("world"), "./world", str(folder)):
        config, graph = take(given)
        assert (graph.num_entities, config.graph) == (20, str(folder.resolve())), given
    assert take(settings={"graph": Path("world")})[1].num_entities == 20
    config, graph = take("world")
    assert graph.num_entities > 100
    assert config.graph == "world"


def test_a_folder_in_the_working_directory_is_kept_from_the_root(
    take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_graph(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert take("mine")[0].graph == str(folder.resolve())
    assert take(config=load_config(None, ["graph=mine"]))[0].graph == str(folder.resolve())
    assert take(tiny_graph())[0].graph == "people"


def test_a_run_on_a_folder_opens_and_goes_on_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(tmp_path / "here" / "world")
    model = save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "here")
    steps = {"training.max_steps": 1, "training.batch_size": 4, "training.device": "cpu"}
    api.train(Path("world"), out=tmp_path / "run", model=model, settings=steps)
    assert api.train("./world", out=tmp_path / "run", resume=True).graph.num_entities == 20
    again = load_graph(tmp_path / "here" / "world")
    assert api.train(again, out=tmp_path / "run", resume=True).config.graph == str((tmp_path / "here/world").resolve())
    monkeypatch.chdir(tmp_path)
    assert api.load_run(tmp_path / "run").graph.num_entities == 20
    assert api.train(out=tmp_path / "run", resume=True).graph.num_entities == 20


def test_none_is_a_value(take: Any) -> None:
    training = take("world", settings={"training.validation_entities": None, "training.validation_triples": None})[0]
    assert training.training.validation_entities is None
    assert training.training.validation_triples is None
    kept = load_config(None, ["graph=world", "model=some-model", "training.max_steps=7"])
    config = take(None, model=None, config=kept, settings={"training.max_steps": None})[0]
    assert (config.graph, config.model, config.training.max_steps) == ("world", "some-model", None)


def test_paths_and_numpy_numbers_are_plain_values(take: Any, tmp_path: Path) -> None:
    settings = {"training.batch_size": np.int64(8), "training.learning_rate": np.float32(0.5), "seed": np.array(3),
                "text.descriptions": np.bool_(False)}  # fmt: skip
    config = take("world", model=tmp_path / "model", settings=settings)[0]
    assert config.model == str(tmp_path / "model")
    assert (config.training.batch_size, config.training.learning_rate, config.seed) == (8, 0.5, 3)
    assert config.text.descriptions is False


@pytest.mark.parametrize("value", [object(), {1, 2}, 3j])
def test_a_value_that_no_setting_has_is_named(value: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.epochs: wanted a number"):
        api.train("world", out=tmp_path / "run", settings={"training.epochs": value})
    with pytest.raises(ConfigError, match="model: wanted"):
        api.train("world", out=tmp_path / "run", model=value)  # type: ignore[arg-type]
