"""The knowledge graph: directions, names, fingerprint, and what it refuses."""

import time
from dataclasses import replace

import numpy as np
import pytest

from pykalm.errors import GraphError
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.names import nearest

TRAIN = np.array([[0, 0, 1], [2, 0, 1], [2, 1, 0], [3, 1, 3]])
GRAPH = KnowledgeGraph(
    name="towns",
    entity_ids=("fr", "paris-fr", "paris-us", "loner"),
    entity_names=("France", "Paris", "Paris", "paris"),
    entity_descriptions=("a country", "a city", "a town", ""),
    relation_ids=("cap", "in"),
    relation_texts=("capital", "lies in"),
    inverse_texts=("capital of", "holds"),
    splits={"train": TRAIN, "test": np.array([[1, 1, 0]])},
)


def test_inverse_rows_follow_the_forward_rows() -> None:
    expected = [[h, r, t] for h, r, t in TRAIN.tolist()] + [[t, r + 2, h] for h, r, t in TRAIN.tolist()]
    assert GRAPH.both_directions("train").tolist() == expected


def test_inverse_relations_read_their_inverse_text() -> None:
    assert [GRAPH.relation_text(relation) for relation in range(4)] == ["capital", "lies in", "capital of", "holds"]
    for relation in (-1, 4):
        with pytest.raises(GraphError, match=rf"\[0, 4\), found {relation}"):
            GRAPH.relation_text(relation)


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(GraphError, match=r"no split 'valid'. Take one of: train, test"):
        GRAPH.triples("valid")


def test_an_entity_is_found_by_id_then_name_then_any_case() -> None:
    assert (GRAPH.find_entity("fr").entity, GRAPH.find_entity("fr").how) == (0, "id")
    assert (GRAPH.find_entity("France").entity, GRAPH.find_entity("France").how) == (0, "name")
    assert (GRAPH.find_entity(" FRANCE ").entity, GRAPH.find_entity("FRANCE").how) == (0, "case-insensitive name")


def test_of_entities_with_one_name_the_one_in_most_train_triples_is_taken() -> None:
    # Entity 1 is in train triples 0, 1; entity 2 in 1, 2; entity 3 in 3 alone: the tie goes to the lower id.
    assert GRAPH.train_degrees.tolist() == [2, 2, 2, 1]
    assert GRAPH.find_entity("Paris").entity == 1
    assert GRAPH.find_entity("Paris").others == (2,)
    match = GRAPH.find_entity("PARIS")
    assert (match.entity, match.others) == (1, (2, 3))


def test_an_unknown_entity_gets_the_nearest_names() -> None:
    with pytest.raises(GraphError, match=r"no entity 'Frence' \(4 known\). The nearest are 'France'"):
        GRAPH.find_entity("Frence")
    with pytest.raises(GraphError, match=r"known\)\.$"):
        GRAPH.find_entity("qqqqqqqqqqqq")


def test_the_nearest_of_a_hundred_thousand_names_take_less_than_two_seconds() -> None:
    generator = np.random.default_rng(0)
    letters = generator.integers(97, 123, size=(100_000, 12), dtype=np.uint8)
    names = [*(row.tobytes().decode() for row in letters), "Kingdom of France"]
    start = time.perf_counter()
    assert nearest("kingdom of frence", names)[0] == "Kingdom of France"
    assert time.perf_counter() - start < 2  # about 0.8 s; difflib alone would take more than 10 s


def test_a_relation_is_found_by_id_text_and_inverse_text() -> None:
    assert [GRAPH.find_relation(text) for text in ("in", "Lies In", "capital of", "HOLDS")] == [1, 1, 2, 3]
    with pytest.raises(GraphError, match=r"no relation 'capitol' \(2 known\). The nearest are 'capital'"):
        GRAPH.find_relation("capitol")


def test_a_symmetric_relation_is_read_forward_and_an_ambiguous_text_is_refused() -> None:
    symmetric = replace(GRAPH, inverse_texts=("capital", "holds"))
    assert symmetric.find_relation("capital") == 0
    twins = replace(GRAPH, relation_texts=("same", "same"))
    with pytest.raises(GraphError, match=r"'same' is ambiguous, 2 bear this text. Give an id: 'cap', 'in'"):
        twins.find_relation("same")


def test_the_fingerprint_depends_on_ids_texts_and_splits_and_not_on_the_name() -> None:
    assert replace(GRAPH, name="other").fingerprint() == GRAPH.fingerprint()
    changed = [
        replace(GRAPH, entity_ids=("fr", "paris-fr", "paris-us", "loner2")),
        replace(GRAPH, entity_descriptions=("a country", "a city", "a town", "x")),
        replace(GRAPH, inverse_texts=("capital of", "holds in it")),
        replace(GRAPH, splits={"train": TRAIN[::-1]}),
        replace(GRAPH, splits={"train": GRAPH.splits["test"], "test": TRAIN}),
    ]
    assert len({graph.fingerprint() for graph in [GRAPH, *changed]}) == 6


def test_the_fingerprint_is_the_same_on_every_machine() -> None:
    one = KnowledgeGraph("g", ("a",), ("a",), ("",), ("r",), ("r",), ("i",), {"train": np.array([[0, 0, 0]])})
    # sha256 of the six JSON lists, then of '["train", 1]' and 24 zero bytes, computed with sha256sum.
    assert one.fingerprint() == "9175c98e3e1b02b32d8ba45cd0a6657ba25e0e5b4b1e812645351fd66fbd26b7"


@pytest.mark.parametrize(
    "train",
    [[[0, 0, 1]], [[0, 0, 1], [0, 0, 1]], [[0, 0, 0], [0, 1, 0]]],
    ids=["one triple", "one triple twice", "one entity"],
)
def test_a_graph_without_contrast_cannot_be_trained(train: list[list[int]]) -> None:
    GRAPH.require_trainable()
    with pytest.raises(GraphError, match=r"2 or more distinct triples over 2 entities, found . over ."):
        replace(GRAPH, splits={"train": np.array(train)}).require_trainable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entity_names": ("a",)}, "entity_names: wanted one for each of the 4 ids, found 1"),
        ({"relation_ids": ("in", "in")}, "relation id 'in' is given 2 times"),
        ({"splits": {}}, "wanted a split 'train'"),
        ({"splits": {"train": np.array([[0, 2, 0]])}}, r"ids below 4, 2, 4, found \[0, 2, 0\]"),
        ({"splits": {"train": np.array([[0.0, 1, 0]])}}, "wanted int64 rows of 3, found float64"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        replace(GRAPH, **change)  # type: ignore[arg-type]
