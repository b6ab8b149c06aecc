"""Which vectors are measured: populations of one size that hold the split's pairs; and the report of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pykalm.errors import GraphError, UsageError
from pykalm.evaluate.representations import choose_populations, measure_representations
from pykalm.graph.catalogue import load_graph
from pykalm.graph.graph import KnowledgeGraph
from pykalm.text.texts import Texts
from tests.evaluate.fakes import CAPITAL, FRANCE, MADRID, PARIS, SPAIN, FakeEncoder, FakeTexts, geography

SENTENCES = ["one sentence", "another one", "a third"]


class MoreFakeTexts(FakeTexts):
    """Write a plain sentence as (4, its length)."""

    def plain(self, texts: Sequence[str], *, limit: int | None = None) -> Texts:
        return Texts.of([np.array([4, len(text)]) for text in texts])


def facts(graph: KnowledgeGraph, split: str) -> set[tuple[int, int, int]]:
    return {tuple(row) for row in graph.both_directions(split).tolist()}


@pytest.mark.parametrize("limit", [None, 300, 50])
def test_populations_are_of_one_size_distinct_and_hold_pairs_of_the_split_only(limit: int | None) -> None:
    graph = load_graph("world")
    chosen = choose_populations(graph, "test", limit=limit, seed=1)
    size = limit or graph.num_entities
    assert len(chosen.entities) == len(chosen.queries) == size
    assert len(set(chosen.entities.tolist())) == len({tuple(query) for query in chosen.queries.tolist()}) == size
    pairs = {(*chosen.queries[query].tolist(), int(chosen.entities[entity])) for query, entity in chosen.pairs.tolist()}
    assert len(pairs) == len(chosen.pairs)
    assert pairs <= facts(graph, "test")
    asked = {(head, relation) for split in graph.splits for head, relation, _ in facts(graph, split)}
    assert {tuple(query) for query in chosen.queries.tolist()} <= asked
    if limit is None:
        assert pairs == facts(graph, "test")  # all of them fit
    else:
        assert len(pairs) >= limit // 2


def test_where_queries_outnumber_entities_some_pairs_are_left_out(data_folder: Path) -> None:
    graph = load_graph(data_folder / "UMLS")
    chosen = choose_populations(graph, "test")
    assert len(chosen.entities) == len(chosen.queries) == graph.num_entities == 135
    assert 135 <= len(chosen.pairs) < len(facts(graph, "test"))


def test_a_graph_with_fewer_queries_than_entities_has_all_of_them() -> None:
    """Two triples ask four questions of seven entities; then N goes up to three in both views."""
    graph = geography(train=[(FRANCE, CAPITAL, PARIS)], valid=[], test=[(SPAIN, CAPITAL, MADRID)])
    chosen = choose_populations(graph, "test")
    assert chosen.entities.tolist() == list(range(7))
    assert sorted(map(tuple, chosen.queries.tolist())) == [(0, 0), (1, 2), (2, 0), (3, 2)]
    assert len(chosen.pairs) == 2
    report = measure_representations(graph, FakeEncoder(), MoreFakeTexts(), temperature=0.1)
    assert report.theorem_1.num_negatives == (1, 2, 3)


def test_the_same_seed_chooses_the_same() -> None:
    graph = load_graph("world")
    first, again, other = (choose_populations(graph, "test", limit=60, seed=seed) for seed in (0, 0, 1))
    assert first.pairs.tolist() == again.pairs.tolist()
    assert first.entities.tolist() == again.entities.tolist()
    assert first.entities.tolist() != other.entities.tolist()


def test_a_limit_below_two_and_an_empty_split_are_refused() -> None:
    with pytest.raises(UsageError, match="at least two"):
        choose_populations(geography(), "test", limit=1)
    with pytest.raises(GraphError, match="empty"):
        choose_populations(geography(valid=[]), "valid")


def test_the_report_has_what_its_vectors_give(tmp_path: Path) -> None:
    graph, encoder, texts = geography(), FakeEncoder(), MoreFakeTexts()
    report = measure_representations(graph, encoder, texts, temperature=0.1, sentences=SENTENCES, about={"seed": 0})
    found = report.to_dict()
    assert {name: group["num_vectors"] for name, group in found["groups"].items()} == {
        "queries": 7, "candidates": 7, "sentences": 3,
    }  # fmt: skip
    pairs = graph.both_directions("test").tolist()
    distances = [
        float(
            (encoder.embed([texts.query(h, r)])[0] - encoder.embed(texts.candidates(np.array([t])))[0]).square().sum()
        )
        for h, r, t in pairs
    ]
    assert found["groups"]["queries"]["alignment"] == pytest.approx(np.mean(distances), rel=1e-6)
    assert found["groups"]["candidates"]["alignment"] is None
    assert found["theorem_1"]["num_negatives"] == [1, 2, 4, 6]
    assert found["theorem_1"]["temperature"] == 0.1
    assert np.shape(found["similarity"]["triples"]["matrix"]) == (2, 2)
    vectors = encoder.embed(texts.plain(SENTENCES))
    assert np.array(found["similarity"]["sentences"]["matrix"]) == pytest.approx(
        (vectors @ vectors.T).numpy(), abs=1e-5
    )
    assert found["similarity"]["sentences"]["labels"] == SENTENCES
    assert json.loads(report.save(tmp_path).read_text(encoding="utf-8")) == json.loads(json.dumps(found))


def test_without_sentences_the_rest_is_measured() -> None:
    found = measure_representations(geography(), FakeEncoder(), MoreFakeTexts(), temperature=0.1).to_dict()
    assert set(found["groups"]) == {"queries", "candidates"}
    assert set(found["similarity"]) == {"triples"}
    assert "no plain sentences" in found["protocol"]


def test_progress_reaches_its_total() -> None:
    told: list[tuple[int, int]] = []
    measure_representations(
        geography(),
        FakeEncoder(),
        MoreFakeTexts(),
        temperature=0.1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (22, 22)  # seven vectors of each kind, four pairs in two views
