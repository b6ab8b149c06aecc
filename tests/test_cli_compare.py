"""The commands that compare, from the command line to the files that they leave, on a tiny graph and a tiny model."""

import json
from pathlib import Path

import pytest

from pykalm import cli
from pykalm.evaluate.bootstrap import METRICS
from tests.learn.workshop import SETTINGS, as_options, write_graph
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep of two variants and one seed, made by the command line."""
    folder = tmp_path_factory.mktemp("sweep")
    graph, model = write_graph(folder / "graph"), save_tiny_model(folder / "model")
    options = ["--graph", str(graph), "--model", str(model), "--out", str(folder / "out"), *as_options(SETTINGS)]
    sweep = ["--variants", "reference, no-margin", "--seeds", "0", "--steps", "2"]
    assert cli.main(["ablate", *options, *sweep]) == 0
    return folder / "out"


def run(swept: Path, name: str = "reference") -> str:
    return str(swept / name / "seed-0")


def test_a_sweep_is_shown_again_from_its_files(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = swept.parent
    options = [
        "--graph",
        str(folder / "graph"),
        "--model",
        str(folder / "model"),
        "--out",
        str(swept),
        *as_options(SETTINGS),
    ]
    sweep = ["--variants", "reference,no-margin", "--seeds", "0", "--steps", "2"]
    assert cli.main(["ablate", *options, *sweep, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((swept / "ablation.json").read_text(encoding="utf-8"))
    assert cli.main(["ablate", *options, *sweep]) == 0
    printed = capsys.readouterr()
    assert "no-margin" in printed.out
    assert "no-margin, seed 0 (2 of 2)" in printed.err


def test_runs_are_compared(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", run(swept), run(swept, "no-margin"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["runs"]] == ["reference/seed-0", "no-margin/seed-0"]
    assert result["num_triples"] == 5
    assert cli.main(["compare", run(swept), run(swept, "no-margin"), "--split", "valid"]) == 0
    assert "no-margin/seed-0" in capsys.readouterr().out
    assert cli.main(["evaluate", "links", run(swept), "--baseline"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", run(swept), "--baseline"]) == 0
    assert "unaligned" in capsys.readouterr().out


def test_answers_are_reranked_and_saved(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "rerank", run(swept), "--k", "5", "--valid-limit", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    results = Path(run(swept)) / "results"
    assert printed == json.loads((results / "rerank.json").read_text(encoding="utf-8"))
    assert (printed["k"], printed["split"], printed["valid"]["num_triples"]) == (5, "test", 4)
    links = json.loads((results / "links.json").read_text(encoding="utf-8"))
    assert printed["plain"] == pytest.approx(links["mean"], rel=1e-12)  # summed in another order
    assert set(printed["difference"]) == set(METRICS)
    for name in METRICS:
        assert printed["difference"][name]["mean"] == pytest.approx(printed["reranked"][name] - printed["plain"][name])
    tried = {(mix["weight"], mix["normalisation"]): mix["mrr"] for mix in printed["valid"]["tried"]}
    assert (
        printed["valid"]["reranked"]["mrr"] == max(tried.values()) == tried[printed["weight"], printed["normalisation"]]
    )
    lines = (results / "rerank.ranks.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 10
    assert cli.main(["evaluate", "rerank", run(swept), "--limit", "2", "--valid-limit", "2"]) == 0
    assert "reranked" in capsys.readouterr().out
    assert (results / "rerank.2-triples.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare"],
        ["compare", "somewhere"],
        ["evaluate", "rerank", "somewhere", "--k", "1"],
        ["ablate", "--graph", "world"],
        ["ablate", "--graph", "world", "--out", "x", "--seeds", "1,two"],
        ["ablate", "--graph", "world", "--out", "x", "--variants", "nonsense"],
        ["ablate", "--out", "x"],
    ],
)
def test_wrong_usage_ends_with_two_and_a_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip()
    assert "Traceback" not in printed.err


def test_the_split_on_which_the_weight_is_chosen_is_not_measured(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "rerank", run(swept), "--split", "valid"]) == 2
    assert "found valid, on which the weight is chosen" in capsys.readouterr().err
