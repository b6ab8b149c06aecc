"""False triples: filtered, balanced, the same for a seed."""

import dataclasses

import numpy as np
import pytest

from pykalm.errors import GraphError, UsageError
from pykalm.evaluate.corruptions import corrupt_triples, hard_negatives
from pykalm.evaluate.qa_questions import RightAnswers, build_questions, choose_examples, hard_set
from pykalm.graph.graph import KnowledgeGraph
from pykalm.text.questions import TASKS, Question
from tests.evaluate.fakes import (
    BORDERS,
    CAPITAL,
    FRANCE,
    GEORGIA,
    MADRID,
    NAMES,
    PARIS,
    SPAIN,
    STATE,
    TBILISI,
    geography,
)


def all_triples(graph: KnowledgeGraph) -> set[tuple[int, ...]]:
    return {tuple(triple) for rows in graph.splits.values() for triple in rows.tolist()}


@pytest.mark.parametrize("seed", range(20))
def test_corruptions_are_false_and_change_one_side(seed: int) -> None:
    graph = geography()
    triples = np.concatenate(list(graph.splits.values()))
    false = corrupt_triples(graph, triples, seed=seed)
    named = {(NAMES[h], r, NAMES[t]) for h, r, t in all_triples(graph)}
    for true, corrupted in zip(triples.tolist(), false.tolist(), strict=True):
        assert tuple(corrupted) not in all_triples(graph)
        assert (NAMES[corrupted[0]], corrupted[1], NAMES[corrupted[2]]) not in named  # Georgia the state reads the same
        assert corrupted[1] == true[1]
        assert sum(a != b for a, b in zip(true, corrupted, strict=True)) == 1
    assert (false[:, 0] != triples[:, 0]).sum() == 3  # six triples: three heads, three tails


def test_corruptions_are_drawn_from_all_that_is_false() -> None:
    """(France, borders, ?) is true of Spain and of one Georgia, so of both; (?, borders, Spain) of France."""
    graph = geography()
    triple = np.array([[FRANCE, BORDERS, SPAIN]])
    drawn = {tuple(corrupt_triples(graph, triple, seed=seed)[0]) for seed in range(200)}
    tails = {tail for head, _, tail in drawn if head == FRANCE}
    assert tails == {FRANCE, PARIS, MADRID, TBILISI}
    heads = {head for head, _, tail in drawn if tail == SPAIN}
    assert heads == {PARIS, SPAIN, MADRID, GEORGIA, STATE, TBILISI}


def test_a_seed_draws_the_same() -> None:
    graph = geography()
    triples = graph.triples("train")
    first, second, other = (corrupt_triples(graph, triples, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_where_nothing_is_false_on_one_side_the_other_is_taken() -> None:
    full = [(FRANCE, BORDERS, entity) for entity in range(7)]
    graph = geography(train=full, valid=[], test=[])
    false = corrupt_triples(graph, np.array(full), seed=0)
    assert (false[:, 0] != FRANCE).all()
    whole = [(head, BORDERS, tail) for head in range(7) for tail in range(7)]
    graph = geography(train=whole, valid=[], test=[])
    with pytest.raises(GraphError, match="every entity would make it true"):
        corrupt_triples(graph, np.array(full[:1]), seed=0)


def with_negatives() -> KnowledgeGraph:
    rows = np.array([(SPAIN, CAPITAL, PARIS), (FRANCE, CAPITAL, PARIS), (SPAIN, BORDERS, TBILISI)])
    return dataclasses.replace(geography(), negatives={"test": rows})


def test_shipped_negatives_that_are_true_are_left_out() -> None:
    graph = with_negatives()
    found = hard_negatives(graph, "test", limit=None, seed=0)
    assert found.tolist() == [[SPAIN, CAPITAL, PARIS], [SPAIN, BORDERS, TBILISI]]
    assert len(hard_negatives(graph, "valid", limit=None, seed=0)) == 0
    assert len(hard_negatives(graph, "test", limit=1, seed=0)) <= 1


def test_classification_is_balanced_and_the_hard_set_shares_its_true_triples() -> None:
    asked, sampling = build_questions(with_negatives(), TASKS, split="test", limit=None, seed=0)
    assert "all 2 triples" in sampling
    assert {task: len(questions) for task, questions in asked.items()} == {
        "tail": 2, "head": 2, "relation": 2, "classification": 6,
    }  # fmt: skip
    truth = asked["classification"]
    random = [question.is_true for question in truth if question.source == "random"]
    assert random == [True, True, False, False]
    assert [(truth[place].is_true, truth[place].source) for place in hard_set(truth)] == [
        (True, "random"), (True, "random"), (False, "hard"), (False, "hard"),
    ]  # fmt: skip
    without, _ = build_questions(geography(), ["classification"], split="test", limit=1, seed=0)
    assert hard_set(without["classification"]) == []


def test_examples_are_of_train_and_ask_nothing_that_the_split_asks() -> None:
    """(France, capital, Paris) and (Georgia, capital, Tbilisi) are free; test asks (France, borders, ?)."""
    graph = geography()
    train = {tuple(triple) for triple in graph.triples("train").tolist()}
    for task in TASKS:
        examples = choose_examples(graph, task, count=2, split="test", seed=3)
        assert examples == choose_examples(graph, task, count=2, split="test", seed=3)
        for example in examples:
            triple = (example.head, example.relation, example.tail)
            assert (triple in train) == example.is_true
            assert example.relation == CAPITAL
        assert sum(not example.is_true for example in examples) == (task == "classification")
    with pytest.raises(UsageError, match=r"wanted 3 examples .* found 2\. Lower --shots"):
        choose_examples(graph, "tail", count=3, split="test", seed=3)


def test_examples_are_of_different_relations_while_there_are_some() -> None:
    train = [(FRANCE, CAPITAL, e) for e in range(6)] + [(SPAIN, BORDERS, TBILISI)]
    graph = geography(train=train, valid=[], test=[(STATE, BORDERS, STATE)])
    for seed in range(5):
        examples = choose_examples(graph, "tail", count=2, split="test", seed=seed)
        assert {example.relation for example in examples} == {CAPITAL, BORDERS}


def test_right_answers_are_those_that_any_split_knows() -> None:
    graph = geography(valid=[(FRANCE, BORDERS, STATE), (FRANCE, CAPITAL, SPAIN)])
    right = RightAnswers(graph)
    assert right.find(Question("tail", FRANCE, BORDERS, GEORGIA), "Georgia") == ["Georgia", "Spain"]
    assert right.find(Question("head", FRANCE, BORDERS, SPAIN), "France") == ["France"]
    assert right.find(Question("relation", FRANCE, BORDERS, SPAIN), "borders") == ["borders", "has capital"]
    assert right.find(Question("classification", FRANCE, BORDERS, SPAIN), "yes") == ["yes"]
