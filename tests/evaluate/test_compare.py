"""Runs compared from the files that link prediction leaves: nothing else of a run is there."""

import json
from pathlib import Path

import pytest

from pykalm.api_compare import compare_runs
from pykalm.errors import RunError, UsageError
from pykalm.evaluate.bootstrap import METRICS, difference_intervals, triple_scores
from pykalm.evaluate.links import LinkPredictionReport, evaluate_links
from pykalm.graph.graph import KnowledgeGraph
from tests.evaluate.fakes import (
    BORDERS,
    CAPITAL,
    FRANCE,
    GEORGIA,
    MADRID,
    SPAIN,
    STATE,
    FakeEncoder,
    FakeTexts,
    geography,
)

TEST = [(SPAIN, CAPITAL, MADRID), (FRANCE, BORDERS, GEORGIA), (FRANCE, BORDERS, STATE), (GEORGIA, BORDERS, STATE)]


def measure(
    folder: Path, name: str, *, graph: KnowledgeGraph | None = None, file: str = "links", split: str = "test"
) -> LinkPredictionReport:
    """Save what a made-up encoder of that name reaches in the results folder of a run that has nothing else."""
    report, _ = evaluate_links(
        graph or geography(test=TEST), FakeEncoder(name=name), FakeTexts(), split=split, about={"model": name}
    )
    report.save(folder / name / "results", file)
    return report


def test_runs_stand_beside_each_other_with_their_saved_figures(tmp_path: Path) -> None:
    reports = [measure(tmp_path, name) for name in ("a", "b", "c")]
    result = compare_runs([tmp_path / name for name in ("a", "b", "c")])
    assert [row["label"] for row in result["runs"]] == ["a", "b", "c"]
    assert [row["model"] for row in result["runs"]] == ["a", "b", "c"]
    assert (result["graph"], result["split"], result["num_triples"]) == ("geography", "test", 4)
    scores = [triple_scores(report.tail, report.head) for report in reports]
    for row, report, own in zip(result["runs"], reports, scores, strict=True):
        assert row["metrics"] == report.mean.to_dict()
        for name in METRICS:
            ends = row["intervals"][name]
            assert ends["low"] <= ends["mean"] <= ends["high"]
            assert ends["mean"] == pytest.approx(row["metrics"][name])
        if row["difference"] is not None:
            expected = {name: found.mean for name, found in difference_intervals(own, scores[0]).items()}
            assert {name: row["difference"][name]["mean"] for name in METRICS} == pytest.approx(expected)
    assert [row["difference"] is None for row in result["runs"]] == [True, False, False]
    json.dumps(result, allow_nan=False)


def test_a_difference_of_zero_is_not_called_sure(tmp_path: Path) -> None:
    measure(tmp_path, "a")
    result = compare_runs([tmp_path / "a", tmp_path / "a"])
    for found in result["runs"][1]["difference"].values():
        assert found == {"mean": 0.0, "low": 0.0, "high": 0.0, "excludes_zero": False}


def test_the_order_of_the_triples_does_not_count(tmp_path: Path) -> None:
    measure(tmp_path, "a")
    measure(tmp_path / "turned", "a", graph=geography(test=TEST[::-1]))
    result = compare_runs([tmp_path / "a", tmp_path / "turned" / "a"])
    assert result["runs"][0]["metrics"] == pytest.approx(result["runs"][1]["metrics"])
    assert {found["high"] for found in result["runs"][1]["difference"].values()} == {0.0}


def test_runs_of_one_name_are_named_by_more_of_their_paths(tmp_path: Path) -> None:
    measure(tmp_path / "one", "run")
    measure(tmp_path / "two", "run")
    result = compare_runs([tmp_path / "one" / "run", tmp_path / "two" / "run"])
    assert [row["label"] for row in result["runs"]] == ["one/run", "two/run"]


def test_the_unaligned_model_of_the_first_run_is_added_where_it_was_measured(tmp_path: Path) -> None:
    measure(tmp_path, "a")
    with pytest.raises(
        RunError, match=r"links\.baseline\.ranks\.tsv: .*found links\.ranks\.tsv.*--baseline --split test"
    ):
        compare_runs([tmp_path / "a"], baseline=True)
    measure(tmp_path, "a", file="links.baseline")
    result = compare_runs([tmp_path / "a"], baseline=True)
    assert [row["label"] for row in result["runs"]] == ["a", "a, unaligned"]


def test_another_split_or_limit_is_another_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        measure(tmp_path, name, file="links.valid.1-triples", split="valid")
    result = compare_runs([tmp_path / "a", tmp_path / "b"], split="valid", limit=1)
    assert result["split"] == "valid"
    with pytest.raises(RunError, match=r"wanted saved ranks, found links\.valid\.1-triples\.ranks\.tsv"):
        compare_runs([tmp_path / "a", tmp_path / "b"])


def test_measurements_that_differ_are_refused_and_what_differs_is_said(tmp_path: Path) -> None:
    measure(tmp_path, "a")
    others = {
        "triples": (geography(test=TEST[:-1]), "test", r"triples of \S+ only: 1, such as \(ge, bor, us-ga\)"),
        "split": (geography(valid=TEST, test=[(FRANCE, CAPITAL, MADRID)]), "valid", r"split: 'test' and 'valid'"),
        "candidates": (
            geography(train=[(SPAIN, CAPITAL, FRANCE)], valid=[], test=TEST),
            "test",
            r"number of candidates.* \(es, cap, madrid\)",
        ),
    }
    for name, (graph, split, message) in others.items():
        measure(tmp_path, name, graph=graph, split=split)
        with pytest.raises(RunError, match=message):
            compare_runs([tmp_path / "a", tmp_path / name])


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("cut off", lambda text: text[: len(text) // 2]),
        ("other columns", lambda text: text.replace("realistic", "mean", 1)),
        ("no number", lambda text: text.replace(".0\t", ".x\t", 1)),
        ("rank 0", lambda text: text.replace("madrid\ttail\t", "madrid\ttail\t0\t0.0\t0\t7\t")),
        ("empty", lambda text: ""),
    ],
)
def test_a_damaged_file_of_ranks_is_refused(tmp_path: Path, what: str, change: object) -> None:
    measure(tmp_path, "a")
    file = tmp_path / "a" / "results" / "links.ranks.tsv"
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")  # type: ignore[operator]
    with pytest.raises(RunError, match=r"links\.ranks\.tsv: damaged.*Measure it: kalm evaluate links"):
        compare_runs([tmp_path / "a", tmp_path / "a"])


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_models_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(UsageError, match=f"found {count}"):
        compare_runs([tmp_path] * count)
