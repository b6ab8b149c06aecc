"""Similarity of queries and tails for a sample of triples: what alignment changes, as one small matrix."""

import numpy as np
import numpy.typing as npt
import torch

from pykalm.errors import GraphError
from pykalm.evaluate.links import GraphTexts
from pykalm.graph.graph import IntArray, KnowledgeGraph
from pykalm.model.index import TextEncoder, entity_scores
from pykalm.text.texts import Texts

FloatMatrix = npt.NDArray[np.float32]


def sample_triples(graph: KnowledgeGraph, split: str = "test", *, count: int = 24, seed: int = 0) -> IntArray:
    """Draw up to `count` triples with distinct heads and distinct tails (n, 3), ordered by relation.

    With distinct tails, only the diagonal of their similarity matrix holds the answers that were drawn.
    Raises GraphError for a split that is missing or empty.
    """
    triples = graph.triples(split)
    if not len(triples):
        raise GraphError(f"graph '{graph.name}': split '{split}' is empty. Take another one.")
    shuffled = np.random.default_rng(seed).permutation(triples)
    heads: set[int] = set()
    tails: set[int] = set()
    chosen: list[tuple[int, int, int]] = []
    for head, relation, tail in shuffled.tolist():
        if head not in heads and tail not in tails and len(chosen) < count:
            chosen.append((head, relation, tail))
            heads.add(head)
            tails.add(tail)
    sample = np.array(chosen, dtype=np.int64)
    return sample[np.argsort(sample[:, 1], kind="stable")]


def similarity_matrix(encoder: TextEncoder, texts: GraphTexts, triples: IntArray) -> FloatMatrix:
    """Return the cosines (n, n) of the queries (h, r) of n triples (n, 3), in rows, with their tails, in columns.

    Raises ModelError where a cosine is no number.
    """
    queries, candidates = texts.queries(triples[:, 0], triples[:, 1]), texts.candidates(triples[:, 2])
    vectors = encoder.embed(Texts.chain([Texts.of(queries), Texts.of(candidates)]))
    query, tails = vectors[: len(triples)], vectors[len(triples) :]
    matrix: FloatMatrix = entity_scores(query, tails, torch.arange(len(triples))).numpy()
    return matrix


def triple_labels(graph: KnowledgeGraph, triples: IntArray) -> tuple[list[str], list[str]]:
    """Name the rows ("France · capital") and columns ("Paris") of the similarity matrix of triples (n, 3)."""
    names = graph.entity_names
    queries = [f"{names[head]} · {graph.relation_text(relation)}" for head, relation, _ in triples.tolist()]
    return queries, [names[tail] for tail in triples[:, 2].tolist()]
