"""Law 6: a masked pair changes neither loss nor gradient; known training answers and own heads are masked, no others."""

import dataclasses
import math
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pykalm import api
from pykalm.config import Config
from pykalm.graph.known import KnownAnswers, known_answers
from pykalm.learn import batches, losses
from pykalm.learn.losses import dual_view_loss
from pykalm.model.run import Run
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import build_batch, gradients, replaced, tiny_encoder, tiny_graph, tiny_verbalizer

# ada knows bo, cy; dan knows bo; bo likes cy; cy likes bo; ada b likes eve (the training triples of tiny_graph).
KNOWN_BY_HAND = {
    "[ ada: a poet, knows ]": {"[ bo: a baker of bread ]", "[ cy: a poet ]"},
    "[ dan, knows ]": {"[ bo: a baker of bread ]"},
    "[ bo: a baker of bread, is known by ]": {"[ ada: a poet ]", "[ dan ]"},
    "[ cy: a poet, is known by ]": {"[ ada: a poet ]"},
    "[ bo: a baker of bread, likes ]": {"[ cy: a poet ]"},
    "[ cy: a poet, likes ]": {"[ bo: a baker of bread ]"},
    "[ ada b, likes ]": {"[ eve: a sailor ]"},
    "[ cy: a poet, is liked by ]": {"[ bo: a baker of bread ]"},
    "[ bo: a baker of bread, is liked by ]": {"[ cy: a poet ]"},
    "[ eve: a sailor, is liked by ]": {"[ ada b ]"},
}


def own_head(query: str) -> str:
    """Return the candidate text of a query's own head."""
    return query.rsplit(", ", 1)[0] + " ]"


def loss_of(query: Tensor, candidates: Tensor, known: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, c = query.clone().requires_grad_(), candidates.clone().requires_grad_()
    loss = dual_view_loss(q, c, log_scale=torch.tensor(math.log(4.0)), margin=0.1, positives=positives, masked=known)
    return loss.detach(), *torch.autograd.grad(loss, (q, c))


def test_known_answers_of_a_batch_are_masked_and_own_heads() -> None:
    """Every pair of the batch's mask, by its texts, against the list above, also when only part of train is drawn."""
    verbalizer = tiny_verbalizer(tiny_graph())
    for triples, own in product((None, [(0, 0, 2), (3, 1, 2)]), (True, False)):
        batch = build_batch(tiny_encoder(), verbalizer, triples, masks_own_heads=own)
        queries, candidates = spelled(batch, verbalizer)
        assert len(queries) == len(set(queries))
        assert len(candidates) == len(set(candidates))
        for i, query in enumerate(queries):
            for j, candidate in enumerate(candidates):
                wanted = candidate in KNOWN_BY_HAND[query] or (own and candidate == own_head(query))
                assert bool(batch.masked[i, j]) == wanted, (query, candidate)
        assert all(batch.masked[i, j] for i, j in batch.positives)


def test_the_own_head_of_a_query_is_told_but_where_it_is_an_answer() -> None:
    """Bo also likes bo, and cy has the text of ada, whom ada knows: neither is a negative of such a query in any part."""
    rows = ((0, 0, 2), (2, 1, 2), (3, 0, 4), (0, 0, 3), (1, 1, 4), (1, 1, 5))  # the last two are valid and test
    same = dataclasses.replace(tiny_graph(rows), entity_names=("ada", "ada b", "bo", "ada", "dan", "eve"))
    verbalizer = tiny_verbalizer(same)
    batch = build_batch(tiny_encoder(), verbalizer)
    queries, candidates = spelled(batch, verbalizer)
    found = {query: None if own < 0 else candidates[own] for query, own in zip(queries, batch.own_heads, strict=True)}
    ada, bo = "[ ada: a poet ]", "[ bo: a baker of bread ]"
    assert found == {
        "[ ada: a poet, knows ]": None,
        "[ ada: a poet, is known by ]": None,
        "[ bo: a baker of bread, likes ]": None,
        "[ bo: a baker of bread, is liked by ]": None,
        "[ bo: a baker of bread, is known by ]": bo,
        "[ dan, is known by ]": "[ dan ]",
    }
    assert ada in candidates


def spelled(batch: batches.Batch, verbalizer: Verbalizer) -> tuple[list[str], list[str]]:
    """Return the texts of a batch's queries and candidates."""
    decode, paths = verbalizer.tokenizer.decode, batch.trie.paths
    texts = {int(path[path >= 0][-1]): decode(batch.trie.token_ids[path[path >= 0]]) for path in paths}
    queries, candidates = ([texts[int(n)] for n in nodes] for nodes in (batch.query_nodes, batch.candidate_nodes))
    return queries, candidates


def test_what_only_valid_or_test_knows_is_a_negative_of_training() -> None:
    """Ada knows bo; that she knows dan too is for valid to ask, eve for test, and both are candidates of the batch."""
    rows = ((0, 0, 2), (2, 0, 4), (2, 0, 5), (0, 0, 4), (0, 0, 5))
    graph, encoder = tiny_graph(rows), tiny_encoder()
    run = Run(Path("nowhere"), Config(graph="people"), graph, encoder, tiny_verbalizer(graph))
    batch = api.batch_builder(run).build(graph.triples("train"), np.random.default_rng(0))
    queries, candidates = spelled(batch, run.verbalizer)
    ada, dan, eve, bo = "ada: a poet", "dan", "eve: a sailor", "bo: a baker of bread"
    masked = {(queries[i], candidates[j]) for i, j in np.argwhere(batch.masked)}
    for split, (tail, tail_mark) in {"valid": (dan, f"[ {dan} ]"), "test": (eve, f"[ {eve} ]")}.items():
        pairs = {(f"[ {ada}, knows ]", tail_mark), (f"[ {tail}, is known by ]", f"[ {ada} ]")}
        assert all(query in queries and candidate in candidates for query, candidate in pairs), split
        assert not pairs & masked, split
    assert masked - {(query, own_head(query)) for query in queries} == {
        (f"[ {ada}, knows ]", f"[ {bo} ]"), (f"[ {bo}, knows ]", f"[ {dan} ]"), (f"[ {bo}, knows ]", f"[ {eve} ]"),
        (f"[ {bo}, is known by ]", f"[ {ada} ]"), (f"[ {dan}, is known by ]", f"[ {bo} ]"),
        (f"[ {eve}, is known by ]", f"[ {bo} ]"),
    }  # fmt: skip


def test_moving_a_masked_pair_changes_neither_loss_nor_gradient() -> None:
    """Query 0 has answers 0 and 1 (1 is not of the batch), candidate 2 is only a distractor of known query 1."""
    query, candidates = torch.eye(4)[:2], torch.eye(4)[:3] * 0.5
    known = torch.tensor([[True, True, False], [False, True, True]])
    positives = torch.tensor([[0, 0], [1, 1]])
    loss, query_gradient, candidate_gradient = loss_of(query, candidates, known, positives)
    moved = candidates.clone()
    moved[2, 1] = 0.9  # the score of the masked pair (1, 2) alone
    moved_loss, moved_query_gradient, moved_candidate_gradient = loss_of(query, moved, known, positives)
    assert torch.equal(moved_loss, loss)
    assert torch.equal(moved_query_gradient[1, :1], query_gradient[1, :1])
    assert torch.equal(moved_candidate_gradient, candidate_gradient)
    assert candidate_gradient[2, 1] == 0  # no pull from query 1


def test_loss_equals_a_sum_worked_out_by_hand() -> None:
    """Scale 4, margin 0.1, cosines (0.5, 0.25; 0, 0.75); each query has one answer, on the diagonal."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[0.5, 0.0], [0.25, 0.75]])
    loss, *_ = loss_of(query, candidates, torch.eye(2, dtype=torch.bool), torch.tensor([[0, 0], [1, 1]]))
    e = math.exp
    rows = [-math.log(e(1.6) / (e(1.6) + e(1.0))), -math.log(e(2.6) / (e(2.6) + e(0)))]
    columns = [-math.log(e(1.6) / (e(1.6) + e(0))), -math.log(e(2.6) / (e(2.6) + e(1.0)))]
    assert abs(float(loss) - (sum(rows) / 2 + sum(columns) / 2) / 2) < 1e-6


def test_an_own_head_weighs_no_more_than_the_hardest_other_negative() -> None:
    """Scale 4, margin 0.1: query 0 (cosines 0.5, 0.25, 0.2 and its own head's) has own head 3, query 1 has none."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    known = torch.tensor([[True, False, False, True], [False, True, False, False]])
    asked = {"log_scale": torch.tensor(math.log(4.0)), "margin": 0.1, "masked": known}
    positives, own = torch.tensor([[0, 0], [1, 1]]), torch.tensor([3, -1])
    for cosine, counted in ((0.1, 0.1), (0.9, 0.25)):
        candidates = torch.tensor([[0.5, 0.0], [0.25, 0.75], [0.2, 0.1], [cosine, 0.3]], requires_grad=True)
        e = math.exp
        others = [e(1.0) + e(0.8), e(0) + e(0.4) + e(1.2)]
        rows = [math.log1p((others[0] + e(4 * counted)) / e(1.6)), math.log1p(others[1] / e(2.6))]
        columns = [math.log1p(e(0) / e(1.6)), math.log1p(e(1.0) / e(2.6))]  # no answer is an own head
        for views, expected in (("candidate", columns), ("both", rows + columns), ("query", rows)):
            loss = dual_view_loss(query, candidates, positives=positives, own_heads=own, views=views, **asked)  # type: ignore[arg-type]
            assert abs(float(loss.detach()) - sum(expected) / len(expected)) < 1e-6
        (gradient,) = torch.autograd.grad(loss, candidates)
        share = e(4 * counted) / (others[0] + e(4 * counted) + e(1.6))
        assert abs(float(gradient[3, 0]) - 4 * share / 2) < 1e-6, (
            "it is pushed away by the share that it is counted with"
        )


def test_own_heads_are_bounded_in_the_candidate_view_too() -> None:
    """Candidate 0 is the answer of query 0 and the own head of queries 1 and 2; query 3 is its only other negative."""
    query = torch.tensor([[1.0, 0.0], [0.8, 0.0], [0.1, 0.5], [0.3, 0.5]])
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    known = torch.tensor([[True, False], [True, True], [True, True], [False, True]])
    positives, own = torch.tensor([[0, 0]]), torch.tensor([-1, 0, 0, -1])
    loss = dual_view_loss(
        query, candidates, log_scale=torch.tensor(math.log(4.0)), margin=0.1, masked=known, positives=positives,
        own_heads=own, views="candidate",
    )  # fmt: skip
    e = math.exp
    assert abs(float(loss) - math.log1p((e(1.2) + e(1.2) + e(0.4)) / e(3.6))) < 1e-6


def test_the_temperature_learns_from_what_own_heads_are_counted_as() -> None:
    """Queries near their own heads: the gradient of log(1/τ) is the slope of the loss, in float64's differences."""
    vectors = torch.nn.functional.normalize(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    own, positives = torch.tensor([0, 1, 2, 3, -1, 4]), torch.tensor([[0, 5], [1, 4], [5, 5]])
    query = torch.nn.functional.normalize(vectors[0] + 2 * vectors[1][own], dim=-1)
    known = torch.zeros(6, 6, dtype=torch.bool)
    known[positives[:, 0], positives[:, 1]] = known[[0, 1, 2, 3, 5], [0, 1, 2, 3, 4]] = True

    def loss(log_scale: Tensor, heads: Tensor | None) -> Tensor:
        return dual_view_loss(
            query, vectors[1], log_scale=log_scale, margin=0.1, positives=positives, masked=known, own_heads=heads
        )

    at = torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(at, own), at)
    step = 1 / 64
    differences = (float(loss(at.detach() + step, own)) - float(loss(at.detach() - step, own))) / (2 * step)
    assert abs(float(slope) - differences) < 2e-3


def test_an_own_head_that_is_the_only_negative_is_none() -> None:
    """There is nothing that its weight could be measured by, in its row or in its column."""
    query, candidates = torch.eye(2).requires_grad_(), (torch.eye(2) * 0.5).requires_grad_()
    loss = dual_view_loss(
        query, candidates, log_scale=torch.tensor(3.0), margin=0.1, masked=torch.ones(2, 2, dtype=torch.bool),
        positives=torch.tensor([[0, 0], [1, 1]]), own_heads=torch.tensor([1, 0]),
    )  # fmt: skip
    assert float(loss.detach()) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in torch.autograd.grad(loss, (query, candidates)))


@pytest.mark.parametrize("self_negatives", ["capped", "among", "none"])
def test_trainings_mask_own_heads_as_the_settings_say(self_negatives: str) -> None:
    """As one among all they are not masked; otherwise they are, and are told, of which `none` makes no use."""
    graph, encoder = tiny_graph(), tiny_encoder()
    config = Config.model_validate({"graph": "people", "objective": {"self_negatives": self_negatives}})
    run = Run(Path("nowhere"), config, graph, encoder, tiny_verbalizer(graph))
    batch = api.batch_builder(run).build(graph.triples("train"), np.random.default_rng(0))
    of = np.flatnonzero(batch.own_heads >= 0)
    assert len(of) > 2
    assert batch.masked[of, batch.own_heads[of]].tolist() == [self_negatives != "among"] * len(of)


def test_a_row_without_negatives_has_no_loss_and_a_finite_gradient() -> None:
    loss, *grads = loss_of(torch.eye(2), torch.eye(2), torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0, 0]]))
    assert float(loss) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in grads)


def test_entities_with_the_same_text_are_one_candidate() -> None:
    """Two poets named cy cannot be told apart, so neither is a negative of the other's triples."""
    graph = dataclasses.replace(tiny_graph(), entity_names=("ada", "ada b", "bo", "cy", "dan", "cy"),
                                entity_descriptions=("a poet", "", "a baker of bread", "a poet", "", "a poet"))  # fmt: skip
    encoder = tiny_encoder()
    batch = build_batch(encoder, tiny_verbalizer(graph))
    assert len(batch.candidate_nodes) == 5
    assert gradients(encoder, batch)[0].explicit > 0


def mask_never_fires() -> AbstractContextManager[None]:
    """Look known answers up and find none, as the published code does; the batch's own positives are known. METHOD.md §7.1."""

    none = np.zeros(0, dtype=np.int64)
    return replaced(KnownAnswers, "pairs", lambda self, heads, relations, candidates: (none, none))


def own_heads_are_negatives() -> AbstractContextManager[None]:
    """Let a query's own head be a negative like others, which it is not in the paper."""
    right = batches._distinct_texts

    def wrong(*arguments: Any, masks_own: bool) -> Any:
        return right(*arguments, masks_own=False)

    return replaced(batches, "_distinct_texts", wrong)


def answers_are_told_as_own_heads() -> AbstractContextManager[None]:
    """Tell a query's own head also where it is an answer of it: pushed away as such, and drawn near as an answer."""
    right = batches._distinct_texts

    def wrong(queries: Any, candidates: Any, positives: Any, known: Any, own: Any, **options: Any) -> Any:
        return right(queries, candidates, positives, known[:0], own, **options)

    return replaced(batches, "_distinct_texts", wrong)


def own_heads_weigh_in_full() -> AbstractContextManager[None]:
    """Leave the weight of own heads unbounded, so that near ones take all of the gradient."""

    def wrong(scores: Tensor, more: Tensor, place: Tensor, scale: Tensor, *, dim: int) -> Tensor:
        found = scores.logsumexp(dim)
        return found.exp().index_add(0, place, more.exp()).log() if len(more) else found

    return replaced(losses, "_log_sum_exp", wrong)


def only_the_batch_is_masked() -> AbstractContextManager[None]:
    """Mask the positives of the batch, but no other known triple."""
    right = batches._distinct_texts

    def wrong(queries: Any, candidates: Any, positives: Any, known: Any, own: Any, **options: Any) -> Any:
        return right(queries, candidates, positives, positives, own, **options)

    return replaced(batches, "_distinct_texts", wrong)


def masked_scores_are_lowered_by_one() -> AbstractContextManager[None]:
    """Subtract instead of remove."""
    return replaced(Tensor, "masked_fill", lambda self, mask, value: self - mask.to(self.dtype))


def valid_and_test_are_masked() -> AbstractContextManager[None]:
    """Let the mask know all splits: what is missing among the negatives then tells the answers of valid and test."""
    return replaced(api, "known_answers", lambda graph, splits: known_answers(graph))


BREAKS = {
    "the mask never fires": mask_never_fires,
    "only the batch's own triples are masked": only_the_batch_is_masked,
    "a query's own head is a negative": own_heads_are_negatives,
    "an answer is told as the own head": answers_are_told_as_own_heads,
    "own heads weigh in full": own_heads_weigh_in_full,
    "masked scores are lowered, not removed": masked_scores_are_lowered_by_one,
    "the mask knows valid and test": valid_and_test_are_masked,
}
CHECKS = {
    "the mask never fires": "test_known_answers_of_a_batch_are_masked_and_own_heads",
    "only the batch's own triples are masked": "test_known_answers_of_a_batch_are_masked_and_own_heads",
    "a query's own head is a negative": "test_known_answers_of_a_batch_are_masked_and_own_heads",
    "an answer is told as the own head": "test_the_own_head_of_a_query_is_told_but_where_it_is_an_answer",
    "own heads weigh in full": "test_an_own_head_weighs_no_more_than_the_hardest_other_negative",
    "masked scores are lowered, not removed": "test_moving_a_masked_pair_changes_neither_loss_nor_gradient",
    "the mask knows valid and test": "test_what_only_valid_or_test_knows_is_a_negative_of_training",
}
