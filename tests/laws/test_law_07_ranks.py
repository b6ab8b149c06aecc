"""Law 7: ranks equal a brute-force loop, filtered by every split; all equal gives (n + 1) / 2; NaN raises."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from pykalm.errors import ModelError
from pykalm.evaluate import counts, links, ranking
from pykalm.evaluate.counts import Candidates
from pykalm.evaluate.links import evaluate_links
from pykalm.evaluate.ranking import RankTable, rank, rank_metrics
from pykalm.graph.graph import IntArray
from pykalm.graph.known import known_answers
from pykalm.model import products
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


def random_case(seed: int, *, num_queries: int, num_entities: int, width: int = 3) -> Case:
    """Draw whole-number vectors: their products are exact in float32, so that ties are many and certain.

    With width 1 there are five vectors, which many entities share; with width 3, vectors that differ score the same.
    """
    generator = np.random.default_rng(seed)
    query = generator.integers(-2, 3, size=(num_queries, width)).astype(np.float32)
    vectors = generator.integers(-2, 3, size=(num_entities, width)).astype(np.float32)
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


def run(case: Case, **settings: Any) -> RankTable:
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


@pytest.mark.parametrize("chunk_entities", [1, 2, 3, 7, 49, 50, 1000])
def test_ranks_do_not_depend_on_the_blocks_of_entities(chunk_entities: int) -> None:
    for width in (1, 3):
        case = random_case(2, num_queries=23, num_entities=50, width=width)
        expected = brute_force(case)
        for chunk_queries in (1, 6, 1000):
            found = run(case, chunk_entities=chunk_entities, chunk_queries=chunk_queries)
            assert columns(found) == expected


def test_ranks_equal_in_blocks_of_seven() -> None:
    case = random_case(6, num_queries=40, num_entities=45)
    assert columns(run(case, chunk_entities=7)) == brute_force(case)


def test_every_entity_of_a_shared_vector_counts_and_is_removed_by_itself() -> None:
    # Of 60 entities with five vectors, a fifth are known answers; many of these share the vector of the target.
    for seed in range(5):
        case = random_case(seed, num_queries=30, num_entities=60, width=1)
        assert len(case[1]) == 5
        assert columns(run(case)) == brute_force(case)


def test_a_known_answer_that_shares_the_targets_vector_is_removed() -> None:
    # Entities 0, 1 and 2 share a vector, 3 is above, 4 below. The target is 1; known are 1 itself, 2 and 3.
    # Left are 0, 1 and 4: nothing is above, two are level.
    table = rank(
        torch.tensor([[1.0]]),
        torch.tensor([[0.5], [0.7], [0.1]]),
        row_of_entity=np.array([0, 0, 0, 1, 2]),
        targets=np.array([1]),
        known=(np.array([0, 3]), np.array([1, 2, 3])),
    )
    assert columns(table) == [(1, 1.5, 2, 3)]


def test_targets_of_one_query_are_ranked_as_if_each_asked_by_itself() -> None:
    query, distinct, row_of_entity, _, known = random_case(3, num_queries=9, num_entities=40)
    generator = np.random.default_rng(4)
    query_of_target, targets = generator.integers(9, size=300), generator.integers(40, size=300)
    query_of_target[30:] = 5  # more targets of one query than are counted at once
    answers = [known[1][known[0][q] : known[0][q + 1]] for q in query_of_target]
    offsets = np.concatenate([[0], np.cumsum([len(entities) for entities in answers])])
    apart = (query[query_of_target], distinct, row_of_entity, targets, (offsets, np.concatenate(answers)))
    together = (query, distinct, row_of_entity, targets, known)
    expected = brute_force(apart)
    for chunk_queries in (1, 4, 100):
        found = run(together, query_of_target=query_of_target, chunk_queries=chunk_queries)
        assert columns(found) == expected


def test_a_query_that_no_target_asks_is_left_out() -> None:
    query, distinct, row_of_entity, targets, known = random_case(8, num_queries=6, num_entities=20)
    found = rank(
        query, distinct, row_of_entity=row_of_entity, targets=targets[4:], known=known,
        query_of_target=np.array([4, 5]), chunk_queries=1,
    )  # fmt: skip
    assert columns(found) == brute_force((query, distinct, row_of_entity, targets, known))[4:]


def test_as_many_targets_as_queries_are_not_one_of_each() -> None:
    """Query 0 is asked for two targets and query 1 for none, in one chunk; so are 5 and 4."""
    query, distinct, row_of_entity, targets, (offsets, known) = random_case(9, num_queries=6, num_entities=30)
    query_of_target = np.array([0, 0, 2, 3, 5, 5])
    answers = [known[offsets[q] : offsets[q + 1]] for q in query_of_target]
    apart = np.concatenate([[0], np.cumsum([len(entities) for entities in answers])]), np.concatenate(answers)
    found = run((query, distinct, row_of_entity, targets, (offsets, known)), query_of_target=query_of_target)
    assert columns(found) == brute_force((query[query_of_target], distinct, row_of_entity, targets, apart))


def test_narrow_vectors_are_ranked_by_their_float32_scores() -> None:
    # Whole numbers are the same in float16; the queries stay float32.
    query, distinct, *rest = random_case(5, num_queries=20, num_entities=50)
    assert columns(run((query, distinct.half(), *rest))) == brute_force((query, distinct, *rest))
    # 1 + 2^-10 is a float16, its square is not: rounded to float16, the second entity would be level with the first.
    table = without_filter(torch.tensor([[1 + 2**-10]]), torch.tensor([[1 + 2**-10], [1.0]]).half(), [1])
    assert columns(table) == [(2, 2.0, 2, 2)]


def level_with_its_target(width: int) -> list[int]:
    """Return for 40 queries how many of 1000 vectors are level: 500 of them differ only where the queries are 0."""
    generator = torch.Generator().manual_seed(0)
    query, vectors = torch.randn(40, width, generator=generator), torch.randn(1000, width, generator=generator)
    query[:, width // 3 :] = 0
    vectors[::2, : width // 3] = vectors[0, : width // 3]
    nothing = (np.zeros(41, dtype=np.int64), np.empty(0, dtype=np.int64))
    everyone = np.arange(1000)  # in blocks of 40 among others
    table = rank(query, vectors, row_of_entity=everyone, targets=everyone[:80:2], known=nothing, chunk_entities=40)
    return (table.pessimistic - table.optimistic + 1).tolist()


def test_vectors_that_score_the_same_are_level() -> None:
    assert level_with_its_target(576) == [500] * 40


@pytest.mark.skipif(not products.has_onednn(), reason="no products of oneDNN on this processor")
@pytest.mark.parametrize("threads", [1, 4, 16])
def test_vectors_that_score_the_same_are_level_for_any_number_of_threads(threads: int) -> None:
    """MKL's product shared by four threads or more takes another order where its rows are few."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert [level_with_its_target(width) for width in (16, 100, 576)] == [[500] * 40] * 3
    finally:
        torch.set_num_threads(before)


def test_entities_beyond_float32s_whole_numbers_are_counted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2²⁴ entities on they are added up in float64."""
    cut, case = Candidates.cut, random_case(11, num_queries=23, num_entities=50)

    def in_float64(*given: Any, **settings: Any) -> Candidates:
        found = cut(*given, **settings)
        return replace(found, entities_of_row=found.entities_of_row.double())

    monkeypatch.setattr(Candidates, "cut", in_float64)
    assert columns(run(case, chunk_entities=7)) == brute_force(case)


def test_ranks_do_not_depend_on_autocast() -> None:
    """Counts beyond 256 are no numbers of bfloat16."""
    case = random_case(10, num_queries=20, num_entities=1500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert columns(run(case)) == columns(run(case, chunk_entities=100)) == brute_force(case)


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
    right = counts._compare

    def wrong(scores: np.ndarray, at_target: np.ndarray, shares_vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        still_above, still_level = scores - 1 > at_target, scores - 1 == at_target
        is_above, is_level = right(scores, at_target, shares_vector)
        return is_above & ~still_above, is_level & ~still_level

    with mock.patch.object(counts, "_compare", wrong):
        yield


@contextmanager
def nan_is_ranked() -> Iterator[None]:
    """Let NaN through: every comparison with it is false, so that the target seems to be first."""
    with mock.patch.object(counts, "require_finite", return_value=None):
        yield


@contextmanager
def a_shared_vector_counts_once() -> Iterator[None]:
    """Count distinct texts, not entities."""
    right = Candidates.cut

    def wrong(vectors: torch.Tensor, row_of_entity: IntArray, **settings: Any) -> Candidates:
        candidates = right(vectors, row_of_entity, **settings)
        candidates.entities_of_row.fill_(1)
        return candidates

    with mock.patch.object(Candidates, "cut", wrong):
        yield


@contextmanager
def the_last_block_is_left_out() -> Iterator[None]:
    """Count whole blocks of entities only."""
    right = Candidates.cut

    def wrong(vectors: torch.Tensor, row_of_entity: IntArray, **settings: Any) -> Candidates:
        candidates = right(vectors, row_of_entity, **settings)
        candidates.entities_of_row[candidates.blocks[-1]] = 0
        return candidates

    with mock.patch.object(Candidates, "cut", wrong):
        yield


def a_shared_vector_is_removed_as_one() -> AbstractContextManager[None]:
    """Leave known answers in that share the target's vector, as if they were the target."""
    return replaced(counts, "_compare", lambda scores, at, shares: (~shares & (scores > at), ~shares & (scores == at)))


def the_targets_score_adds_up_in_another_order() -> AbstractContextManager[None]:
    """Multiply each query with its target row by row: cheaper, and one rounding away from the block's product."""

    def wrong(query: torch.Tensor, of_target: IntArray, rows: IntArray, candidates: Candidates) -> torch.Tensor:
        return (query[torch.from_numpy(of_target)].double() * candidates.choose(rows)).sum(dim=1).float()

    return replaced(counts, "_paired_scores", wrong)


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
    "a shared vector counts once": a_shared_vector_counts_once,
    "the last block of entities is left out": the_last_block_is_left_out,
    "known answers with the target's vector stay": a_shared_vector_is_removed_as_one,
    "the target's score adds up in another order": the_targets_score_adds_up_in_another_order,
    "only what train knows is removed": only_train_is_removed,
    "what test knows is not removed": only_train_and_valid_are_removed,
}
CHECKS = {
    "ranks report ties in our favour": "test_all_equal_scores_give_half_of_n_plus_one",
    "known answers lowered by 1, not removed": "test_known_answers_are_removed_not_lowered",
    "NaN gets a rank": "test_a_score_that_is_no_number_raises",
    "a shared vector counts once": "test_every_entity_of_a_shared_vector_counts_and_is_removed_by_itself",
    "the last block of entities is left out": "test_ranks_equal_in_blocks_of_seven",
    "known answers with the target's vector stay": "test_a_known_answer_that_shares_the_targets_vector_is_removed",
    "the target's score adds up in another order": "test_vectors_that_score_the_same_are_level",
    "only what train knows is removed": "test_answers_that_any_split_knows_are_removed",
    "what test knows is not removed": "test_answers_that_any_split_knows_are_removed",
}
