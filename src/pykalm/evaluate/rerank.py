"""Re-rank link prediction's best k entities by how likely the language model writes them after the question. docs/compare.md.

The two objectives meet here: the contrast makes a short list, the completion model reads it again. Within the list an
entity scores

    cosine / τ + weight · log p(answer, end | prompt)

that is, the log probability which the contrastive softmax gives it over the list plus `weight` times that of the language
model; what normalises either is the same for all entities of a question and falls out.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pykalm.errors import UsageError
from pykalm.evaluate.links import choose_triples, rank_links
from pykalm.evaluate.ranking import CHUNK_QUERIES, FloatArray, RankTable, join_rank_tables, rank_metrics
from pykalm.evaluate.shortlist import Shortlists, shortlist
from pykalm.graph.graph import IntArray, KnowledgeGraph, both_directions
from pykalm.graph.known import known_answers
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.index import EntityIndex
from pykalm.model.likelihood import answer_log_likelihoods
from pykalm.text.verbalize import Verbalizer

K = 20
"""Candidates that are read again; above 10, so that Hits@10 can change too."""

NORMALISATIONS: dict[str, Callable[[FloatArray, IntArray], FloatArray]] = {
    "sum": lambda likelihoods, num_tokens: likelihoods,
    "mean": lambda likelihoods, num_tokens: likelihoods / num_tokens,
}
"""A sum is the probability of the whole answer, and prefers short names; a mean over its tokens, the end token among them,
prefers long names whose later tokens follow from the first. Neither is right for every graph, so valid decides."""

WEIGHTS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Mix:
    """Say how much the language model counts, and how the length of an answer does; weight 0 leaves the order as it is."""

    weight: float
    normalisation: str = "sum"


PLAIN = Mix(0.0)
MIXES = (PLAIN, *(Mix(weight, name) for weight in WEIGHTS for name in NORMALISATIONS))
"""What valid chooses from."""


@dataclass(frozen=True, eq=False)
class Shortlisted:
    """Hold N triples with their ranks and, for the I questions whose answer is among the first k, what both models say.

    plain: 2N ranks in the order of `both_directions`; rows (I,): those of them with a list; cosines, likelihoods,
    num_tokens (I, k): of the answer, in column 0, and of the others of its list; a cosine of −inf where there are fewer.
    """

    triples: IntArray
    sampling: str
    plain: RankTable
    rows: IntArray
    cosines: FloatArray
    likelihoods: FloatArray
    num_tokens: IntArray
    temperature: float

    def ranks(self, mix: Mix) -> RankTable:
        """Return the 2N ranks after re-ranking; answers beyond their list keep the rank that they had."""
        scores = self.cosines / self.temperature
        if mix.weight:
            scores = scores + mix.weight * NORMALISATIONS[mix.normalisation](self.likelihoods, self.num_tokens)
        answer, others = scores[:, :1], scores[:, 1:]
        # A place in the list is a place in the graph: all of the list stands above all that is not in it.
        optimistic, pessimistic = self.plain.optimistic.copy(), self.plain.pessimistic.copy()
        optimistic[self.rows] = 1 + (others > answer).sum(axis=1)
        pessimistic[self.rows] = 1 + (others >= answer).sum(axis=1)
        return RankTable(optimistic, (optimistic + pessimistic) / 2, pessimistic, self.plain.num_candidates)

    def sides(self, mix: Mix) -> tuple[RankTable, RankTable]:
        """Return the ranks after re-ranking, (tail side, head side)."""
        ranks, is_tail_side = self.ranks(mix), np.arange(2 * len(self.triples)) < len(self.triples)
        return ranks.select(is_tail_side), ranks.select(~is_tail_side)

    def mrr(self, mix: Mix) -> float:
        """Return the MRR of both directions after re-ranking."""
        return rank_metrics(self.ranks(mix)).mrr


def choose_mix(valid: Shortlisted) -> Mix:
    """Return the mix with the best MRR; of several that are level the first of MIXES, which have the least weight."""
    return max(MIXES, key=valid.mrr)


def shortlist_links(
    graph: KnowledgeGraph,
    encoder: Encoder,
    verbalizer: Verbalizer,
    index: EntityIndex,
    *,
    split: str,
    k: int = K,
    limit: int | None = None,
    seed: int = 0,
    chunk_queries: int = CHUNK_QUERIES,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Shortlisted:
    """Rank a split, or `limit` of its triples drawn by seed, and let the language model read the first k of the lists.

    The list of a question is the first k entities that the filter of link prediction leaves, shorter where the cut would
    part entities of equal cosine. Only lists that hold their answer are read: in the others no order changes its rank.
    Raises UsageError for k or limit out of range, ModelError for a tokenizer without an end token, and what
    `evaluate_links` raises. All processes call it alike.
    """
    if k < 2:
        raise UsageError(f"wanted at least two candidates to re-rank, found k = {k}. Take more.")
    triples, sampling = choose_triples(graph, split, limit, seed)
    verbalizer.end_token_id()
    index.require_fresh(encoder, verbalizer)
    rows = both_directions(triples, graph.num_relations)
    questions, query_of_target = np.unique(rows[:, :2], axis=0, return_inverse=True)
    query = encoder.embed(verbalizer.queries(*questions.T))
    sides = rank_links(
        graph, index, query[torch.from_numpy(query_of_target)], triples, chunk_queries=chunk_queries, device=device
    )
    lists = shortlist(
        query, index, targets=rows[:, 2], query_of_target=query_of_target, known=known_answers(graph).lookup(*questions.T),
        k=k, chunk_queries=chunk_queries, device=device,
    )  # fmt: skip
    listed, entities, cosines = _lists_with_answers(lists, rows[:, 2], query_of_target)
    likelihoods, num_tokens = _read(encoder, verbalizer, rows[listed], entities, cosines, progress=progress)
    plain = join_rank_tables(sides)
    found = Shortlisted(triples, sampling, plain, listed, cosines, likelihoods, num_tokens, encoder.temperature())
    # From the scores of the lists also without the language model, so that weight 0 changes nothing however products round.
    return dataclasses.replace(found, plain=found.ranks(PLAIN))


def _lists_with_answers(
    lists: Shortlists, targets: IntArray, query_of_target: IntArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """Return the targets (I,) that are among the first k of their list, and entities and cosines (I, k) of these lists.

    Column 0 is the target. Of the others those stay which, with all that score at least as high, are k at most; so the
    last of the k best others never stays, and what is as high as it need not be known.
    """
    k = lists.scores.shape[1]
    others, answer = lists.scores[query_of_target], lists.target_scores[:, None]
    listed = np.flatnonzero((others >= answer).sum(axis=1) < k)
    others, answer = others[listed], answer[listed]
    # The place after the last that is level with each, in descending scores: a running minimum from the back.
    ends = np.full(others.shape, k)
    np.copyto(ends[:, :-1], np.arange(1, k), where=others[:, :-1] > others[:, 1:])
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    stays = (ends + (answer >= others) <= k) & np.isfinite(others)
    assert not stays[:, -1].any()
    cosines = np.concatenate([answer, np.where(stays, others, -np.inf)[:, :-1]], axis=1)
    entities = np.concatenate([targets[listed, None], lists.entities[query_of_target[listed]][:, :-1]], axis=1)
    return listed, entities, cosines


def _read(
    encoder: Encoder,
    verbalizer: Verbalizer,
    questions: IntArray,
    entities: IntArray,
    cosines: FloatArray,
    *,
    progress: Progress | None,
) -> tuple[FloatArray, IntArray]:
    """Return the log likelihoods (I, k) of entities as answers to questions (I, 3), and their numbers of tokens (I, k).

    Where a cosine is −inf there is no entity to read; it gets 0 and 1.
    """
    row, column = np.nonzero(np.isfinite(cosines))
    likelihoods, num_tokens = np.zeros(entities.shape), np.ones(entities.shape, dtype=np.int64)
    if len(row):
        completions = verbalizer.completions(questions[row, 0], questions[row, 1], entities[row, column])
        likelihoods[row, column] = answer_log_likelihoods(encoder, completions, progress=progress)
        num_tokens[row, column] = completions.num_answer_tokens
    return likelihoods, num_tokens
