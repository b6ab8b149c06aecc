"""Law 7, after re-ranking: ranks equal a brute-force loop that reads every text alone, for every mix of both models."""

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pykalm.evaluate import rerank
from pykalm.evaluate.links import evaluate_links
from pykalm.evaluate.rerank import MIXES, PLAIN, Mix, shortlist_links
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.known import known_answers
from pykalm.model import likelihood
from pykalm.model.encoder import Encoder
from pykalm.model.index import build_index
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import replaced, tiny_encoder, tiny_graph, tiny_verbalizer
from tests.laws.test_law_01_packed import both_ways, read_alone
from tests.ranks import run_ranks

KS = (2, 3, 4, 50)


def two_poets() -> KnowledgeGraph:
    """Return the six people, of whom two now share their whole text, and more of what valid and test know."""
    graph = tiny_graph()
    rows = {
        "train": graph.triples("train")[:4],
        "valid": np.array([(3, 0, 5), (0, 0, 4), (1, 1, 5)]),
        "test": np.array([(0, 0, 1), (0, 0, 5), (4, 1, 2), (2, 1, 5), (5, 0, 4), (0, 0, 1), (5, 1, 1), (2, 0, 1)]),
    }
    names, descriptions = ("ada", "ada b", "bo", "cy", "cy", "eve"), ("a poet", "", "a baker", "a poet", "a poet", "")
    return dataclasses.replace(graph, splits=rows, entity_names=names, entity_descriptions=descriptions)


@torch.no_grad()
def log_likelihood(encoder: Encoder, verbalizer: Verbalizer, head: int, relation: int, tail: int) -> tuple[float, int]:
    """Return the log likelihood of an answer and end token in a pass of its own, and the number of these tokens."""
    completion = verbalizer.completion(head, relation, tail)
    logits = encoder.causal_lm(input_ids=torch.from_numpy(completion.tokens)[None]).logits[0]
    answer = torch.from_numpy(completion.tokens[completion.answer_start :])
    return -float(F.cross_entropy(logits[completion.answer_start - 1 : -1], answer, reduction="sum")), len(answer)


def ranks_by_loops(encoder: Encoder, verbalizer: Verbalizer, k: int) -> list[dict[Mix, float]]:
    """Return the realistic rank of every question of test under every mix."""
    graph, every = verbalizer.graph, range(verbalizer.graph.num_entities)
    facts = {fact for split in graph.splits for fact in both_ways(graph.triples(split), graph.num_relations)}
    ranks = []
    with torch.no_grad():
        vectors = {e: read_alone(encoder, verbalizer.candidate(e)) for e in every}
        for head, relation, tail in both_ways(graph.triples("test"), graph.num_relations):
            query = read_alone(encoder, verbalizer.query(head, relation))
            cosine = {e: round(float(query @ vectors[e]), 5) for e in every}
            left = [e for e in every if e == tail or (head, relation, e) not in facts]
            listed = [e for e in left if sum(cosine[o] >= cosine[e] for o in left) <= k]
            spoken = {e: log_likelihood(encoder, verbalizer, head, relation, e) for e in listed}
            ranks.append(
                {mix: rank_of(tail, left, listed, cosine, spoken, encoder.temperature(), mix) for mix in MIXES}
            )
    return ranks


def rank_of(
    tail: int, left: list[int], listed: list[int], cosine: Any, spoken: Any, temperature: float, mix: Mix
) -> float:
    if tail in listed:
        divisor = {"sum": lambda tokens: 1, "mean": lambda tokens: tokens}[mix.normalisation]
        score = {
            e: round(cosine[e] / temperature + mix.weight * spoken[e][0] / divisor(spoken[e][1]), 3) for e in listed
        }
        better, level = (sum(test(score[e]) for e in listed) for test in (score[tail].__lt__, score[tail].__eq__))
    else:
        better, level = (sum(test(cosine[e]) for e in left) for test in (cosine[tail].__lt__, cosine[tail].__eq__))
    return (1 + better + better + level) / 2


def test_reranked_ranks_equal_a_loop_over_separate_passes() -> None:
    """Every k and mix, both wordings. Scores that are not equal differ by 2e-3 here or more, rounding by 5e-4."""
    moved = 0
    for template in ("prefix-sharing", "published"):
        encoder, verbalizer = tiny_encoder(row_tokens=48), tiny_verbalizer(two_poets(), template=template)
        index = build_index(encoder, verbalizer, 6)
        for k in KS:
            found = shortlist_links(verbalizer.graph, encoder, verbalizer, index, split="test", k=k)
            expected = ranks_by_loops(encoder, verbalizer, k)
            for mix in MIXES:
                assert found.ranks(mix).realistic.tolist() == [ranks[mix] for ranks in expected], (template, k, mix)
            moved += sum(len(set(ranks.values())) > 1 for ranks in expected)
    assert moved > 20  # the language model has a say


def test_weight_0_gives_the_ranks_of_link_prediction() -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(two_poets())
    plain, index = evaluate_links(verbalizer.graph, encoder, verbalizer)
    for k in KS:
        tail, head = shortlist_links(verbalizer.graph, encoder, verbalizer, index, split="test", k=k).sides(PLAIN)
        for found, wanted in ((tail, plain.tail), (head, plain.head)):
            for column in ("optimistic", "realistic", "pessimistic", "num_candidates"):
                assert getattr(found, column).tolist() == getattr(wanted, column).tolist()


def read_in_slices() -> list[float]:
    """Return the likelihoods of every entity as an answer to one question, two texts at once; for a process of its own."""
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(two_poets())
    completions = verbalizer.completions(np.zeros(6, dtype=np.int64), np.zeros(6, dtype=np.int64), np.arange(6))
    with replaced(likelihood, "TEXTS_AT_ONCE", 2):  # type: ignore[arg-type]
        found: list[float] = likelihood.answer_log_likelihoods(encoder, completions).tolist()
    return found


@pytest.mark.slow
def test_processes_share_the_answers_out_and_all_know_all() -> None:
    assert run_ranks(2, read_in_slices) == [read_in_slices()] * 2


def known_answers_stay_in_the_lists() -> AbstractContextManager[None]:
    """Filter by train alone: what valid and test know crowds the lists."""
    return replaced(rerank, "known_answers", lambda graph: known_answers(graph, ["train"]))


def the_end_is_not_counted() -> AbstractContextManager[None]:
    """Leave the end token out, so that a name that begins a longer one is as likely as all of them together."""
    right = likelihood.answer_positions

    def wrong(trie: Any, completions: Any) -> Any:
        nodes, tokens = right(trie, completions)
        counts = completions.num_answer_tokens
        nodes[np.cumsum(counts) - 1] = nodes[np.cumsum(counts) - counts]
        tokens[np.cumsum(counts) - 1] = tokens[np.cumsum(counts) - counts]
        return nodes, tokens

    return replaced(likelihood, "answer_positions", wrong)


def answers_are_read_without_their_questions() -> AbstractContextManager[None]:
    """Ask every question of the first entity."""
    right = rerank._read

    def wrong(encoder: Any, verbalizer: Any, questions: Any, *rest: Any, **more: Any) -> Any:
        return right(encoder, verbalizer, questions * [0, 1, 1], *rest, **more)

    return replaced(rerank, "_read", wrong)


def ties_are_cut_apart() -> AbstractContextManager[None]:
    """Take the first k whatever is level with the last of them."""
    right = rerank._lists_with_answers

    def wrong(lists: Any, targets: Any, query_of_target: Any) -> Any:
        listed, entities, cosines = right(lists, targets, query_of_target)
        others = lists.scores[query_of_target[listed]][:, :-1]
        return listed, entities, np.concatenate([cosines[:, :1], others], axis=1)

    return replaced(rerank, "_lists_with_answers", wrong)


BREAKS = {
    "known answers stay in the lists": known_answers_stay_in_the_lists,
    "the end token is not counted": the_end_is_not_counted,
    "answers are read without their questions": answers_are_read_without_their_questions,
    "ties are cut apart": ties_are_cut_apart,
}
CHECKS = dict.fromkeys(BREAKS, "test_reranked_ranks_equal_a_loop_over_separate_passes")
