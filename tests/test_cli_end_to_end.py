"""The whole way through the command line, on a tiny graph and a tiny random model: check, train, measure, ask."""

import json
from pathlib import Path

import pytest

from pykalm import cli
from tests.tiny_models import save_tiny_model

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Chad": "N'Djamena", "Peru": "Lima", "Fiji": "Suva"}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a graph of countries and capitals."""
    folder = tmp_path_factory.mktemp("capitals")
    triples = [f"{country}\tcapital\t{city}" for country, city in CAPITALS.items()]
    for split, rows in (("train", triples[:4]), ("valid", triples[4:5]), ("test", triples[5:])):
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "relations.tsv").write_text("capital\thas the capital\tis the capital of\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps."""
    folder = tmp_path_factory.mktemp("end-to-end")
    model = save_tiny_model(folder / "model")
    settings = ["training.max_steps=2", "training.batch_size=4", "training.device=cpu", "training.evaluate_every=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    out = folder / "run"
    assert cli.main(["train", "--graph", str(graph), "--model", str(model), "--out", str(out), *options]) == 0
    return out


def test_a_run_is_not_overwritten(run: Path, graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_text(encoding="utf-8")
    assert cli.main(["train", "--graph", str(graph), "--out", str(run)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert (run / "config.yaml").read_text(encoding="utf-8") == before


def test_a_finished_run_resumes_to_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--out", str(run), "--resume", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"run": str(run)}
    assert "No step is left" in printed.err


def test_resume_with_other_settings_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--out", str(run), "--resume", "--set", "adapter.rank=3"]) == 2
    assert "adapter.rank" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--baseline"], ["--split", "valid"]])
def test_links_are_measured_as_json_and_in_a_file(
    run: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "links", str(run), "--json", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"graph", "split", "protocol", "mean", "head", "tail", "relations"} <= printed.keys()
    assert {"mr", "mrr", "hits_at_1", "hits_at_3", "hits_at_10"} <= printed["mean"].keys()
    # One triple, two directions, twelve entities: ranks lie between 1 and 12.
    assert printed["mean"]["num_queries"] == 2
    assert 1 <= printed["mean"]["mr"] <= 12
    saved = [json.loads(file.read_text(encoding="utf-8")) for file in (run / "results").glob("*.json")]
    assert printed in saved


def test_links_are_measured_as_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "links", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(f"Reading {run}: ")
    assert "has the capital" in printed.out
    assert "MRR" in printed.out


def test_another_graph_is_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, row in (("train", "Kenya\tcapital\tNairobi"), ("test", "Ghana\tcapital\tAccra")):
        (tmp_path / f"{split}.tsv").write_text(f"{row}\n", encoding="utf-8")
    assert cli.main(["evaluate", "links", str(run), "--graph", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graph"] == tmp_path.name


@pytest.mark.parametrize(
    ("options", "known"),
    [(["--head", "France"], {"Paris": "train"}), (["--tail", "Lima"], {"Peru": "valid"})],
)
def test_answers_say_which_split_knows_them(
    run: Path, options: list[str], known: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", str(run), *options, "--relation", "capital", "-k", "12", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len(answers) == 12
    assert {answer["name"]: answer["known_in"] for answer in answers if answer["known_in"]} == known


def test_known_answers_can_be_hidden(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--head", "France", "--relation", "capital", "-k", "12", "--hide-known", "--json"]
    assert cli.main(["predict", str(run), *options]) == 0
    names = [answer["name"] for answer in json.loads(capsys.readouterr().out)["answers"]]
    assert len(names) == 11
    assert "Paris" not in names


def test_free_text_needs_no_entity(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["predict", str(run), "--head", "Atlantis: an island", "--relation", "capital"]
    assert cli.main(question) == 1
    assert "--free-text" in capsys.readouterr().err
    assert cli.main([*question, "--free-text"]) == 0
    assert "Atlantis" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "options", "found"),
    [
        ("predict", ["--head", "Fijj", "--relation", "capital"], "'Fiji'"),
        ("predict", ["--head", "Fiji", "--relation", "capitol"], "The nearest is 'capital'"),
        ("predict", ["--free-text", "--head", "Atlantis", "--relation", "capitol"], "The nearest is 'capital'"),
        ("links", ["--split", "tset"], "has no split 'tset'"),
        ("links", ["--graph", "wrold"], "The nearest is 'world'"),
        ("qa", ["--split", "tset"], "has no split 'tset'"),
        ("geometry", ["--split", "tset"], "has no split 'tset'"),
        ("rerank", ["--split", "tset"], "has no split 'tset'"),
    ],
)
def test_what_the_graph_lacks_is_said_before_the_model_is_read(
    command: str,
    options: list[str],
    found: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load_base(*_: object, **__: object) -> None:
        raise AssertionError("the model is read")

    monkeypatch.setattr("pykalm.model.run.load_base", load_base)
    words = [command] if command == "predict" else ["evaluate", command]
    assert cli.main([*words, str(run), *options]) == 1
    assert found in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "links", str(tmp_path)]) == 1
    assert "wanted a run folder" in capsys.readouterr().err
