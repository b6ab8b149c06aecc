"""Batches: which triples a step learns from, and the trie, positives and masks that follow from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from pykalm.graph.graph import KnowledgeGraph, both_directions
from pykalm.graph.known import KnownAnswers
from pykalm.learn.orders import ORDERS
from pykalm.model.own_texts import OwnTexts
from pykalm.text.texts import IntArray, Texts
from pykalm.text.trie import TokenTrie
from pykalm.text.verbalize import Completions, Verbalizer, answer_positions


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold the texts of a step as one trie, and what the losses ask of it.

    query_nodes (B,), candidate_nodes (C,): where the distinct query and candidate texts are pooled;
    positives (P, 2): rows (query, candidate) of the batch's triples; masked (B, C): True where a pair is no negative: a known
    training triple or, where so asked, a query and its own head; own_heads (B,): the candidate that is a query's own head, −1
    where that is a known answer of it; answer_nodes, answer_tokens (A,): nodes that carry completion loss, and the token each
    must predict; own_nodes (S,): nodes of the base model's own texts; own_likely (S, K), own_log_p (S, K + 1): what it would
    write next, as in OwnTexts.
    """

    trie: TokenTrie
    query_nodes: IntArray
    candidate_nodes: IntArray
    positives: IntArray
    masked: npt.NDArray[np.bool_]
    own_heads: IntArray
    answer_nodes: IntArray
    answer_tokens: IntArray
    num_triples: int
    own_nodes: IntArray
    own_likely: npt.NDArray[np.int32]
    own_log_p: npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class TripleOrder:
    """Say which training triples step k learns from: every one once an epoch, a function of seed and step alone.

    triples (N, 3), directed ones where the two directions of a triple are drawn apart; batching: a name of ORDERS. The last
    batch of an epoch may be short. Nothing to save: a resumed run asks for its step. Batches are made when they are asked
    for, and kept until another epoch is.
    """

    triples: IntArray
    batch_size: int
    seed: int
    batching: str = "random"
    _epochs: dict[int, tuple[Iterator[IntArray], list[IntArray]]] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Return how many steps see every triple once."""
        return -(-len(self.triples) // self.batch_size)

    def at(self, step: int) -> IntArray:
        """Return the triples (at most batch_size, 3) of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()
            generator = np.random.default_rng([self.seed, epoch])
            self._epochs[epoch] = ORDERS[self.batching](self.triples, generator, self.batch_size), []
        to_come, made = self._epochs[epoch]
        made.extend(islice(to_come, max(0, place + 1 - len(made))))
        chosen: IntArray = self.triples[made[place]]
        return chosen


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """Build batches of a graph: every distinct entity of the triples a candidate. METHOD.md §2, §6.

    completion_share: share of the triples whose completion is trained, each in one direction, drawn by seed; 0 for none.
    lay_out: texts to trie, as the encoder wants it; own_texts: those of the base model, own_tokens of them (in whole texts)
    in every batch; masks_own_heads: whether a query's own head is no negative among the others; adds_inverses:
    whether triples are learned in both directions, else they are directed already, each drawn for itself, and so are
    completions, half that share of them.
    """

    graph: KnowledgeGraph
    verbalizer: Verbalizer
    known: KnownAnswers
    lay_out: Callable[[Texts], TokenTrie]
    explicit: bool
    completion_share: float
    own_texts: OwnTexts = field(default_factory=OwnTexts.none)
    own_tokens: int = 0
    masks_own_heads: bool = True
    adds_inverses: bool = True

    def build(self, triples: IntArray, generator: np.random.Generator) -> Batch:
        """Return the batch of triples (N, 3), relations in [0, R), or in [0, 2R) where no inverses are added."""
        directed = both_directions(triples, self.graph.num_relations) if self.adds_inverses else triples
        completed = self._draw_completions(directed, generator)
        heads, relations, query_of = _distinct_pairs(directed[:, :2])
        entities = np.unique(directed[:, [0, 2]])
        tail_of = np.searchsorted(entities, directed[:, 2])
        queries = self.verbalizer.queries(heads, relations) if self.explicit else Texts.of([])
        candidates = self.verbalizer.candidates(entities) if self.explicit else Texts.of([])
        # Without completions the tokenizer need not have the end token with which they end.
        completions = self.verbalizer.completions(*completed.T) if len(completed) else Completions.none()

        own = self._draw_own_texts(generator)
        trie = self.lay_out(Texts.chain([queries, candidates, completions.texts, self.own_texts.texts(own)]))
        own_likely, own_log_p = self.own_texts.distributions(own)
        last, num_queries, num_pooled = trie.last_nodes(), len(queries), len(queries) + len(candidates)
        answer_nodes, answer_tokens = answer_positions(trie, completions, start=num_pooled)
        query_nodes, candidate_nodes, positives, masked, own_heads = _distinct_texts(
            last[:num_queries],
            last[num_queries:num_pooled],
            np.stack([query_of, tail_of], axis=1),
            np.stack(self.known.pairs(heads, relations, entities), axis=1),
            np.searchsorted(entities, heads),
            masks_own=self.masks_own_heads,
        )
        return Batch(
            trie, query_nodes, candidate_nodes, positives, masked, own_heads, answer_nodes, answer_tokens,
            num_triples=len(directed) // 2,
            own_nodes=trie.paths[num_pooled + len(completions) :, : self.own_texts.length].ravel().astype(np.int64),
            own_likely=own_likely,
            own_log_p=own_log_p,
        )  # fmt: skip

    def _draw_completions(self, directed: IntArray, generator: np.random.Generator) -> IntArray:
        """Draw the triples whose completion is trained: of two directions that are learned together, one."""
        half = len(directed) // 2
        count = max(round(half * self.completion_share), 1) if self.completion_share else 0
        if self.adds_inverses:
            rows = generator.choice(half, size=count, replace=False) + half * generator.integers(0, 2, size=count)
        else:
            rows = generator.choice(len(directed), size=count, replace=False)
        chosen: IntArray = directed[rows]
        return chosen

    def _draw_own_texts(self, generator: np.random.Generator) -> IntArray:
        """Draw the texts of the base model that a batch holds, by number."""
        wanted = min(len(self.own_texts), -(-self.own_tokens // max(1, self.own_texts.length)))
        return (
            generator.choice(len(self.own_texts), size=wanted, replace=False) if wanted else np.zeros(0, dtype=np.int64)
        )


def _distinct_pairs(pairs: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Return the distinct (head, relation) of pairs (N, 2), heads and relations apart, and which of them each pair is."""
    base = int(pairs[:, 1].max(initial=0)) + 1
    distinct, pair_of = np.unique(pairs[:, 0] * base + pairs[:, 1], return_inverse=True)
    return distinct // base, distinct % base, pair_of


def _distinct_texts(
    query_nodes: IntArray,
    candidate_nodes: IntArray,
    positives: IntArray,
    known: IntArray,
    own: IntArray,
    *,
    masks_own: bool,
) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[np.bool_], IntArray]:
    """Merge queries, and candidates, whose texts are the same: nothing in their vectors could tell them apart.

    positives (P, 2), known (n, 2): pairs (query, candidate) of entities; own: the candidate that is the head of each query,
    which masks_own masks. A pair of texts is known when any of the pairs behind it is; of several heads that one query text
    has, the last is its own. Returns the two kinds of nodes, and positives, masked and own_heads as a batch holds them.
    """
    if not len(query_nodes):
        return query_nodes, candidate_nodes, positives[:0], np.zeros((0, 0), dtype=np.bool_), own[:0]
    distinct_queries, query_of = np.unique(query_nodes, return_inverse=True)
    distinct_candidates, candidate_of = np.unique(candidate_nodes, return_inverse=True)
    masked = np.zeros((len(distinct_queries), len(distinct_candidates)), dtype=np.bool_)
    masked[query_of[known[:, 0]], candidate_of[known[:, 1]]] = True
    own_heads = np.empty(len(distinct_queries), dtype=np.int64)
    own_heads[query_of] = candidate_of[own]
    own_heads[masked[np.arange(len(own_heads)), own_heads]] = -1
    if masks_own:
        masked[query_of, candidate_of[own]] = True
    keys = query_of[positives[:, 0]] * len(distinct_candidates) + candidate_of[positives[:, 1]]
    pairs = np.stack(np.divmod(np.unique(keys), len(distinct_candidates)), axis=1)
    return distinct_queries, distinct_candidates, pairs, masked, own_heads
