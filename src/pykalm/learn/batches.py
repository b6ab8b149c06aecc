"""Batches: which triples a step learns from, and the trie, positives and masks that follow from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.known import KnownAnswers
from pykalm.learn.orders import ORDERS
from pykalm.text.trie import IntArray, TokenIds, TokenTrie
from pykalm.text.verbalize import Verbalizer


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold the texts of a step as one trie, and what the losses ask of it.

    query_nodes (B,), candidate_nodes (C,): where the distinct query and candidate texts are pooled;
    positives (P, 2): rows (query, candidate) of the batch's triples; known (B, C): True where a pair is a known training
    triple; answer_nodes, answer_tokens (A,): nodes that carry completion loss, and the token each must predict.
    """

    trie: TokenTrie
    query_nodes: IntArray
    candidate_nodes: IntArray
    positives: IntArray
    known: npt.NDArray[np.bool_]
    answer_nodes: IntArray
    answer_tokens: IntArray
    num_triples: int


@dataclass(frozen=True, eq=False)
class TripleOrder:
    """Say which training triples step k learns from: every one once an epoch, a function of seed and step alone.

    triples (N, 3); batching: a name of ORDERS. The last batch of an epoch may be short. Nothing to save: a resumed run
    asks for its step.
    """

    triples: IntArray
    batch_size: int
    seed: int
    batching: str = "random"
    _epochs: dict[int, IntArray] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Return how many steps see every triple once."""
        return -(-len(self.triples) // self.batch_size)

    def at(self, step: int) -> IntArray:
        """Return the triples (at most batch_size, 3) of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen: IntArray = self.triples[self._epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]]
        return chosen

    def _epoch(self, epoch: int) -> IntArray:
        """Return the order of an epoch, kept until another one is asked for."""
        if epoch not in self._epochs:
            self._epochs.clear()
            generator = np.random.default_rng([self.seed, epoch])
            self._epochs[epoch] = ORDERS[self.batching](self.triples, generator, self.batch_size)
        return self._epochs[epoch]


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """Build batches of a graph: both directions of every triple, every distinct entity a candidate. METHOD.md §2, §6.

    completion_share: share of the triples (each in one direction, drawn by seed) whose completion is trained; 0 for none.
    lay_out: texts to trie, as the encoder wants it.
    """

    graph: KnowledgeGraph
    verbalizer: Verbalizer
    known: KnownAnswers
    lay_out: Callable[[Sequence[TokenIds]], TokenTrie]
    explicit: bool
    completion_share: float

    def build(self, triples: IntArray, generator: np.random.Generator) -> Batch:
        """Return the batch of triples (N, 3), relations in [0, R)."""
        directed = np.concatenate([triples, inverse(triples, self.graph.num_relations)])
        pairs, query_of = np.unique(directed[:, :2], axis=0, return_inverse=True)
        entities, entity_of = np.unique(directed[:, [0, 2]], return_inverse=True)
        candidate_of = entity_of.reshape(-1, 2)[:, 1]
        completed = self._draw_completions(directed, generator)
        completions = [self.verbalizer.completion(*map(int, row)) for row in completed]

        queries = self.verbalizer.queries(pairs[:, 0], pairs[:, 1]) if self.explicit else []
        candidates = self.verbalizer.candidates(entities) if self.explicit else []
        trie = self.lay_out([*queries, *candidates, *(completion.tokens for completion in completions)])
        answer_nodes, answer_tokens = _answers(trie, completions_start=len(queries) + len(candidates),
                                               starts=[completion.answer_start for completion in completions],
                                               texts=[completion.tokens for completion in completions])  # fmt: skip
        last = trie.last_nodes()
        known = self.known.mask(pairs[:, 0], pairs[:, 1], entities)
        query_nodes, candidate_nodes, positives, known = _distinct_texts(
            last[: len(queries)],
            last[len(queries) : len(queries) + len(candidates)],
            np.stack([query_of.ravel(), candidate_of], axis=1),
            known,
        )
        return Batch(
            trie, query_nodes, candidate_nodes, positives, known, answer_nodes, answer_tokens, num_triples=len(triples)
        )

    def _draw_completions(self, directed: IntArray, generator: np.random.Generator) -> IntArray:
        """Draw the triples whose completion is trained, each in one of its directions."""
        half = len(directed) // 2
        count = round(half * self.completion_share) if self.completion_share else 0
        count = max(count, 1) if self.completion_share else 0
        rows = generator.choice(half, size=count, replace=False) + half * generator.integers(0, 2, size=count)
        chosen: IntArray = directed[rows]
        return chosen


def inverse(triples: IntArray, num_relations: int) -> IntArray:
    """Return (t, r⁻¹, h) for every row (h, r, t); r⁻¹ is r + R."""
    return np.stack([triples[:, 2], triples[:, 1] + num_relations, triples[:, 0]], axis=1)


def _answers(
    trie: TokenTrie, *, completions_start: int, starts: Sequence[int], texts: Sequence[TokenIds]
) -> tuple[IntArray, IntArray]:
    """Return the nodes that carry loss and the tokens they must predict: node before, then token, for every answer token."""
    nodes = [
        trie.paths[completions_start + i, start - 1 : len(text) - 1]
        for i, (start, text) in enumerate(zip(starts, texts, strict=True))
    ]
    tokens = [text[start:] for start, text in zip(starts, texts, strict=True)]
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *nodes]), np.concatenate([empty, *tokens])


def _distinct_texts(
    query_nodes: IntArray, candidate_nodes: IntArray, positives: IntArray, known: npt.NDArray[np.bool_]
) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[np.bool_]]:
    """Merge queries, and candidates, whose texts are the same: nothing in their vectors could tell them apart.

    A pair of texts is known when any of the pairs behind it is.
    """
    if not len(query_nodes):
        none = np.zeros((0, 2), dtype=np.int64)
        return query_nodes, candidate_nodes, none, np.zeros((0, 0), dtype=np.bool_)
    distinct_queries, query_of = np.unique(query_nodes, return_inverse=True)
    distinct_candidates, candidate_of = np.unique(candidate_nodes, return_inverse=True)
    rows, columns = np.nonzero(known)
    merged = np.zeros((len(distinct_queries), len(distinct_candidates)), dtype=np.bool_)
    merged[query_of[rows], candidate_of[columns]] = True
    pairs = np.unique(np.stack([query_of[positives[:, 0]], candidate_of[positives[:, 1]]], axis=1), axis=0)
    return distinct_queries, distinct_candidates, pairs, merged
