"""Predictions: which entity is taken, in which direction is asked, what is known of the answers."""

import json

import pytest

from pykalm.errors import GraphError, RunError, UsageError
from pykalm.model.index import build_index
from pykalm.use.predict import Prediction, Predictor
from tests.evaluate.fakes import (
    BORDERS,
    CAPITAL,
    FRANCE,
    NAMES,
    NUM_RELATIONS,
    PARIS,
    SPAIN,
    TBILISI,
    FakeEncoder,
    FakeTexts,
    geography,
)  # fmt: skip

# Cosines of the entities with every query, by the first bearer of the name.
COSINES = {FRANCE: 0.1, PARIS: 0.9, SPAIN: 0.8, 3: -0.5, 4: 0.3, TBILISI: 0.6}


def predictor(encoder: FakeEncoder | None = None) -> Predictor:
    encoder = encoder or fixed_encoder()
    return Predictor(geography(), encoder, FakeTexts(), build_index(encoder, FakeTexts(), len(NAMES)))


def fixed_encoder() -> FakeEncoder:
    """Put every query on one axis and the entities at the angles of COSINES, so that the order is known."""
    entities = {(2, entity): [cosine, (1 - cosine**2) ** 0.5] for entity, cosine in COSINES.items()}
    queries = {(1, head, relation): [1.0, 0.0] for head in range(7) for relation in range(4)}
    free = {(3, 8, length, relation): [1.0, 0.0] for length in (0, 15) for relation in range(4)}
    return FakeEncoder(entities | queries | free)


def asked(encoder: FakeEncoder) -> tuple[int, ...]:
    """Return the text that was embedded last."""
    (text,) = encoder.calls[-1]
    return text


def names(prediction: Prediction) -> list[str]:
    return [answer.name for answer in prediction.answers]


def test_answers_come_by_cosine_with_rank_and_score() -> None:
    prediction = predictor().predict(head="Spain", relation="borders", k=4)
    assert names(prediction) == ["Paris", "Spain", "Tbilisi", "Georgia"]
    assert [answer.rank for answer in prediction.answers] == [1, 2, 3, 4]
    assert [answer.score for answer in prediction.answers] == pytest.approx([0.9, 0.8, 0.6, 0.3])
    assert (prediction.answers[0].entity, prediction.answers[0].description) == ("paris", "A city.")


def test_more_answers_than_entities_gives_all_of_them() -> None:
    assert sorted(names(predictor().predict(head="Spain", relation="cap", k=100))) == sorted(NAMES)


def test_a_head_asks_for_tails_and_a_tail_for_heads() -> None:
    encoder = fixed_encoder()
    model = predictor(encoder)
    forward = model.predict(head="France", relation="has capital")
    assert (asked(encoder), forward.relation_text) == ((1, FRANCE, CAPITAL), "has capital")
    backward = model.predict(tail="Paris", relation="has capital")
    assert (asked(encoder), backward.relation_text) == ((1, PARIS, CAPITAL + NUM_RELATIONS), "is capital of")
    assert (forward.given, backward.given, backward.relation) == ("head", "tail", "cap")


def test_an_inverse_text_asks_the_other_way() -> None:
    encoder = fixed_encoder()
    model = predictor(encoder)
    model.predict(head="Paris", relation="is capital of")
    assert asked(encoder) == (1, PARIS, CAPITAL + NUM_RELATIONS)
    model.predict(tail="France", relation="is capital of")
    assert asked(encoder) == (1, FRANCE, CAPITAL)


def test_known_answers_are_marked_with_their_splits_in_both_directions() -> None:
    # Train: France borders Spain. Valid: Spain borders France. Test: France borders Georgia (the country).
    model = predictor()
    tails = {answer.entity: answer.known_in for answer in model.predict(head="fr", relation="bor", k=7).answers}
    assert {name: known for name, known in tails.items() if known} == {"es": "train", "ge": "test"}
    heads = {answer.entity: answer.known_in for answer in model.predict(tail="fr", relation="bor", k=7).answers}
    assert {name: known for name, known in heads.items() if known} == {"es": "valid"}


def test_an_answer_known_in_two_splits_names_both() -> None:
    graph, encoder = geography(valid=[(FRANCE, BORDERS, SPAIN)]), fixed_encoder()
    model = Predictor(graph, encoder, FakeTexts(), build_index(encoder, FakeTexts(), 7))
    best = model.predict(head="fr", relation="bor", k=2).answers[1]
    assert (best.entity, best.known_in) == ("es", "train, valid")


def test_hidden_splits_leave_their_answers_out_and_keep_the_number() -> None:
    model = predictor()
    prediction = model.predict(head="fr", relation="bor", k=2, hide_known=["train"])
    assert names(prediction) == ["Paris", "Tbilisi"]
    assert [answer.rank for answer in prediction.answers] == [1, 2]
    with pytest.raises(GraphError, match="'tain'"):
        model.predict(head="fr", relation="bor", hide_known=["tain"])


def test_an_ambiguous_name_tells_which_was_taken_and_which_were_not() -> None:
    # The country is in one train triple, the state in none.
    prediction = predictor().predict(head="Georgia", relation="has capital")
    assert (prediction.entity.id, prediction.entity.description, prediction.how) == ("ge", "A country.", "name")
    assert [(other.id, other.description) for other in prediction.others] == [("us-ga", "A state.")]
    assert predictor().predict(head="us-ga", relation="has capital").others == ()


@pytest.mark.parametrize(("text", "how"), [("fr", "id"), ("France", "name"), ("fRANCE", "case-insensitive name")])
def test_entities_are_found_by_id_name_or_name_in_any_case(text: str, how: str) -> None:
    prediction = predictor().predict(head=text, relation="has capital")
    assert (prediction.entity.id, prediction.how) == ("fr", how)


def test_an_unknown_name_is_refused_with_the_nearest_and_the_way_to_free_text() -> None:
    with pytest.raises(GraphError) as caught:
        predictor().predict(head="Frankreich", relation="has capital")
    for words in ("'Frankreich'", "France", "--free-text"):
        assert words in str(caught.value)


def test_free_text_is_read_as_it_stands_and_known_nowhere() -> None:
    encoder = fixed_encoder()
    model = predictor(encoder)
    for call in (
        {"head": "Atlantis: A sunken island", "free_text": True},
        {"head": "Atlantis", "description": "A sunken island"},
    ):
        prediction = model.predict(relation="borders", **call)  # type: ignore[arg-type]
        assert asked(encoder) == (3, len("Atlantis"), len("A sunken island"), BORDERS)
        assert (prediction.entity.id, prediction.entity.name, prediction.how) == (None, "Atlantis", "free text")
        assert prediction.entity.description == "A sunken island"
        assert not any(answer.known_in for answer in prediction.answers)


def test_free_text_of_a_known_name_is_not_looked_up() -> None:
    encoder = fixed_encoder()
    assert predictor(encoder).predict(tail="Atlantis", relation="bor", free_text=True).how == "free text"
    assert asked(encoder) == (3, len("Atlantis"), 0, BORDERS + NUM_RELATIONS)


def test_a_description_keeps_a_colon_in_the_name() -> None:
    prediction = predictor(FakeEncoder()).predict(head="Star Trek: Voyager", relation="bor", description="")
    assert (prediction.entity.name, prediction.entity.description) == ("Star Trek: Voyager", "")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "found neither"),
        ({"head": "France", "tail": "Spain"}, "found both"),
        ({"head": "France", "k": 0}, "k = 0"),
        ({"head": " : x", "free_text": True}, "name of an entity"),
    ],
)
def test_wrong_usage_is_told(call: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        predictor().predict(relation="borders", **call)  # type: ignore[arg-type]


def test_an_unknown_relation_is_refused() -> None:
    with pytest.raises(GraphError, match="has capitol"):
        predictor().predict(head="France", relation="has capitol")


def test_an_index_of_other_weights_is_refused() -> None:
    index = build_index(FakeEncoder(name="before"), FakeTexts(), 7)
    with pytest.raises(RunError, match="stale index"):
        Predictor(geography(), FakeEncoder(name="after"), FakeTexts(), index)


def test_a_prediction_is_plain_data() -> None:
    data = predictor().predict(head="Georgia", relation="has capital", k=1).to_dict()
    first = {"rank": 1, "entity": "paris", "name": "Paris", "description": "A city.", "known_in": ""}
    assert json.loads(json.dumps(data)) == {
        "given": "head",
        "entity": {"id": "ge", "name": "Georgia", "description": "A country."},
        "how": "name",
        "others": [{"id": "us-ga", "name": "Georgia", "description": "A state."}],
        "relation": "cap",
        "relation_text": "has capital",
        "answers": [first | {"score": pytest.approx(0.9)}],
    }
