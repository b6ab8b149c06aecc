"""Checking a graph: every number counted by hand on a small graph, and the known counts of the benchmarks."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pykalm.graph.check import SharedTexts, check_graph
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.leaks import inverse_relations
from pykalm.graph.read import read_graph

# Relations: 0 parent, 1 child (its inverse), 2 friend (symmetric here), 3 owns (unrelated), 4 unused.
# Entities: 0..4; 5 only in test, 6 in no triple. 0 and 1 share a name, 2 and 3 name and description.
GRAPH = KnowledgeGraph(
    name="family",
    entity_ids=tuple("abcdefg"),
    entity_names=("Ann", "Ann", "Bob", "Bob", "Cem", "Dan", "Eve"),
    entity_descriptions=("tall", "small", "", "", "one two three", "", ""),
    relation_ids=("parent", "child", "friend", "owns", "unused"),
    relation_texts=("parent", "child", "friend", "owns", "unused"),
    inverse_texts=("child", "parent", "friend", "owned by", "unused by"),
    splits={
        "train": np.array(
            [
                [0, 0, 1],
                [1, 1, 0],  # reverses the first
                [2, 0, 3],
                [3, 1, 2],  # reverses the third: 2 of 3 child triples so far
                [4, 1, 3],  # reversed by no parent triple in train: 2 of 3 is less than 80 %
                [0, 2, 2],
                [0, 2, 2],  # a repetition
                [1, 3, 2],
            ]
        ),
        "valid": np.array([[2, 2, 0], [1, 3, 2]]),  # the first is a train triple reversed, the second is in train
        # The second reverses a train triple of its own relation; so does the first, but of a weak inverse.
        "test": np.array([[3, 0, 4], [2, 3, 1], [5, 0, 0], [5, 0, 0], [1, 3, 2]]),
    },
    negatives={"valid": np.array([[0, 0, 0], [0, 0, 1]]), "test": np.array([[6, 0, 6]])},
)


def test_every_count_equals_the_hand_count() -> None:
    check = check_graph(GRAPH, _words(GRAPH), max_entity_tokens=2)
    assert check.triples == {"train": 8, "valid": 2, "test": 5}
    assert check.duplicates == {"train": 1, "valid": 0, "test": 1}
    assert check.overlaps == {"train/valid": 1, "train/test": 1, "valid/test": 1}
    assert check.true_negatives == {"valid": 1, "test": 0}
    assert check.unseen_entities == {"valid": 0, "test": 1}
    assert (check.unused_entities, check.unused_relations) == (1, 1)
    assert check.shared_names == SharedTexts(entities=4, texts=2)
    assert check.shared_texts == SharedTexts(entities=2, texts=1)
    assert check.inverse_leaks == {"valid": 1, "test": 1}
    assert check.cut_texts == 1  # "Cem one two three" alone has more than two words
    assert check.untrainable is None
    assert check.examples["overlap train/test"] == ("b owns c",)
    assert check.examples["unseen test"] == ("f",)


def test_a_relation_gives_another_away_from_eighty_percent_on() -> None:
    assert inverse_relations(GRAPH) == {1: [0]}  # both parent triples are reversed by child, 2 of 3 the other way
    train = np.concatenate([GRAPH.splits["train"][:4], [[0, 0, 4], [4, 1, 0], [1, 0, 4], [4, 1, 1], [3, 0, 4]]])
    more = replace(GRAPH, splits={"train": train, "test": np.array([[4, 1, 3], [4, 3, 3]])})
    assert inverse_relations(more) == {0: [1], 1: [0]}  # 4 of 5 parent triples, 4 of 4 child triples
    assert check_graph(more).inverse_leaks == {"test": 1}  # "e child d", not "e owns d"


def test_defects_are_problems_and_the_rest_are_remarks() -> None:
    check = check_graph(GRAPH)
    assert check.cut_texts is None
    assert check.problems == [
        "train: 1 rows repeat an earlier one.",
        "test: 1 rows repeat an earlier one.",
        "train/valid: 1 triples are in both splits.",
        "train/test: 1 triples are in both splits.",
        "valid/test: 1 triples are in both splits.",
        "valid negatives: 1 are true, being in a split.",
        "test negatives: 1 rows for 5 positives.",
    ]
    assert check.remarks == [
        "test: 1 entity is not in train.",
        "valid: 1 triples (50.0 %) stand in train the other way round.",
        "test: 1 triples (20.0 %) stand in train the other way round.",
        "4 entities share their name with another (2 texts).",
        "2 entities share their text with another (1 texts).",
        "1 entities and 1 relations are in no triple.",
        "Entity texts of more than 50 tokens, which would be cut, are not counted: give the model (--model).",
    ]
    assert check_graph(GRAPH, [1] * GRAPH.num_entities).remarks == check.remarks[:-1]
    cut = check_graph(GRAPH, [1] * (GRAPH.num_entities - 2) + [50, 51]).remarks
    assert cut == [*check.remarks[:-1], "1 entity texts are cut at 50 tokens."]


def test_a_graph_with_one_triple_is_a_problem() -> None:
    check = check_graph(replace(GRAPH, splits={"train": np.array([[0, 0, 1]])}, negatives={}))
    assert len(check.problems) == 1
    assert "found 1 over 2" in check.problems[0]


def test_a_check_goes_through_json() -> None:
    check = check_graph(GRAPH)
    again = json.loads(json.dumps(check.to_dict()))
    assert again["problems"] == check.problems
    assert again["shared_names"] == {"entities": 4, "texts": 2}


def test_wn18rr_has_the_known_defects_and_no_problem(data_folder: Path) -> None:
    start = time.perf_counter()
    graph = read_graph(data_folder / "WN18RR")
    check = check_graph(graph, _words(graph), max_entity_tokens=50)
    assert check.cut_texts == 102  # awk '{print NF}' over name and description gives the same
    assert time.perf_counter() - start < 10  # about 0.7 s
    assert check.problems == []
    assert check.shared_names.entities == 12873
    assert check.unseen_entities["test"] == 209
    assert (check.unused_entities, check.unused_relations) == (0, 0)


def test_fb15k_237_has_the_known_shared_names_and_no_problem(data_folder: Path) -> None:
    check = check_graph(read_graph(data_folder / "FB15k-237"))
    assert check.problems == []
    assert check.shared_names == SharedTexts(entities=499, texts=223)
    assert check.inverse_leaks["test"] == 0  # it was made from FB15k by removing inverse relations


@pytest.mark.parametrize("folder", ["CoDEx-S", "UMLS", "inductive/WN18RR_v1"])
def test_leaks_equal_a_loop(data_folder: Path, folder: str) -> None:
    graph = read_graph(data_folder / folder)
    train = {tuple(row) for row in graph.splits["train"].tolist()}
    sizes, reversed_by = dict.fromkeys(range(graph.num_relations), 0), dict[tuple[int, int], int]()
    for head, relation, tail in train:
        sizes[relation] += 1
        for other in range(graph.num_relations):
            if (tail, other, head) in train:
                reversed_by[other, relation] = reversed_by.get((other, relation), 0) + 1
    leaks = 0
    for head, relation, tail in graph.splits["test"].tolist():
        givers = [s for s in sizes if s == relation or reversed_by.get((relation, s), 0) >= 0.8 * sizes[s] > 0]
        leaks += any((tail, giver, head) in train for giver in givers)
    assert check_graph(graph).inverse_leaks["test"] == leaks


def _words(graph: KnowledgeGraph) -> list[int]:
    texts = zip(graph.entity_names, graph.entity_descriptions, strict=True)
    return [len(f"{name} {description}".split()) for name, description in texts]
