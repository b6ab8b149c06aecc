"""Claims about the bank of negatives: what it keeps, what it gives to a batch, and that training uses it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pykalm.config import ObjectiveSettings
from pykalm.learn.bank import EntityBank
from pykalm.learn.batches import Batch
from pykalm.learn.state import STATE_FILE, read_metrics
from pykalm.model.run import Run
from pykalm.text.texts import Texts
from tests.laws.common import build_batch, tiny_encoder, tiny_graph, tiny_verbalizer

TEXTS = Texts.of([np.array([number]) for number in (5, 6, 7, 6, 8)])
"""Five entities; 1 and 3 have the same text."""


def bank_of(**settings: Any) -> EntityBank:
    objective = ObjectiveSettings(**{"bank": "plain", **settings})
    return EntityBank(TEXTS, 2, objective, device=torch.device("cpu"))


def batch_of(candidates: list[int], known: list[tuple[int, int]] | None = None) -> Batch:
    """Return the part of a batch that a bank reads."""
    triples = ((0, 0, 2), (0, 0, 3), (0, 0, 4))
    batch = build_batch(tiny_encoder(), tiny_verbalizer(tiny_graph(triples)))
    answers = np.array(known or [], dtype=np.int64).reshape(-1, 2)
    return dataclasses.replace(batch, candidate_entities=np.array(candidates), known_answers=answers)


def given(bank: EntityBank, batch: Batch) -> tuple[list[list[float]], list[list[int]]]:
    vectors, known = bank.negatives(batch)
    return vectors.tolist(), known.tolist()


RIGHT, UP, LEFT = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def test_a_bank_gives_what_earlier_steps_computed_and_the_batch_does_not_hold() -> None:
    bank = bank_of()
    assert given(bank, batch_of([0], [(0, 2)])) == ([], [])
    bank.keep(batch_of([0, 1]), torch.tensor([RIGHT, UP]))
    bank.keep(batch_of([1, 4]), torch.tensor([LEFT, UP]))
    assert given(bank, batch_of([2])) == ([RIGHT, LEFT, UP], [])
    assert given(bank, batch_of([0, 2])) == ([LEFT, UP], [])


def test_entities_of_one_text_are_one_vector_which_is_known_when_any_of_them_is() -> None:
    """Entity 3 bears the text of 1: it fills, hides and masks the same row. Query 2 knows what was never computed."""
    bank = bank_of()
    bank.keep(batch_of([0, 3]), torch.tensor([RIGHT, UP]))
    assert given(bank, batch_of([2], [(0, 1), (1, 3), (2, 4)])) == ([RIGHT, UP], [[0, 1], [1, 1]])
    assert given(bank, batch_of([1], [(0, 3), (1, 0)])) == ([RIGHT], [[1, 0]])


def test_a_momentum_of_a_fifth_is_worked_out_by_hand() -> None:
    """0.2 · (1, 0) + 0.8 · (0, 1) has length √0.68; the other row is new."""
    bank = bank_of(bank="momentum", bank_momentum=0.2)
    bank.keep(batch_of([0]), torch.tensor([RIGHT]))
    bank.keep(batch_of([0, 4]), torch.tensor([UP, LEFT]))
    vectors, _ = bank.negatives(batch_of([2]))
    assert torch.allclose(vectors, torch.tensor([[0.2 / 0.68**0.5, 0.8 / 0.68**0.5], LEFT]))


def test_an_old_vector_neither_counts_nor_is_mixed_in() -> None:
    """Age 1: a vector serves the next step only."""
    bank = bank_of(bank="momentum", bank_age=1)
    bank.keep(batch_of([0]), torch.tensor([RIGHT]))
    assert given(bank, batch_of([2]))[0] == [RIGHT]
    bank.keep(batch_of([4]), torch.tensor([UP]))
    assert given(bank, batch_of([2]))[0] == [UP]
    bank.keep(batch_of([0]), torch.tensor([LEFT]))
    assert given(bank, batch_of([2]))[0] == [LEFT]


def test_a_batch_names_its_candidates_and_every_known_answer_of_its_queries() -> None:
    """bo and cy get one text; ada knows both, whichever triple is drawn, and so is known by both."""
    names = ("ada", "ada b", "bo", "bo", "dan", "eve")
    graph = dataclasses.replace(tiny_graph(), entity_names=names, entity_descriptions=("",) * 6)
    verbalizer = tiny_verbalizer(graph)
    batch = build_batch(tiny_encoder(), verbalizer, [(0, 0, 3)])
    decode, paths = verbalizer.tokenizer.decode, batch.trie.paths
    text = {int(path[path >= 0][-1]): decode(batch.trie.token_ids[path[path >= 0]]) for path in paths}
    candidates = [decode(verbalizer.candidate(entity)) for entity in batch.candidate_entities]
    assert candidates == [text[node] for node in batch.candidate_nodes.tolist()]
    assert sorted(candidates) == ["[ ada ]", "[ bo ]"]
    answers = {(text[int(batch.query_nodes[row])], int(entity)) for row, entity in batch.known_answers}
    # The query is that of cy alone: who else knows bo is an answer to another query, which this batch does not ask.
    assert answers == {("[ ada, knows ]", 2), ("[ ada, knows ]", 3), ("[ bo, is known by ]", 0)}


def test_training_counts_the_bank_from_the_second_step_on_and_saves_it(train: Callable[..., Run]) -> None:
    """Steps of two triples; the first losses are those of a run without a bank, later ones are higher."""
    runs = [train(kind, objective__bank=kind, adapter__dropout=0).path for kind in ("none", "plain", "momentum")]
    without, plain, momentum = ([line["explicit"] for line in read_metrics(run)] for run in runs)
    assert without[0] == plain[0] == momentum[0]
    assert plain[1] == momentum[1] > without[1]
    assert plain[-1] != momentum[-1]
    saved = [torch.load(run / STATE_FILE, weights_only=True)["bank"] for run in runs]
    assert saved[0] == {}
    # dan and eve occur in train as the others do: six texts, all computed in the first epoch.
    assert saved[1]["vectors"].shape == (6, 32)
    assert int(saved[1]["step"]) == 6
    assert int(saved[1]["computed"].min()) >= 3


def test_a_bank_without_the_contrast_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"wanted objective.bank none where objective.explicit is false; found plain"
    ):
        ObjectiveSettings(explicit=False, bank="plain")
