"""Tables: every number that was measured stands in them, and they fit into 80 columns."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from pykalm.evaluate.links import evaluate_links
from pykalm.graph.catalogue import GraphEntry
from pykalm.graph.check import check_graph
from pykalm.report.tables import (
    catalogue_table,
    graph_check_table,
    link_prediction_table,
    metric_cells,
    prediction_table,
    relation_table,
)  # fmt: skip
from pykalm.use.predict import Answer, NamedEntity, Prediction
from tests.evaluate.fakes import FakeEncoder, FakeTexts, geography


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return str(text)


def row_of(text: str, *words: str) -> list[str]:
    """Return the cells of the one line that holds all these words."""
    (line,) = [line for line in text.splitlines() if all(word in line.split() for word in words)]
    return line.split()


def prediction(*, how: str = "name", others: tuple[NamedEntity, ...] = (), name: str = "France") -> Prediction:
    answers = (
        Answer(1, "paris", "Paris", "A city on the river Seine, known for museums and a tower " * 3, 0.91234, "train"),
        Answer(2, "b", "Brussels [EU]", "", -0.5, ""),
    )
    return Prediction("head", NamedEntity("fr", name, "A country."), how, others, "cap", "has capital", answers)


def test_metrics_are_printed_with_three_places() -> None:
    metrics = {"mr": 15969.04, "mrr": 0.0104, "hits_at_1": 0.5, "hits_at_3": 1.0, "hits_at_10": 1.0}
    assert metric_cells(metrics) == ["15,969.0", "0.010", "0.500", "1.000", "1.000"]


def test_link_prediction_table_has_a_row_for_each_model_and_side() -> None:
    results = {
        label: evaluate_links(geography(), FakeEncoder(name=label), FakeTexts())[0].to_dict()
        for label in ("unaligned", "aligned")
    }
    text = printed(link_prediction_table(results))
    cells = [row for row in map(str.split, text.splitlines()) if "mean" in row]
    expected = [["mean", *metric_cells(result["mean"])] for result in results.values()]  # type: ignore[arg-type]
    assert cells == expected
    assert row_of(text, "aligned", "head")[2:] == metric_cells(results["aligned"]["head"])  # type: ignore[arg-type]
    assert "geography, test" in text
    assert "both directions" in text


def test_relation_table_has_a_row_for_each_relation() -> None:
    result = evaluate_links(geography(), FakeEncoder(), FakeTexts())[0].to_dict()
    borders = result["relations"]["bor"]
    sides = [f"{borders[side]['mrr']:.3f}" for side in ("head", "tail")]
    assert row_of(printed(relation_table(result)), "borders")[1:] == ["1", *metric_cells(borders["mean"]), *sides]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_prediction_table_keeps_rank_name_score_and_split_in_a_narrow_terminal(width: int) -> None:
    text = printed(prediction_table(prediction()), width)
    assert "France → has capital → ?" in text
    assert row_of(text, "Paris")[:4] == ["1", "Paris", "0.912", "train"]
    assert row_of(text, "Brussels")[:5] == ["2", "Brussels", "[EU]", "-0.500", "–"]


def test_prediction_table_has_no_empty_column_where_nothing_is_described() -> None:
    bare = replace(prediction(), answers=(Answer(1, "paris", "Paris", "", 0.9, "train"),))
    assert "description" not in printed(prediction_table(bare))


def test_prediction_table_says_which_entity_was_taken() -> None:
    others = tuple(NamedEntity(f"us-{i}", "Georgia", "A state.") for i in range(8))
    text = printed(prediction_table(prediction(others=others, name="Georgia")))
    assert "9 entities bear this name; give an id" in text
    assert "taken fr Georgia: A country." in text
    assert "not   us-0 Georgia: A state." in text
    assert "and 3 more" in text


def test_prediction_table_says_that_free_text_is_known_nowhere() -> None:
    atlantis = prediction(how="free text", name="Atlantis")
    assert "'Atlantis' is read as free text" in printed(prediction_table(atlantis))


def test_graph_check_table_has_counts_problems_and_remarks() -> None:
    graph = geography(test=[(0, 0, 1), (3, 1, 4), (3, 1, 4)])
    text = printed(graph_check_table(check_graph(graph)))
    assert "geography: 7 entities, 2 relations" in text
    assert row_of(text, "triples", "3", "1") == ["triples", "3", "1", "3"]
    assert row_of(text, "repeated", "rows") == ["repeated", "rows", "0", "0", "1"]
    for line in check_graph(graph).problems:
        assert line in text
    assert "nothing must be mended" in printed(graph_check_table(check_graph(geography())))


def test_graph_check_table_counts_cut_texts_where_a_tokenizer_was_given() -> None:
    check = check_graph(geography(), [9, 10, 11, 12, 13, 1, 1], max_entity_tokens=10)
    assert "3 entity texts are cut at 10 tokens" in printed(graph_check_table(check))
    assert "are not counted: give" in printed(graph_check_table(check_graph(geography())))


def test_catalogue_table_says_where_a_graph_lies(tmp_path: Path) -> None:
    entries = [GraphEntry("mine", "a graph [of things]", Path("graphs")), GraphEntry("away", "another", None)]
    text = printed(catalogue_table(entries))
    assert row_of(text, "mine")[-1] == "graphs"
    assert "[of things]" in text
    assert row_of(text, "away")[-3:] == ["data", "fetch", "away"]
