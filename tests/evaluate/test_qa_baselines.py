"""What needs no model, by hand."""

import dataclasses

import numpy as np

from pykalm.evaluate.qa_baselines import Baselines
from pykalm.evaluate.qa_by_score import best_threshold, relation_thresholds, triple_scores
from pykalm.text.questions import NO, YES, Question
from tests.evaluate.fakes import (
    BORDERS,
    CAPITAL,
    FRANCE,
    GEORGIA,
    MADRID,
    PARIS,
    SPAIN,
    STATE,
    TBILISI,
    FakeEncoder,
    FakeTexts,
    geography,
)

# Answers in train: capital Paris twice, Madrid once; borders Spain twice, Georgia once. Heads: France 3, Spain 2, Georgia 1.
TRAIN = [
    (FRANCE, CAPITAL, PARIS), (SPAIN, CAPITAL, PARIS), (SPAIN, CAPITAL, MADRID),
    (FRANCE, BORDERS, SPAIN), (GEORGIA, BORDERS, SPAIN), (FRANCE, BORDERS, GEORGIA),
]  # fmt: skip
DESCRIPTIONS = (
    "Madrid is not in France, nor is Paris.",
    "A city.",
    "",
    "In Spain.",
    "",
    "",
    "Tbilisi lies in Georgia.",
)


def baselines() -> Baselines:
    return Baselines(dataclasses.replace(geography(train=TRAIN), entity_descriptions=DESCRIPTIONS))


def test_the_most_frequent_answer_of_a_relation() -> None:
    answers = baselines().answers
    assert answers(Question("tail", TBILISI, CAPITAL, FRANCE))["most-frequent"] == "Paris"
    assert answers(Question("tail", TBILISI, BORDERS, FRANCE))["most-frequent"] == "Spain"
    assert answers(Question("head", TBILISI, CAPITAL, FRANCE))["most-frequent"] == "Spain"
    assert answers(Question("head", TBILISI, BORDERS, FRANCE))["most-frequent"] == "France"


def test_the_majority_answer_asks_for_no_relation() -> None:
    """Paris and Spain are tails twice each: the first of them; France is the head of three."""
    answers = baselines().answers
    assert answers(Question("tail", SPAIN, BORDERS, FRANCE))["majority"] == "Paris"
    assert answers(Question("head", SPAIN, CAPITAL, FRANCE))["majority"] == "France"
    assert answers(Question("relation", SPAIN, CAPITAL, FRANCE)) == {"majority": "has capital"}
    assert answers(Question("classification", SPAIN, CAPITAL, FRANCE)) == {"most-frequent": YES, "majority": YES}


def test_a_copy_from_the_description_of_what_is_given() -> None:
    """Of Madrid and Paris, Paris is the more frequent capital; for borders neither is known, so the first is taken."""
    answers = baselines().answers
    assert answers(Question("tail", FRANCE, CAPITAL, STATE))["copy-description"] == "Paris"
    assert answers(Question("tail", FRANCE, BORDERS, STATE))["copy-description"] == "Madrid"
    assert answers(Question("tail", PARIS, CAPITAL, STATE))["copy-description"] == ""
    assert answers(Question("head", STATE, CAPITAL, TBILISI))["copy-description"] == "Georgia"
    assert answers(Question("tail", MADRID, CAPITAL, STATE))["whole-description"] == "In Spain."


def test_a_truth_baseline_from_shipped_negatives() -> None:
    false = np.array([(SPAIN, BORDERS, PARIS), (SPAIN, BORDERS, MADRID)])
    graph = dataclasses.replace(geography(), negatives={"valid": false})  # valid: one true triple, of borders
    answers = Baselines(graph).answers
    assert answers(Question("classification", SPAIN, BORDERS, FRANCE)) == {"most-frequent": NO, "majority": YES}
    assert answers(Question("classification", SPAIN, CAPITAL, FRANCE)) == {"most-frequent": YES, "majority": YES}


def test_the_best_threshold_equals_a_loop() -> None:
    generator = np.random.default_rng(0)
    for size in range(1, 30):
        scores = np.round(generator.normal(size=size), 1)  # some are equal
        is_true = generator.random(size) < 0.5
        right = {cut: np.mean((scores > cut) == is_true) for cut in [*(scores - 0.01), *(scores + 0.01)]}
        assert np.mean((scores > best_threshold(scores, is_true)) == is_true) == max(right.values())


def test_a_relation_with_few_true_triples_takes_the_threshold_of_all() -> None:
    scores = np.array([0.1, 0.3, 0.5, 0.7, 0.9, 0.0, 0.05, 0.8, 0.6])
    is_true = np.array([True] * 5 + [False] * 2 + [True, False])
    relations = np.array([0] * 7 + [1, 1])
    own, of_all = relation_thresholds(scores, is_true, relations, 2)
    assert 0.05 < own < 0.1  # what is true of relation 0 lies above 0.1
    assert of_all == best_threshold(scores, is_true)


def test_a_triple_scores_the_mean_cosine_of_both_directions() -> None:
    encoder, texts = FakeEncoder(), FakeTexts()
    triples = np.array([(FRANCE, CAPITAL, PARIS), (SPAIN, BORDERS, GEORGIA)])
    for score, (head, relation, tail) in zip(triple_scores(encoder, texts, triples, 2), triples.tolist(), strict=True):
        pairs = ((texts.query(head, relation), tail), (texts.query(tail, relation + 2), head))
        cosines = [
            float(encoder.embed([query])[0] @ encoder.embed(texts.candidates(np.array([e])))[0]) for query, e in pairs
        ]
        assert abs(score - sum(cosines) / 2) < 1e-6
