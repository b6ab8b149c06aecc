"""Claims about settings: where values come from, and that every problem is said at once, with its place."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pykalm.config import Config, load_config
from pykalm.errors import ConfigError
from pykalm.settings import FIELDS


def write(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems_of(file: Path | None, *overrides: str, **defaults: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides, **defaults)
    return str(caught.value)


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path, "training:\n  epochs: 2\n  batch_size: 8\n")
    config = load_config(file, ["training.batch_size=9"], graph="world", training={"epochs": 1, "max_steps": 5})
    assert (config.training.epochs, config.training.batch_size, config.training.max_steps) == (2, 9, 5)
    assert config.graph == "world"


def test_a_section_object_is_a_default() -> None:
    first = load_config(None, ["adapter.rank=3"], graph="world")
    assert load_config(None, graph="other", adapter=first.adapter).adapter.rank == 3


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-3 (no dot) as a text.
    config = load_config(write(tmp_path, "graph: world\ntraining: {learning_rate: 1e-3}\n"))
    assert config.training.learning_rate == 0.001


def test_resolved_settings_are_a_settings_file(tmp_path: Path) -> None:
    config = load_config(None, ["adapter.targets=[q_proj, v_proj]", "training.patience=3"], graph="wörld: a")
    assert load_config(write(tmp_path, config.to_yaml())) == config
    assert list(yaml.safe_load(config.to_yaml())) == list(Config.model_fields)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_config(None, graph="world").training.epochs = 3  # type: ignore[misc]


def test_an_empty_section_holds_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "graph: world\ntext:\n")) == load_config(None, graph="world")


def test_all_problems_are_said_at_once_with_their_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "graph: world\ntraining:\n  epoch: 3\n  batch_size: 0\nadapter:\n  kind: lorra\n")
    message = problems_of(file, "objective.margin=-1", "nonsense")
    assert message.startswith("5 problems")
    assert f"{file}:3: training.epoch is not a setting. Did you mean training.epochs?" in message
    assert f"{file}:4: training.batch_size: wanted an integer ≥ 1, found 0." in message
    assert f"{file}:6: adapter.kind: wanted lora or full, found 'lorra'." in message
    assert "--set objective.margin=-1: objective.margin: wanted a number ≥ 0, found -1." in message
    assert "--set nonsense: wanted key=value" in message


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("rank=8", "adapter.rank"),
        ("training.lerning_rate=1", "training.learning_rate"),
        ("grahp=1", "graph"),
        ("trainig.epochs=1", "training.epochs"),
        ("training.lr=1", "training.learning_rate"),
        ("objective.lambda=1", "objective.implicit_weight"),
    ],
)
def test_the_nearest_key_is_suggested(override: str, suggestion: str) -> None:
    assert f"Did you mean {suggestion}?" in problems_of(None, override, graph="world")


def test_a_missing_graph_is_said() -> None:
    message = problems_of(None)
    assert "graph: wanted a text, found nothing" in message
    assert "Give one: --graph" in message


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("graph: world\ntraining: [1\nadapter: {}\n", 3, "wanted YAML"),
        ("graph: !!python/object:os.system x\n", 1, "constructor"),
        ("graph: world\n\tmodel: x\n", 2, "wanted YAML"),
    ],
)
def test_a_yaml_error_has_a_line(tmp_path: Path, text: str, line: int, part: str) -> None:
    message = problems_of(write(tmp_path, text))
    assert f"settings.yaml:{line}: " in message
    assert part in message


def test_a_file_that_is_no_mapping_or_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    assert "wanted `key: value` lines" in problems_of(write(tmp_path, "- a\n- b\n"))
    assert "nowhere.yaml" in problems_of(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("graph: Zürich".encode("latin-1"))
    assert "UTF-8" in problems_of(tmp_path / "latin.yaml")


def test_a_key_that_is_set_twice_is_refused(tmp_path: Path) -> None:
    message = problems_of(write(tmp_path, "graph: a\ntraining:\n  epochs: 1\n  epochs: 2\n"))
    assert "settings.yaml:4: training.epochs is set twice, first at" in message


def test_a_section_must_hold_keys() -> None:
    assert "training is a section" in problems_of(None, "training=5", graph="world")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["objective.explicit=false", "objective.implicit=false"], "at least one of objective.explicit"),
        (["adapter.kind=full", "adapter.quantize=4bit"], "4-bit base"),
        (
            ["training.row_tokens=4096", "training.chunk_tokens=2048"],
            "at most training.chunk_tokens (2048); found 4096",
        ),
        (["training.learning_rate=.nan"], "training.learning_rate: wanted auto or a number > 0, found nan"),
        (["training.learning_rate=true"], "training.learning_rate: wanted auto or a number > 0, found true"),
        (["training.batch_size=false"], "training.batch_size: wanted an integer ≥ 1, found false"),
        (["training.max_steps=true"], "training.max_steps: wanted an integer ≥ 1 or null, found true"),
        (["training=true"], "training is a section: wanted `key: value` lines below it, found true"),
        (["seed=null"], "found null"),
        (["training.clip_norm=.inf"], "training.clip_norm: wanted a number > 0, found inf"),
        (["training.trackers=[tensorbord]"], "wanted a list of tensorboard or wandb"),
        (["text.descriptions=maybe"], "wanted true or false, found 'maybe'"),
        (["seed=-1"], "seed: wanted an integer ≥ 0 and < 4294967296, found -1"),
        (["training.epochs=[1"], "the value is not YAML"),
    ],
)
def test_values_that_cannot_work_are_refused(overrides: list[str], part: str) -> None:
    assert part in problems_of(None, *overrides, graph="world")


def test_every_setting_has_a_meaning() -> None:
    assert [key for key, field in FIELDS.items() if not (field.description or "").endswith(".")] == []
