"""Known answers against loops."""

import numpy as np
import pytest

from pykalm.graph.graph import IntArray, KnowledgeGraph
from pykalm.graph.known import KnownAnswers, known_answers


def random_triples(seed: int, entities: int, relations: int, rows: int) -> IntArray:
    generator = np.random.default_rng(seed)
    high = np.array([entities, 2 * relations, entities])
    return generator.integers(0, high, size=(rows, 3), dtype=np.int64)


@pytest.mark.parametrize("seed", range(20))
def test_answers_lookup_and_pairs_equal_loops(seed: int) -> None:
    entities, relations = 7, 2
    triples = random_triples(seed, entities, relations, rows=40)
    known = KnownAnswers.build(triples, relations)
    truth = {tuple(row) for row in triples.tolist()}
    queries = [(h, r) for h in range(entities) for r in range(2 * relations)]
    heads, kinds = (np.array(column) for column in zip(*queries, strict=True))
    candidates = np.array([0, 1, 3, 5, 6])
    offsets, found = known.lookup(heads, kinds)
    pairs = list(zip(*(part.tolist() for part in known.pairs(heads, kinds, candidates)), strict=True))
    assert len(pairs) == len(set(pairs))
    assert offsets[0] == 0
    for row, (head, relation) in enumerate(queries):
        expected = [tail for tail in range(entities) if (head, relation, tail) in truth]
        assert known.answers(head, relation).tolist() == expected
        assert found[offsets[row] : offsets[row + 1]].tolist() == expected
        expected = [place for place, tail in enumerate(candidates.tolist()) if (head, relation, tail) in truth]
        assert [place for query, place in pairs if query == row] == expected


def test_a_query_beyond_all_keys_has_no_answers() -> None:
    known = KnownAnswers.build(np.array([[1, 0, 2]]), num_relations=1)
    assert known.answers(0, 0).tolist() == []
    assert known.answers(2, 1).tolist() == []
    assert known.answers(1, 0).tolist() == [2]


def test_no_triples_no_queries_and_no_candidates_are_fine() -> None:
    empty = KnownAnswers.build(np.empty((0, 3), dtype=np.int64), num_relations=3)
    one = KnownAnswers.build(np.array([[0, 0, 1]]), num_relations=3)
    none = np.empty(0, dtype=np.int64)
    assert empty.answers(0, 0).tolist() == []
    for known, heads, kinds, candidates in (
        (empty, np.array([0, 1]), np.array([0, 5]), np.array([1, 2])),
        (one, none, none, np.array([1])),
        (one, np.array([0]), np.array([0]), none),
    ):
        assert [part.tolist() for part in known.pairs(heads, kinds, candidates)] == [[], []]
    assert one.lookup(none, none)[0].tolist() == [0]


def test_the_answers_of_a_graph_hold_both_directions_of_the_splits_asked_for() -> None:
    names = ("a", "b", "c")
    splits = {"train": np.array([[0, 0, 1]]), "test": np.array([[0, 0, 2]])}
    graph = KnowledgeGraph("g", names, names, ("",) * 3, ("r",), ("r",), ("s",), splits)
    everything, train = known_answers(graph), known_answers(graph, ["train"])
    assert everything.answers(0, 0).tolist() == [1, 2]
    assert everything.answers(2, 1).tolist() == [0]
    assert train.answers(0, 0).tolist() == [1]
    assert train.answers(2, 1).tolist() == []
