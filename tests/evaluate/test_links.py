"""Link prediction against loops over a graph worked out by hand, and its files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pykalm.errors import GraphError, ModelError, RunError, UsageError
from pykalm.evaluate.links import evaluate_links, validation_mrr
from pykalm.evaluate.similarity import sample_triples, similarity_matrix
from pykalm.graph.graph import KnowledgeGraph
from pykalm.model.index import build_index
from tests.evaluate.fakes import (
    BORDERS,
    CAPITAL,
    FRANCE,
    GEORGIA,
    MADRID,
    NUM_RELATIONS,
    PARIS,
    SPAIN,
    STATE,
    TBILISI,
    FakeEncoder,
    FakeTexts,
    geography,
)  # fmt: skip


def ranks_by_loop(graph: KnowledgeGraph, encoder: FakeEncoder, split: str) -> list[tuple[str, float, int]]:
    """Rank both directions with Python loops; returns (direction, realistic rank, number of candidates)."""
    texts, every = FakeTexts(), range(graph.num_entities)
    facts = {tuple(triple) for rows in graph.splits.values() for triple in rows.tolist()}
    vectors = [encoder.embed(texts.candidates(np.array([entity])))[0] for entity in every]
    ranks = []
    for direction in ("tail", "head"):
        for head, relation, tail in graph.splits[split].tolist():
            given, asked, target = (
                (head, relation, tail) if direction == "tail" else (tail, relation + NUM_RELATIONS, head)
            )
            query = encoder.embed([texts.query(given, asked)])[0]
            score = [round(float(query @ vector), 5) for vector in vectors]
            fact = (lambda e: (given, relation, e)) if direction == "tail" else (lambda e: (e, relation, given))  # noqa: B023
            left = [e for e in every if e == target or fact(e) not in facts]
            better = sum(score[e] > score[target] for e in left)
            equal = sum(score[e] == score[target] for e in left)
            ranks.append((direction, (1 + better + better + equal) / 2, len(left)))
    return ranks


def test_report_equals_a_loop_over_both_directions() -> None:
    graph, encoder = geography(), FakeEncoder()
    report, _ = evaluate_links(graph, encoder, FakeTexts())
    expected = ranks_by_loop(graph, encoder, "test")
    found = [
        (direction, rank, num)
        for direction, table in (("tail", report.tail), ("head", report.head))
        for rank, num in zip(table.realistic.tolist(), table.num_candidates.tolist(), strict=True)
    ]
    assert found == expected
    assert report.mean.mrr == pytest.approx(np.mean([1 / rank for _, rank, _ in expected]), rel=1e-12)


def test_the_known_answers_of_every_split_are_removed() -> None:
    # (France, borders, ?): Spain is known from train. (?, borders, Georgia): nothing else is known.
    report, _ = evaluate_links(geography(), FakeEncoder(), FakeTexts())
    assert report.tail.num_candidates.tolist() == [7, 6]
    assert report.head.num_candidates.tolist() == [7, 7]


def test_entities_of_the_same_text_share_a_rank() -> None:
    # Georgia the country is the answer, and the state has the same text; both are nearest to the query.
    encoder = FakeEncoder({(1, FRANCE, BORDERS): [1.0, 0.0], (2, GEORGIA): [1.0, 0.0]} | far_away(PARIS, SPAIN, MADRID))
    graph = geography(test=[(FRANCE, BORDERS, GEORGIA)])
    table = evaluate_links(graph, encoder, FakeTexts())[0].tail
    assert (table.optimistic.tolist(), table.realistic.tolist(), table.pessimistic.tolist()) == ([1], [1.5], [2])


def far_away(*entities: int) -> dict[tuple[int, ...], list[float]]:
    """Give everything else that is asked for a vector in the other direction."""
    others = {(2, entity): [-1.0, 0.0] for entity in (*entities, FRANCE, 6)}
    return others | {(1, GEORGIA, BORDERS + NUM_RELATIONS): [0.0, 1.0]}


def test_everything_is_embedded_once_and_in_one_call() -> None:
    # Ten test triples about France and its capital: one query each way.
    graph, encoder = geography(test=[(FRANCE, CAPITAL, PARIS)] * 10), FakeEncoder()
    evaluate_links(graph, encoder, FakeTexts())
    (texts,) = encoder.calls
    assert len(texts) == len(set(texts)) == 6 + 2  # six distinct entity texts, two queries


def test_a_given_index_gives_the_same_ranks_and_embeds_queries_only() -> None:
    graph, encoder = geography(), FakeEncoder()
    once, index = evaluate_links(graph, encoder, FakeTexts())
    again, _ = evaluate_links(graph, encoder, FakeTexts(), index=index)
    assert again.to_dict() == once.to_dict()
    assert {text[0] for text in encoder.calls[-1]} == {1}


def test_a_stale_index_is_refused() -> None:
    index = build_index(FakeEncoder(name="before training"), FakeTexts(), 7)
    with pytest.raises(RunError, match="stale index"):
        evaluate_links(geography(), FakeEncoder(name="after training"), FakeTexts(), index=index)


def test_nan_vectors_raise() -> None:
    encoder = FakeEncoder({(2, MADRID): [float("nan")] * 8})
    with pytest.raises(ModelError, match="NaN"):
        evaluate_links(geography(), encoder, FakeTexts())


def test_every_number_can_be_computed_again_from_the_rank_file(tmp_path: Path) -> None:
    graph = geography(test=[(SPAIN, CAPITAL, MADRID), (FRANCE, BORDERS, GEORGIA), (FRANCE, BORDERS, STATE)])
    report, _ = evaluate_links(graph, FakeEncoder(), FakeTexts(), about={"model": "fake", "seed": 0})
    path = report.save(tmp_path / "results", "links.baseline")
    result = json.loads(path.read_text(encoding="utf-8"))
    with (tmp_path / "results" / "links.baseline.ranks.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {row["relation"] for row in rows} == set(result["relations"]) == {"cap", "bor"}
    places = [(result, rows)]
    places += [(result["relations"][name], [row for row in rows if row["relation"] == name]) for name in ("cap", "bor")]
    for place, of_place in places:
        for side in ("head", "tail", "mean"):
            ranks = np.array([float(row["realistic"]) for row in of_place if side in (row["direction"], "mean")])
            assert place[side]["mr"] == pytest.approx(ranks.mean())
            assert place[side]["mrr"] == pytest.approx((1 / ranks).mean())
            for k in (1, 3, 10):
                assert place[side][f"hits_at_{k}"] == pytest.approx((ranks <= k).mean())
    assert (rows[0]["head"], rows[0]["tail"], rows[0]["direction"]) == ("es", "madrid", "tail")
    assert sorted(tmp_path.glob("results/*")) == [path, path.with_name("links.baseline.ranks.tsv")]


def test_result_names_graph_split_protocol_and_what_it_is_about() -> None:
    report, _ = evaluate_links(geography(), FakeEncoder(), FakeTexts(), about={"model": "fake", "seed": 0})
    result = report.to_dict()
    assert list(result) == ["graph", "split", "protocol", "model", "seed", "mean", "head", "tail", "relations"]
    assert result["graph"] == "geography"
    assert result["split"] == "test"
    for words in ("train, valid, test", "all 7 entities", "both directions", "realistic", "all 2 triples"):
        assert words in str(result["protocol"])


def test_a_sample_is_the_same_for_the_same_seed_and_named_in_the_protocol() -> None:
    graph = geography(valid=[(h, BORDERS, t) for h in range(7) for t in range(7)])
    first, second, other = (
        evaluate_links(graph, FakeEncoder(), FakeTexts(), split="valid", limit=10, seed=seed)[0] for seed in (3, 3, 4)
    )
    assert first.triples.tolist() == second.triples.tolist() != other.triples.tolist()
    assert len(np.unique(first.triples, axis=0)) == 10
    assert "a sample of 10 of the 49 triples of the split, seed 3" in first.protocol


def test_validation_is_the_mrr_of_the_valid_split() -> None:
    graph, encoder = geography(), FakeEncoder()
    expected = np.mean([1 / rank for _, rank, _ in ranks_by_loop(graph, encoder, "valid")])
    assert validation_mrr(graph, encoder, FakeTexts()) == pytest.approx(expected, rel=1e-12)


def test_a_split_that_is_missing_or_empty_is_refused() -> None:
    for graph, split in ((geography(test=[]), "test"), (geography(), "tset")):
        with pytest.raises(GraphError, match=f"'{split}'"):
            evaluate_links(graph, FakeEncoder(), FakeTexts(), split=split)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UsageError, match=f"found {limit}"):
        evaluate_links(geography(), FakeEncoder(), FakeTexts(), limit=limit)


def test_what_only_valid_or_only_test_knows_is_removed_in_both_directions() -> None:
    """By hand: of the seven entities, (France, borders, ?) has lost Spain (train), Madrid (valid), Paris (test).

    (?, borders, Georgia) has lost Tbilisi (valid) and the state (test), so that two are away beside the answer.
    """
    graph = geography(
        valid=[(FRANCE, BORDERS, MADRID), (TBILISI, BORDERS, GEORGIA)],
        test=[(FRANCE, BORDERS, GEORGIA), (FRANCE, BORDERS, PARIS), (STATE, BORDERS, GEORGIA)],
    )
    report, _ = evaluate_links(graph, FakeEncoder(), FakeTexts())
    assert report.tail.num_candidates.tolist() == [4, 4, 7]
    assert report.head.num_candidates.tolist() == [5, 7, 5]
    valid, _ = evaluate_links(graph, FakeEncoder(), FakeTexts(), split="valid")
    assert valid.tail.num_candidates.tolist() == [4, 7]
    assert valid.head.num_candidates.tolist() == [7, 5]


def test_similarity_has_the_pairs_on_its_diagonal() -> None:
    graph, encoder = geography(), FakeEncoder()
    triples = sample_triples(graph, "test", seed=1)
    matrix = similarity_matrix(encoder, FakeTexts(), triples)
    for row, (head, relation, _) in enumerate(triples.tolist()):
        for column, (_, _, tail) in enumerate(triples.tolist()):
            query, candidate = (
                encoder.embed([FakeTexts().query(head, relation)]),
                FakeTexts().candidates(np.array([tail])),
            )
            assert matrix[row, column] == pytest.approx(float(torch.sum(query * encoder.embed(candidate))), abs=1e-6)


def test_sampled_triples_have_distinct_heads_and_tails() -> None:
    graph = geography(test=[(h, r, t) for h in range(7) for r in range(2) for t in range(7)])
    sample = sample_triples(graph, "test", count=5)
    assert len(sample) == len(set(sample[:, 0])) == len(set(sample[:, 2])) == 5
    assert (np.diff(sample[:, 1]) >= 0).all()
