"""A damaged run folder, or one whose graph or model changed, is one clear message; nothing in it is lost."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm import cli
from pykalm.learn.state import METRICS_FILE, STATE_FILE
from tests.learn.workshop import SETTINGS, as_options, leftovers, write_graph
from tests.tiny_models import save_tiny_model

Damage = Callable[[Path], object]
ALIGNMENT = "adapter/alignment.json"
WEIGHTS = "adapter/adapter_model.safetensors"
ADAPTER = "adapter/adapter_config.json"


@pytest.fixture(scope="module")
def trained(model: str, graph_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    options = as_options({**SETTINGS, "training.max_steps": 2})
    assert cli.main(["train", "--graph", str(graph_folder), "--model", model, "--out", str(run), *options]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def cut(name: str, size: int) -> Damage:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:size])


def put(name: str, content: bytes) -> Damage:
    return lambda run: (run / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda run: (run / name).unlink()


def edit_json(name: str, **values: Any) -> Damage:
    return lambda run: (run / name).write_text(json.dumps({**json.loads((run / name).read_text()), **values}))


def edit_config(old: str, new: str) -> Damage:
    def edit(run: Path) -> None:
        text = (run / "config.yaml").read_text(encoding="utf-8")
        assert text.count(old) == 1
        (run / "config.yaml").write_text(text.replace(old, new), encoding="utf-8")

    return edit


def save_as_state(value: Any) -> Damage:
    return lambda run: torch.save(value, run / STATE_FILE)


def require_one_message(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    begun = re.match(r"(No step is left.*\n)?(Reading .* \.\.\.\n)?", printed.err)
    assert printed.err[begun.end() if begun else 0 :].startswith("kalm: ")
    assert words in printed.err
    assert "An error of kalm" not in printed.err, printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut(str(STATE_FILE), 5000), "latest.pt: wanted the state of a training, found a damaged file"),
        (cut(str(STATE_FILE), 0), "found a damaged file"),
        (put(str(STATE_FILE), b"garbage" * 99), "found a damaged file"),
        (save_as_state([1]), "found a damaged file"),
        (save_as_state({"parameters": [1], "fingerprints": {}}), "found a damaged file"),
        (put(METRICS_FILE, b"\xff\xfe garbage\n"), "training does not need it"),
        (put(METRICS_FILE, b'[1]\n{"step": 1}\n'), "training does not need it"),
        (put(METRICS_FILE, b'{"loss": 1}\n'), "training does not need it"),
        (edit_config("rank: 4", "rank: 3"), "restore config.yaml"),
        (remove("config.yaml"), "found no config.yaml"),
        (put("config.yaml", b": : ["), "wanted YAML"),
        (put("config.yaml", b"graph: world\nsurprise: 1\n"), "surprise is not a setting"),
    ],
)
def test_a_damaged_run_does_not_go_on(
    damage: Damage, words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run)
    code = 2 if "YAML" in words or "surprise" in words else 1
    capsys.readouterr()
    assert cli.main(["train", "--out", str(run), "--resume"]) == code
    printed = capsys.readouterr().err
    assert words in printed
    assert "An error of kalm" not in printed, printed
    assert leftovers(run) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut(WEIGHTS, 100), "damaged"),
        (remove(WEIGHTS), "damaged"),
        (put(ADAPTER, b"{"), "damaged"),
        (put(ADAPTER, b"[]"), "damaged"),
        (put(ADAPTER, b"{}"), "do not fit"),
        (remove(ALIGNMENT), "found no alignment.json yet"),
        (put(ALIGNMENT, b"\xff\x00"), "alignment.json: damaged"),
        (put(ALIGNMENT, b"[1]"), "alignment.json: damaged"),
        (edit_json(ALIGNMENT, format=2), "wanted format 1, found 2. Use the version of kalm"),
        (edit_json(ALIGNMENT, log_inverse_temperature="x"), "log_inverse_temperature missing or wrong"),
        (edit_json(ALIGNMENT, log_inverse_temperature=float("nan")), "log_inverse_temperature missing or wrong"),
        (edit_json(ALIGNMENT, templates=None), "templates missing or wrong"),
        (edit_json(ALIGNMENT, templates={"query": "{head}"}), "wanted the wordings"),
        (
            edit_json(
                ALIGNMENT, templates=dict.fromkeys(["name", "entity", "query", "candidate", "completion", "answer"], 1)
            ),
            "wanted texts",
        ),
        (edit_json(ALIGNMENT, text={"colour": "red"}), "alignment.json: damaged"),
        (edit_json(ALIGNMENT, model_fingerprint=3), "model_fingerprint missing or wrong"),
        (edit_config("max_entity_tokens: 50", "max_entity_tokens: 3"), "wanted the text settings of the training"),
        (remove("config.yaml"), "found no config.yaml"),
        (put("config.yaml", b": : ["), "cannot be read by this version"),
    ],
)
def test_a_damaged_run_is_not_used(damage: Damage, words: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(run)
    require_one_message(["evaluate", "links", str(run)], words, capsys)
    require_one_message(["predict", str(run), "--head", "e1", "--relation", "likes"], words, capsys)


def test_a_line_of_metrics_that_a_kill_cut_off_is_forgotten(run: Path) -> None:
    whole = (run / METRICS_FILE).read_bytes()
    (run / METRICS_FILE).write_bytes(whole + b'{"step": 3, "lo')
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    assert (run / METRICS_FILE).read_bytes() == whole


def test_a_damaged_index_is_built_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["predict", str(run), "--head", "e1", "--relation", "likes", "--json"]
    assert cli.main(question) == 0
    answers = capsys.readouterr().out
    for name, content in (("entities.safetensors", b"garbage"), ("index.json", b"[]"), ("index.json", b"\xff")):
        (run / "index" / name).write_bytes(content)
        assert cli.main(question) == 0
        assert capsys.readouterr().out == answers


def test_a_folder_killed_between_two_renames_is_read_where_it_lies_and_brought_back_by_the_next_training(
    run: Path,
) -> None:
    """A reader cannot know whether the writer was killed or is about to do its second rename, so it moves nothing."""
    (run / "adapter").rename(run / ".adapter-old")
    assert cli.main(["predict", str(run), "--head", "e1", "--relation", "likes"]) == 0
    assert leftovers(run) == [".adapter-old"]
    assert not (run / "adapter").exists()
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    assert leftovers(run) == []


def test_a_changed_tokenizer_is_refused_in_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A space before every text: the same vocabulary, the same model, other texts."""
    graph, model, run = write_graph(tmp_path / "graph"), save_tiny_model(tmp_path / "model"), tmp_path / "run"
    options = as_options({**SETTINGS, "training.max_steps": 1})
    assert cli.main(["train", "--graph", str(graph), "--model", str(model), "--out", str(run), *options]) == 0
    file = model / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(content), encoding="utf-8")
    require_one_message(["train", "--out", str(run), "--resume"], "the texts has changed since", capsys)
    require_one_message(["evaluate", "links", str(run)], f"tokenizer of {str(model)!r}: wanted fingerprint", capsys)


def test_a_changed_graph_or_model_is_refused_in_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name in the graph, then a triple, then the weights of the base model; brought back, all goes on."""
    graph, model, run = write_graph(tmp_path / "graph"), save_tiny_model(tmp_path / "model"), tmp_path / "run"
    options = as_options({**SETTINGS, "training.max_steps": 2})
    go_on = ["train", "--out", str(run), "--resume"]
    assert cli.main(["train", "--graph", str(graph), "--model", str(model), "--out", str(run), *options]) == 0
    for file, old, new in (("entities.tsv", "name 3\t", "name three\t"), ("test.tsv", "likes", "knows")):
        text = (graph / file).read_text(encoding="utf-8")
        (graph / file).write_text(text.replace(old, new, 1), encoding="utf-8")
        require_one_message(go_on, "the graph has changed since", capsys)
        require_one_message(["evaluate", "links", str(run)], "graph", capsys)
        (graph / file).write_text(text, encoding="utf-8")
    save_tiny_model(model, seed=5)
    require_one_message(go_on, "the model has changed since", capsys)
    require_one_message(["evaluate", "links", str(run)], "base model", capsys)
    save_tiny_model(model)
    assert cli.main(go_on) == 0


def test_a_finished_run_goes_on_to_itself(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_graph_of_a_relative_folder_is_found_from_elsewhere_too(
    graph_folder: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = as_options({**SETTINGS, "training.max_steps": 1})
    monkeypatch.chdir(graph_folder.parent)
    given = ["--graph", graph_folder.name, "--model", model]
    assert cli.main(["train", *given, "--out", str(tmp_path / "run"), *options]) == 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "links", "run"]) == 0
