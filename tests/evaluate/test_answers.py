"""Scores of answers, worked out by hand."""

import pytest

from pykalm.evaluate.answers import ChoiceScorer, NameScorer, Score, normalise, truth_scorer
from pykalm.text.questions import NO, YES

NAMES = [
    "Gambia", "Niger", "Nigeria", "Georgia", "South Georgia and the South Sandwich Islands", "Washington, D.C.", "Paris",
    "The Beatles", "C", "C++", "!!!", "Vitamin A", "Star Wars: A New Hope", "Star Wars",
]  # fmt: skip
ALL, SOME, NONE = Score(True, True, True), Score(False, True, False), Score(False, False, False)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Gambia.", "gambia"),
        ("  a  DOG ", "dog"),
        ('"An answer"', "answer"),
        ("the “Beatles”!", "beatles"),
        ("Vitamin A", "vitamin a"),
        ("A", "a"),
        ("The", "the"),
        ("Theodore", "theodore"),
        ("Washington, D.C.", "washington, d.c"),
        ("N'Djamena", "n'djamena"),
        ("!!!", "!!!"),
        ("C++", "c++"),
        ("ﬁeld Å", "field å"),
        ("", ""),
    ],
)
def test_texts_are_compared_without_case_outer_punctuation_and_first_article(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("", "Paris", NONE),
        ("   ", "Paris", NONE),
        ("...", "Paris", NONE),
        ("paris.", "Paris", ALL),
        ("The Paris", "Paris", ALL),
        ("Gambia", "Gambia", ALL),
        ("the gambia", "Gambia", ALL),
        ("Beatles", "The Beatles", ALL),
        ("It is Paris, I think", "Paris", SOME),
        ("Parisian", "Paris", NONE),
        ("Washington, D.C.", "Washington, D.C.", ALL),
        ("Washington, D.C", "Washington, D.C.", ALL),
        ("He lives in Washington, D.C. now", "Washington, D.C.", SOME),
        ("Washington", "Washington, D.C.", NONE),
        ("Nigeria", "Niger", NONE),
        ("Niger, Nigeria and Paris", "Niger", SOME),
        ("South Georgia and the South Sandwich Islands", "Georgia", NONE),
        ("South Georgia", "Georgia", SOME),
        ("C++", "C", NONE),
        ("C++", "C++", ALL),
        ("!!!", "!!!", ALL),
        ("Vitamin", "Vitamin A", NONE),
        ("Paris: a city on the Seine", "Paris", ALL),
        ("Lyon: not Paris", "Paris", SOME),
        ("Star Wars: A New Hope", "Star Wars", NONE),
        ("Star Wars: a film", "Star Wars", ALL),
        (": Paris", "Paris", ALL),
    ],
)
def test_answers_that_name_an_entity(answer: str, gold: str, score: Score) -> None:
    assert NameScorer(NAMES).score(answer, gold, [gold]) == score


def test_any_right_entity_counts_as_any_valid_only() -> None:
    score = NameScorer(NAMES).score
    assert score("nigeria.", "Niger", ["Niger", "Nigeria", "Georgia"]) == Score(False, False, True)
    assert score("Paris", "Niger", ["Niger", "Nigeria"]) == NONE
    assert score("Nigeria or Paris", "Niger", ["Niger", "Nigeria"]) == NONE
    assert score("Niger", "Niger", []) == ALL


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        (YES, YES, ALL),
        ("yes, this is true.", YES, ALL),
        (YES, NO, NONE),
        (NO, NO, ALL),
        (NO, YES, NONE),
        ("Yes", YES, SOME),
        ("No.", NO, SOME),
        ("No.", YES, NONE),
        ("This is true", YES, SOME),
        ("This is not true", YES, NONE),
        ("This is not true", NO, SOME),
        ("True", YES, NONE),
        (f'"{YES}" or "{NO}"', YES, NONE),
        (f'"{YES}" or "{NO}"', NO, NONE),
        ("Is this true: France borders Spain?", YES, NONE),
        ("Yes, this is not true", YES, NONE),
        ("Norway", NO, NONE),
        ("", NO, NONE),
    ],
)
def test_classifications(answer: str, gold: str, score: Score) -> None:
    assert truth_scorer().score(answer, gold, [gold]) == score


RELATIONS = ["member of", "member of political party", "part of", "has part", "cast member"]


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("member of", "member of", ALL),
        ("The relation is: part of.", "part of", SOME),
        ("member of political party", "member of", NONE),
        ("member of political party.", "member of political party", ALL),
        ("member of | part of | has part", "part of", NONE),
        ("is a cast member of it", "cast member", SOME),
        ("parts of", "part of", NONE),
        ("", "part of", NONE),
    ],
)
def test_relations(answer: str, gold: str, score: Score) -> None:
    assert ChoiceScorer(RELATIONS).score(answer, gold, [gold]) == score


def test_another_relation_that_holds_counts_as_any_valid() -> None:
    assert ChoiceScorer(RELATIONS).score("has part", "part of", ["part of", "has part"]) == Score(False, False, True)
