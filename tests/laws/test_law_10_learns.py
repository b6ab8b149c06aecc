"""Law 10: a tiny graph is learned; with shuffled tails it is not."""

import dataclasses
import functools
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from pykalm import api
from pykalm.evaluate.links import evaluate_links
from pykalm.graph.graph import KnowledgeGraph
from pykalm.learn import step
from tests.laws.common import replaced
from tests.tiny_models import save_tiny_model

WORDS = ("red", "green", "blue", "one", "two", "three", "oak", "elm", "ash", "fir", "cat", "dog")
SETTINGS = {"training.epochs": 30, "training.batch_size": 6, "training.precision": "fp32", "training.device": "cpu",
            "training.learning_rate": 0.01, "objective.completion_share": 0.5}  # fmt: skip


def ring(shuffled: bool) -> tuple[KnowledgeGraph, np.ndarray]:
    """Return a ring of twelve words to train on, its tails shuffled or not, and the true ring."""
    places = np.arange(len(WORDS))
    truth = np.stack([places, np.zeros_like(places), np.roll(places, -1)], axis=1)
    triples = truth.copy()
    if shuffled:
        triples[:, 2] = np.random.default_rng(0).permutation(triples[:, 2])
    graph = KnowledgeGraph(
        name="ring", entity_ids=WORDS, entity_names=WORDS, entity_descriptions=("",) * len(WORDS),
        relation_ids=("next",), relation_texts=("is followed by",), inverse_texts=("follows",), splits={"train": triples},
    )  # fmt: skip
    return graph, truth


def mrr_after_training(*, shuffled: bool) -> float:
    """Train on the ring and return the MRR of the true ring, both directions."""
    graph, truth = ring(shuffled)
    with tempfile.TemporaryDirectory() as name:
        model = save_tiny_model(Path(name) / "model")
        run = api.train(graph, out=Path(name) / "run", model=str(model), settings=SETTINGS)
        asked = dataclasses.replace(graph, splits={"train": truth})
        return evaluate_links(asked, run.encoder, run.verbalizer, split="train")[0].mean.mrr


@functools.cache
def mrr_untrained() -> float:
    """Return what chance gives: the mean of 1/rank over twelve equally likely ranks."""
    return float(np.mean(1 / np.arange(1, len(WORDS) + 1)))


def test_a_tiny_graph_is_learned_and_shuffled_tails_are_not() -> None:
    """Chance is 0.26. A wrong positive, a lost gradient or a wrong sign stays near it."""
    assert mrr_after_training(shuffled=False) > 0.95
    assert mrr_after_training(shuffled=True) < mrr_untrained() + 0.2


def positives_are_rolled() -> AbstractContextManager[None]:
    """Teach every query the answer of another."""
    right = step.dual_view_loss

    def wrong(query: Any, candidates: Any, *, positives: Any, masked: Any, **rest: Any) -> Any:
        rolled = positives.clone()
        rolled[:, 1] = positives[:, 1].roll(1)
        wrong_mask = masked & False
        wrong_mask[rolled[:, 0], rolled[:, 1]] = True
        return right(query, candidates, positives=rolled, masked=wrong_mask, **rest)

    return replaced(step, "dual_view_loss", wrong)


def vectors_carry_no_gradient() -> AbstractContextManager[None]:
    """Detach what is pooled: the losses fall a little, by the temperature, and nothing is learned."""
    right = step.pooled
    return replaced(step, "pooled", lambda states: right(states).detach())


BREAKS = {
    "positives are rolled": positives_are_rolled,
    "vectors carry no gradient": vectors_carry_no_gradient,
}
CHECKS = dict.fromkeys(BREAKS, "test_a_tiny_graph_is_learned_and_shuffled_tails_are_not")
