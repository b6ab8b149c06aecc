"""`kalm evaluate language` and `kalm evaluate geometry`, the whole way, on a tiny graph and a tiny random model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import pykalm
from pykalm import api_language, cli
from pykalm.errors import TrainingError
from tests.tiny_models import save_tiny_model

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Chad": "N'Djamena", "Peru": "Lima", "Fiji": "Suva"}
NOTE = "A sentence of six words here. Another one that has seven words now. And this is the third of them! "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps on a graph of capitals."""
    folder = tmp_path_factory.mktemp("measures")
    triples = [f"{country}\tcapital\t{city}" for country, city in CAPITALS.items()]
    for split, rows in (("train", triples[:3]), ("valid", triples[3:4]), ("test", triples[4:])):
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = save_tiny_model(folder / "model")
    settings = {
        "training.max_steps": 2, "training.batch_size": 3, "training.device": "cpu", "training.precision": "fp32",
        "training.learning_rate": 0.05, "objective.temperature": 0.2,
    }  # fmt: skip
    pykalm.train(folder, out=folder / "run", model=model, settings=settings)
    return folder / "run"


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a plain text; there is no WikiText on this machine."""
    monkeypatch.setenv("KALM_DATA", "")
    (tmp_path / "note.txt").write_text(NOTE * 3, encoding="utf-8")
    return tmp_path / "note.txt"


def saved(run: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "results" / name).read_text(encoding="utf-8"))
    return found


def test_language_is_measured_of_both_models(run: Path, note: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", str(note), "--window", "64", "--stride", "32", "--both", "--json"]
    assert cli.main(["evaluate", "language", str(run), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["unaligned", "aligned"]
    for label, name in (("unaligned", "language.baseline.json"), ("aligned", "language.json")):
        assert printed[label] == saved(run, name)
        assert printed[label]["aligned"] is (label == "aligned")
        found = printed[label]["perplexity"]["note"]
        assert (found["window"], found["stride"], found["num_tokens"]) == (64, 32, len(NOTE * 3))
        assert found["token"] == pytest.approx(math.exp(-found["log_likelihood"] / found["num_tokens"]))
    assert printed["aligned"]["perplexity"]["note"]["token"] != printed["unaligned"]["perplexity"]["note"]["token"]


def test_a_limit_has_a_file_of_its_own(run: Path, note: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", str(note), "--limit-tokens", "50", "--baseline"]
    assert cli.main(["evaluate", "language", str(run), *options]) == 0
    table = capsys.readouterr().out
    assert "Perplexity" in table
    assert "unaligned" in table
    found = saved(run, "language.50-tokens.baseline.json")
    assert found["perplexity"]["note"]["num_tokens"] <= 50  # type: ignore[index]


def test_one_text_needs_no_list(run: Path, note: Path) -> None:
    found = pykalm.evaluate_language(pykalm.load_run(run), texts=str(note), window=100)
    assert list(found.perplexity) == ["note"]
    assert found.about["precision"] == "float32"


def test_a_text_that_is_not_there_is_said(run: Path, note: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "language", str(run)]) == 2
    assert "$KALM_DATA" in capsys.readouterr().err
    assert cli.main(["evaluate", "language", str(run), "--text", "nowhere.txt"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert cli.main(["evaluate", "language", str(run), "--text", str(note), "--window", "4096"]) == 2
    assert "at most 512 tokens" in capsys.readouterr().err


def test_geometry_is_measured_and_drawn(run: Path, note: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "geometry", str(run), "--sentences", str(note), "--both", "--json"]) == 0
    streams = capsys.readouterr()
    printed = json.loads(streams.out)
    for label, name in (("unaligned", "geometry.baseline.json"), ("aligned", "geometry.json")):
        found = printed[label]
        assert found == saved(run, name)
        assert set(found["groups"]) == {"queries", "candidates", "sentences"}
        assert [found["groups"][group]["num_vectors"] for group in found["groups"]] == [12, 12, 3]
        assert found["theorem_1"]["num_negatives"] == [1, 2, 4, 11]
        gap = found["theorem_1"]["normalised_loss"][-1] - found["theorem_1"]["limit"]
        assert gap == pytest.approx(math.log(12 / 11), abs=1e-9)
        assert np.shape(found["similarity"]["triples"]["matrix"]) == (2, 2)
        assert len(found["similarity"]["sentences"]["labels"]) == 3
    temperatures = {label: printed[label]["theorem_1"]["temperature"] for label in printed}
    assert temperatures["aligned"] == temperatures["unaligned"] != 0.2  # the one that was learned
    assert f"Drawn by: kalm report {run}" in streams.err


def test_geometry_without_wikitext_measures_the_rest_and_says_so(
    run: Path, note: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert cli.main(["evaluate", "geometry", str(run), "--split", "valid", "--limit", "4"]) == 0
    assert "no plain sentences are measured" in caplog.text
    table = capsys.readouterr().out
    assert "Theorem 1" in table
    assert "sentences" not in table.replace("no plain sentences", "")
    found = saved(run, "geometry.valid.4-entities.json")
    assert found["groups"]["queries"]["num_vectors"] == 4  # type: ignore[index]
    assert cli.main(["evaluate", "geometry", str(run), "--sentences", "wikitext2"]) == 2


def test_results_that_cannot_be_written_are_printed_all_the_same(
    run: Path, note: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise TrainingError("disk full. Free some space.")

    monkeypatch.setattr(api_language.LanguageReport, "save", full)
    assert cli.main(["evaluate", "language", str(run), "--text", str(note), "--json"]) == 1
    streams = capsys.readouterr()
    assert "note" in json.loads(streams.out)["perplexity"]
    assert "measured, but not saved. disk full" in streams.err
    assert "Saved in" not in streams.err
