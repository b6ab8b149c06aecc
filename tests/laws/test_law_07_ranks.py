"""Law 7: ranks equal a brute-force loop, filtered by every split; all equal gives (n + 1) / 2; NaN raises."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

from pykalm.errors import ModelError
from pykalm.evaluate import links, ranking
from pykalm.evaluate.links import evaluate_links
from pykalm.evaluate.ranking import RankTable, rank, rank_metrics
from pykalm.graph.graph import IntArray
from pykalm.graph.known import known_answers
from pykalm.model import index
from pykalm.model.index import distinct_rows
from tests.evaluate.fakes import (
    BORDERS,
    FRANCE,
    GEORGIA,
    MADRID,
    PARIS,
    SPAIN,
    STATE,
    TBILISI,
    FakeEncoder,
    FakeTexts,
    geography,
)
from tests.laws.common import replaced

Case = tuple[torch.Tensor, torch.Tensor, IntArray, IntArray, tuple[IntArray, IntArray]]


def random_case(seed: int, *, num_queries: int, num_entities: int) -> Case:
    """Draw whole-number vectors: their products are exact in float32, so that ties are many and certain."""
    generator = np.random.default_rng(seed)
    query = generator.integers(-2, 3, size=(num_queries, 3)).astype(np.float32)
    vectors = generator.integers(-2, 3, size=(num_entities, 3)).astype(np.float32)
    distinct, row_of_entity = distinct_rows(torch.from_numpy(vectors))
    targets = generator.integers(num_entities, size=num_queries)
    is_known = generator.random((num_queries, num_entities)) < 0.2
    is_known[np.arange(num_queries), targets] = np.arange(num_queries) % 2  # the target is known, or is not
    offsets = np.concatenate([[0], np.cumsum(is_known.sum(axis=1))])
    return torch.from_numpy(query), distinct, row_of_entity, targets, (offsets, np.nonzero(is_known)[1])


def brute_force(case: Case) -> list[tuple[int, float, int, int]]:
    """Rank by three nested loops over Python numbers."""
    query, distinct, row_of_entity, targets, (offsets, known) = case
    ranks = []
    for i, target in enumerate(targets):
        others = {e for e in known[offsets[i] : offsets[i + 1]].tolist() if e != target}
        score = {}
        for entity, row in enumerate(row_of_entity):
            score[entity] = sum(a * b for a, b in zip(query[i].tolist(), distinct[row].tolist(), strict=True))
        left = [entity for entity in score if entity not in others]
        better = sum(score[entity] > score[target] for entity in left)
        better_or_equal = sum(score[entity] >= score[target] for entity in left)
        ranks.append((1 + better, (1 + better + better_or_equal) / 2, better_or_equal, len(left)))
    return ranks


def run(case: Case, **settings: int) -> RankTable:
    query, distinct, row_of_entity, targets, known = case
    return rank(query, distinct, row_of_entity=row_of_entity, targets=targets, known=known, **settings)


def columns(table: RankTable) -> list[tuple[int, float, int, int]]:
    values = (table.optimistic, table.realistic, table.pessimistic, table.num_candidates)
    return list(zip(*(value.tolist() for value in values), strict=True))


def without_filter(query: torch.Tensor, vectors: torch.Tensor, targets: list[int]) -> RankTable:
    """Rank among the distinct rows of vectors, with nothing known."""
    distinct, row_of_entity = distinct_rows(vectors)
    nothing = (np.zeros(len(targets) + 1, dtype=np.int64), np.empty(0, dtype=np.int64))
    return rank(query, distinct, row_of_entity=row_of_entity, targets=np.array(targets), known=nothing)


def test_ranks_equal_a_brute_force_loop() -> None:
    for seed in range(20):
        case = random_case(seed, num_queries=7, num_entities=2 + 3 * seed)
        assert columns(run(case)) == brute_force(case), f"seed {seed}"


def test_ranks_do_not_depend_on_the_chunk() -> None:
    case = random_case(1, num_queries=23, num_entities=50)
    for chunk_queries in (1, 2, 5, 22, 23, 1000):
        assert columns(run(case, chunk_queries=chunk_queries)) == brute_force(case)


def test_known_answers_are_removed_not_lowered() -> None:
    # Entity 0, known, scores 0.9; the answer, entity 1, scores −0.2; entity 2 scores −0.5.
    # Lowered by 1, the known one would still be above the answer: 0.9 − 1 = −0.1. METHOD.md §7.3.
    vectors = torch.tensor([[0.9, 0.0], [-0.2, 0.0], [-0.5, 0.0]])
    table = rank(
        torch.tensor([[1.0, 0.0]]),
        vectors,
        row_of_entity=np.arange(3),
        targets=np.array([1]),
        known=(np.array([0, 2]), np.array([0, 1])),
    )
    assert columns(table) == [(1, 1.0, 1, 2)]


def test_answers_that_any_split_knows_are_removed() -> None:
    """(France, borders, ?), asked for Georgia: Spain is in train, Madrid in valid, Paris in test; of seven, four are left.

    (?, borders, Georgia), asked for France: Tbilisi is in valid, the state in test; five are left.
    """
    graph = geography(
        train=[(FRANCE, BORDERS, SPAIN)],
        valid=[(FRANCE, BORDERS, MADRID), (TBILISI, BORDERS, GEORGIA)],
        test=[(FRANCE, BORDERS, GEORGIA), (FRANCE, BORDERS, PARIS), (STATE, BORDERS, GEORGIA)],
    )
    report, _ = evaluate_links(graph, FakeEncoder(), FakeTexts())
    assert report.tail.num_candidates.tolist() == [4, 4, 7]
    assert report.head.num_candidates.tolist() == [5, 7, 5]


def test_optimistic_realistic_and_pessimistic_are_in_order() -> None:
    tables = [run(random_case(seed, num_queries=50, num_entities=40)) for seed in range(10)]
    for table in tables:
        in_order = [np.ones(50), table.optimistic, table.realistic, table.pessimistic, table.num_candidates]
        assert (np.diff(in_order, axis=0) >= 0).all()
    assert any((table.optimistic < table.pessimistic).any() for table in tables)


def test_all_equal_scores_give_half_of_n_plus_one() -> None:
    for num_entities in (1, 2, 7, 500):
        query, vector = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1, 16) / 4
        table = without_filter(query, vector.repeat(num_entities, 1), [0, 0, num_entities - 1])
        assert table.realistic.tolist() == [(num_entities + 1) / 2] * 3


def test_equal_texts_tie_to_the_last_bit() -> None:
    # 1001 entities in 13 groups of equal vectors. In a matrix product, equal columns may round differently.
    generator = torch.Generator().manual_seed(0)
    groups = torch.nn.functional.normalize(torch.randn(13, 333, generator=generator), dim=1)
    group_of_entity = torch.arange(1001) % 13
    query = torch.nn.functional.normalize(torch.randn(9, 333, generator=generator), dim=1)
    table = without_filter(query, groups[group_of_entity], list(range(9)))
    assert (table.pessimistic - table.optimistic + 1).tolist() == [77] * 9


def refusal(query: torch.Tensor, vectors: torch.Tensor) -> str:
    """Return why the ranks of entity 0 are refused, or what they are."""
    try:
        return f"ranked: {columns(without_filter(query, vectors, [0, 0]))}"
    except ModelError as error:
        return str(error)


def test_a_score_that_is_no_number_raises() -> None:
    query, vectors = torch.ones(2, 3), torch.eye(3)
    for bad in (float("nan"), float("inf")):
        for place in ("query", "target", "other entity"):
            broken_query, broken_vectors = query.clone(), vectors.clone()
            if place == "query":
                broken_query[1, 0] = bad
            else:
                broken_vectors[0 if place == "target" else 2, 0] = bad
            assert "NaN or infinity" in refusal(broken_query, broken_vectors), f"{bad} in the {place}"


def test_metrics_equal_sums_by_hand() -> None:
    # Among 11, 11, 21 and 21 candidates chance ranks (6 + 6 + 11 + 11) / 4 = 8.5; the mean here is 6.125.
    realistic = np.array([1.0, 2.5, 10.0, 11.0])
    whole = realistic.astype(np.int64)
    metrics = rank_metrics(RankTable(whole, realistic, whole, np.array([11, 11, 21, 21])))
    assert metrics.mr == 6.125
    assert metrics.mrr == pytest.approx((1 + 0.4 + 0.1 + 1 / 11) / 4, rel=1e-12)
    assert (metrics.hits_at_1, metrics.hits_at_3, metrics.hits_at_10) == (0.25, 0.5, 0.75)
    assert metrics.adjusted_mean_rank_index == pytest.approx(1 - 5.125 / 7.5, rel=1e-12)


@contextmanager
def ties_in_our_favour() -> Iterator[None]:
    """Report the optimistic rank: a model that gives all entities one vector then ranks first everywhere."""

    def wrong(better: IntArray, equal: IntArray, num_candidates: IntArray) -> RankTable:
        return RankTable(1 + better, (1 + better).astype(np.float64), better + equal, num_candidates)

    with mock.patch.object(ranking, "_rank_table", wrong):
        yield


@contextmanager
def known_answers_lowered_by_one() -> Iterator[None]:
    """Filter as the published code does. METHOD.md §7.3."""

    def wrong(scores: np.ndarray, queries: IntArray, entities: IntArray) -> None:
        scores[queries, entities] -= 1

    with mock.patch.object(ranking, "_remove", wrong):
        yield


@contextmanager
def nan_is_ranked() -> Iterator[None]:
    """Let NaN through: every comparison with it is false, so that the target seems to be first."""
    with mock.patch.object(index, "_require_finite", return_value=None):
        yield


def only_train_is_removed() -> AbstractContextManager[None]:
    """Filter by what training knows: answers that valid or test know then count as wrong."""
    return replaced(links, "known_answers", lambda graph: known_answers(graph, ["train"]))


def only_train_and_valid_are_removed() -> AbstractContextManager[None]:
    """Filter by what was known before the test."""
    return replaced(links, "known_answers", lambda graph: known_answers(graph, ["train", "valid"]))


BREAKS = {
    "ranks report ties in our favour": ties_in_our_favour,
    "known answers lowered by 1, not removed": known_answers_lowered_by_one,
    "NaN gets a rank": nan_is_ranked,
    "only what train knows is removed": only_train_is_removed,
    "what test knows is not removed": only_train_and_valid_are_removed,
}
CHECKS = {
    "ranks report ties in our favour": "test_all_equal_scores_give_half_of_n_plus_one",
    "known answers lowered by 1, not removed": "test_known_answers_are_removed_not_lowered",
    "NaN gets a rank": "test_a_score_that_is_no_number_raises",
    "only what train knows is removed": "test_answers_that_any_split_knows_are_removed",
    "what test knows is not removed": "test_answers_that_any_split_knows_are_removed",
}
