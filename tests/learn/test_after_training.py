"""Claims about the public calls on a trained run: what they measure, where they save it, what they reuse."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pykalm import api, cli
from pykalm.errors import GraphError
from pykalm.evaluate import links
from pykalm.evaluate.ranking import RankMetrics, RankTable, rank_metrics
from pykalm.model.run import Run
from tests.laws.common import tiny_graph
from tests.learn.workshop import write_graph

Train = Callable[..., Run]


def test_every_kind_of_measurement_has_a_file_of_its_own(train: Train, tmp_path: Path) -> None:
    run, other = train(), write_graph(tmp_path / "other")
    label = f"other-{api.load_graph(other).fingerprint()[:6]}"
    calls = {
        "links": {},
        "links.valid": {"split": "valid"},
        "links.baseline": {"baseline": True},
        "links.train.3-triples": {"split": "train", "limit": 3},
        f"links.{label}": {"graph": other},
        f"links.{label}.2-triples.baseline": {"graph": str(other), "limit": 2, "baseline": True},
    }
    reports = {name: api.evaluate_links(run, **options) for name, options in calls.items()}  # type: ignore[arg-type]
    assert sorted(path.name for path in (run.path / "results").glob("*.json")) == sorted(
        f"{name}.json" for name in calls
    )
    for name, report in reports.items():
        saved = json.loads((run.path / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert saved == json.loads(json.dumps(report.to_dict()))
        assert saved["aligned"] == ("baseline" not in name)
        assert saved["graph"] == ("other" if "other" in name else "people")


def test_the_unaligned_model_is_the_one_that_training_began_with(train: Train, model: str) -> None:
    """Its ranks are those of an encoder without adapters, however far the run has learned."""
    run = train(training__learning_rate=0.1)
    moved, still = api.evaluate_links(run, split="train"), api.evaluate_links(run, split="train", baseline=True)
    fresh = train("fresh", training__learning_rate=1e-30, training__epochs=0.01)
    begun = api.evaluate_links(fresh, split="train")
    assert still.tail.realistic.tolist() == begun.tail.realistic.tolist()
    assert still.head.realistic.tolist() == begun.head.realistic.tolist()
    assert still.mean != moved.mean


def test_entity_vectors_are_saved_once_and_used_by_predictions(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train()
    api.evaluate_links(run)
    monkeypatch.setattr(api, "build_index", None)  # calling it would fail
    prediction = api.predict(run, head="ada", relation="knows", k=6)
    assert {answer.name: answer.known_in for answer in prediction.answers if answer.known_in} == {
        "bo": "train",
        "cy": "train",
    }
    hidden = api.predict(run, head="ada", relation="knows", k=6, hide_known=True)
    assert {answer.name for answer in hidden.answers} == {"ada", "ada b", "dan", "eve"}
    backwards = api.predict(run, tail="eve", relation="knows", k=6)
    assert {answer.name: answer.known_in for answer in backwards.answers if answer.known_in} == {"cy": "test"}
    free = api.predict(run, head="zoe", description="a poet", relation="knows", k=2)
    assert (free.entity.id, free.how, len(free.answers)) == (None, "free text", 2)


def test_graphs_of_one_name_and_graphs_with_slashes_have_files_of_their_own(train: Train, tmp_path: Path) -> None:
    run = train()
    one, two = write_graph(tmp_path / "a" / "same"), write_graph(tmp_path / "b" / "same", num_triples=40)
    slashed = dataclasses.replace(tiny_graph(), name="../out/of it")
    for graph in (one, two, slashed):
        api.evaluate_links(run, graph=graph, limit=1)
    names = {path.name for path in (run.path / "results").iterdir()}
    assert len(names) == 6
    assert len([name for name in names if name.startswith("links.same-")]) == 4
    assert len([name for name in names if name.startswith("links._out_of_it-")]) == 2


def test_the_split_that_is_asked_is_a_setting(train: Train) -> None:
    run = train(evaluation__split="valid")
    assert api.evaluate_links(run).split == "valid"
    assert api.evaluate_links(run, split="test").split == "test"


def test_what_cannot_be_saved_is_shown_all_the_same(
    train: Train, capsys: pytest.CaptureFixture[str], graph_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the folders would be made: neither results nor index can be written."""
    run = train(graph=graph_folder, evaluation__split="valid")
    for name in ("results", "index"):
        (run.path / name).write_text("", encoding="utf-8")
    with pytest.raises(api.UnsavedReport, match="measured, but not saved") as raised:
        api.evaluate_links(run)
    assert raised.value.report.mean.num_queries == 20
    assert "not kept" in caplog.text
    assert len(api.predict(run, head="name 1", relation="knows", k=2).answers) == 2
    assert cli.main(["evaluate", "links", str(run.path), "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(raised.value.report.to_dict()))
    assert "not saved" in printed.err
    assert "Saved in" not in printed.err


def test_validation_measures_the_sample_of_valid(
    train: Train, graph_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Valid has ten triples: each is asked both ways, or those that the settings allow."""
    measured: list[RankTable] = []

    def remember(ranks: RankTable) -> RankMetrics:
        measured.append(ranks)
        return rank_metrics(ranks)

    for triples, queries in ((None, 20), (500, 20), (3, 6)):
        run = train(f"run-{triples}", graph=graph_folder, training__validation_triples=triples)
        validate = api._validation(run)
        assert validate is not None
        with monkeypatch.context() as patch:
            patch.setattr(links, "rank_metrics", remember)
            mrr = validate()
        ranks = measured.pop()
        assert (len(ranks), measured) == (queries, [])
        assert mrr == pytest.approx(float(np.mean(1 / ranks.realistic)))


def test_a_wrong_question_is_refused(train: Train) -> None:
    run = train()
    with pytest.raises(GraphError, match="has no entity 'zoe'"):
        api.predict(run, head="zoe", relation="knows")
    with pytest.raises(GraphError, match="no split 'hidden'"):
        api.evaluate_links(run, split="hidden")


def test_loading_again_gives_the_vectors_of_the_returned_run(train: Train) -> None:
    run = train(adapter__kind="full", training__learning_rate=1e-4)
    again = api.load_run(run.path, graph=tiny_graph())
    texts = run.verbalizer.candidates(torch.arange(6).numpy())
    assert torch.equal(again.encoder.embed(texts), run.encoder.embed(texts))
    assert again.encoder.fingerprint() == run.encoder.fingerprint()


def test_a_graph_is_checked_with_a_tokenizer_for_texts_that_are_cut(model: str, graph_folder: Path) -> None:
    """A token is a byte here: "name 3: thing 3" has 15, and the ten texts of two figures, "name 13: thing 13", 17."""
    cut = {
        limit: api.check_data(graph_folder, model=model, max_entity_tokens=limit).cut_texts for limit in (14, 15, 17)
    }
    assert cut == {14: 20, 15: 10, 17: 0}
    assert api.check_data(graph_folder).cut_texts is None


def test_the_bundled_graph_is_listed_with_its_folder() -> None:
    (world,) = [entry for entry in api.list_data() if entry.name == "world"]
    assert world.folder is not None
    assert (world.folder / "train.tsv").is_file()
