"""Classification without a word: a triple is taken as true where its link prediction score exceeds its relation's threshold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pykalm.evaluate.corruptions import corrupt_triples, hard_negatives
from pykalm.evaluate.links import GraphTexts
from pykalm.evaluate.qa_questions import hard_set
from pykalm.graph.graph import IntArray, KnowledgeGraph, both_directions
from pykalm.model.index import TextEncoder, distinct_texts
from pykalm.text.questions import Question
from pykalm.text.texts import Texts

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

FEWEST = 5
"""True triples of valid from which on a relation has a threshold of its own; below, that of all relations."""

MOST = 2000
"""Triples of valid, drawn by seed, that thresholds are taken from: enough for them, and quick."""


def classify_by_score(
    graph: KnowledgeGraph, encoder: TextEncoder, texts: GraphTexts, questions: Sequence[Question], *, seed: int
) -> dict[str, dict[str, float]]:
    """Return the accuracy of calibrated scores on the classifications, against corruptions and shipped negatives.

    The score of (h, r, t) is the mean of the cosines of f(h, r) with f(t) and of f(t, r⁻¹) with f(h); thresholds are those
    that tell most triples of valid from false ones of the same kind. The questions are not those of valid.
    """
    random_set = [place for place, question in enumerate(questions) if question.source != "hard"]
    places = {"random": random_set, "hard": hard_set(questions)}
    true = _sample(graph.triples("valid"), MOST, seed)
    false = {
        "random": corrupt_triples(graph, true, seed=seed),
        "hard": hard_negatives(graph, "valid", limit=MOST, seed=seed),
    }
    asked = np.array([(q.head, q.relation, q.tail) for q in questions], dtype=np.int64)
    parts = [asked, true, false["random"], false["hard"]]
    scores = triple_scores(encoder, texts, np.concatenate(parts), graph.num_relations)
    of_asked, of_true, *of_false = np.split(scores, np.cumsum([len(part) for part in parts])[:-1])
    is_true = np.array([question.is_true for question in questions])
    results = {}
    for (kind, chosen), negatives in zip(places.items(), of_false, strict=True):
        if not chosen or not len(negatives):
            continue
        relations = np.concatenate([true[:, 1], false[kind][:, 1]])
        labels = np.arange(len(relations)) < len(true)
        threshold = relation_thresholds(np.concatenate([of_true, negatives]), labels, relations, graph.num_relations)
        right = (of_asked[chosen] > threshold[asked[chosen, 1]]) == is_true[chosen]
        results[kind] = {"accuracy": float(right.mean()), "num_questions": len(chosen)}
    return results


def triple_scores(encoder: TextEncoder, texts: GraphTexts, triples: IntArray, num_relations: int) -> FloatArray:
    """Return the score (N,) of N triples: the mean cosine of the query and the answer of both directions."""
    rows = both_directions(triples, num_relations)
    pieces = [Texts.of(texts.queries(rows[:, 0], rows[:, 1])), Texts.of(texts.candidates(rows[:, 2]))]
    distinct, place = distinct_texts(Texts.chain(pieces))
    vectors = encoder.embed(distinct)
    query, answer = (vectors[torch.from_numpy(part)] for part in np.split(place, 2))
    cosines: FloatArray = (query.double() * answer.double()).sum(dim=1).numpy()
    return np.asarray(cosines.reshape(2, -1).mean(axis=0))


def relation_thresholds(scores: FloatArray, is_true: BoolArray, relations: IntArray, num_relations: int) -> FloatArray:
    """Return for every relation (R,) the threshold above which most of its scores (N,) are of true triples, below of false."""
    thresholds = np.full(num_relations, best_threshold(scores, is_true))
    for relation in np.unique(relations).tolist():
        own = relations == relation
        if (own & is_true).sum() >= FEWEST:
            thresholds[relation] = best_threshold(scores[own], is_true[own])
    return thresholds


def best_threshold(scores: FloatArray, is_true: BoolArray) -> float:
    """Return the threshold, midway between two neighbouring scores, that judges most of N scores right: the lowest of several.

    It may lie below or above all of them.
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    edges = np.concatenate([[ordered[0] - 1], (ordered[1:] + ordered[:-1]) / 2, [ordered[-1] + 1]])
    false_below = np.concatenate([[0], np.cumsum(~is_true[order])])
    true_above = is_true.sum() - np.concatenate([[0], np.cumsum(is_true[order])])
    is_between = np.concatenate([[True], ordered[1:] > ordered[:-1], [True]])  # equal scores are not told apart
    return float(edges[np.argmax(np.where(is_between, false_below + true_above, -1))])


def _sample(triples: IntArray, limit: int, seed: int) -> IntArray:
    if len(triples) <= limit:
        return triples
    return triples[np.sort(np.random.default_rng(seed).choice(len(triples), size=limit, replace=False))]
