"""Intervals against chances worked out by hand, and how often they hold the truth on made-up data."""

import math

import numpy as np
import pytest

from pykalm.evaluate import bootstrap
from pykalm.evaluate.bootstrap import (
    METRICS,
    Interval,
    difference_intervals,
    intervals,
    metric_intervals,
    resampled_means,
    triple_scores,
)
from pykalm.evaluate.ranking import RankTable, join_rank_tables, rank_metrics


def ranks(*numbers: float) -> RankTable:
    """Return ranks among a hundred candidates."""
    array = np.array(numbers, dtype=np.float64)
    return RankTable(array.astype(np.int64), array, array.astype(np.int64), np.full(len(array), 100))


def binomial_quantile(count: int, chance: float, share: float) -> int:
    """Return the least number of successes that at least a share of the draws does not exceed."""
    total = 0.0
    for successes in range(count + 1):
        total += math.comb(count, successes) * chance**successes * (1 - chance) ** (count - successes)
        if total >= share:
            return successes
    return count


def test_scores_of_a_triple_are_the_mean_of_its_two_questions() -> None:
    """Ranks 1 and 4: (1 + 1/4) / 2, hit at 1 and 3 by one of two, at 10 by both. A tie at 1 is rank 1.5: no hit at 1."""
    scores = triple_scores(ranks(1, 1.5), ranks(4, 20))
    assert scores.tolist() == [[0.625, 0.5, 0.5, 1.0], [(1 / 1.5 + 1 / 20) / 2, 0.0, 0.5, 0.5]]


def test_means_over_triples_are_the_metrics() -> None:
    generator = np.random.default_rng(0)
    tail, head = (ranks(*generator.integers(1, 100, size=50)) for _ in range(2))
    metrics = rank_metrics(join_rank_tables([head, tail])).to_dict()
    found = metric_intervals(triple_scores(tail, head))
    assert list(found) == list(METRICS)
    assert {name: interval.mean for name, interval in found.items()} == pytest.approx({n: metrics[n] for n in METRICS})


def test_two_triples_are_drawn_as_two_coins() -> None:
    """Of 0 and 1, a quarter of the samples is 0 0, half has both, a quarter is 1 1; 0.03 is four standard errors."""
    means = resampled_means(np.array([[0.0], [1.0]]), samples=4000)[:, 0]
    for value, chance in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.25)):
        assert abs(float((means == value).mean()) - chance) < 0.03
    assert intervals(np.array([[0.0], [1.0]])) == [Interval(0.5, 0.0, 1.0)]


def test_the_interval_of_a_share_ends_at_the_quantiles_of_the_binomial() -> None:
    """30 of 100: drawn again, their number is binomial. One hit more or less is what 20,000 samples may miss."""
    values = np.zeros((100, 1))
    values[:30] = 1
    (found,) = intervals(values, samples=20000)
    assert found.mean == pytest.approx(0.3)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        assert abs(end - binomial_quantile(100, 0.3, share) / 100) <= 0.0101


def test_what_is_the_same_in_both_falls_out_of_a_difference() -> None:
    """One model is better by 0.1 on every triple: sure, though its own interval is wide."""
    scores = np.random.default_rng(0).random((40, 4))
    for found in difference_intervals(scores + 0.1, scores).values():
        assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))
        assert found.excludes_zero
    for found in difference_intervals(scores, scores).values():
        assert found == Interval(0.0, 0.0, 0.0)
        assert not found.excludes_zero
    assert all(found.high - found.low > 0.1 for found in metric_intervals(scores).values())


def test_both_questions_of_a_triple_are_drawn_together() -> None:
    """A direction that repeats the other brings no certainty: the interval is that of one direction alone."""
    generator = np.random.default_rng(1)
    tail, head = (ranks(*generator.integers(1, 30, size=40)) for _ in range(2))
    (alone,) = intervals((1 / tail.realistic)[:, None])
    twice, both = (metric_intervals(triple_scores(tail, other))["mrr"] for other in (tail, head))
    assert twice.to_dict() == pytest.approx(alone.to_dict(), rel=1e-12)
    assert both.high - both.low < 0.9 * (alone.high - alone.low)


def coverage(*, questions_apart: bool) -> float:
    """Return how often the interval holds the true mean of 400 made-up measurements of 60 triples each.

    Both questions of a triple are as hard as the triple is.
    """
    generator, held = np.random.default_rng(7), 0
    for _ in range(400):
        triples = generator.exponential(size=(60, 1))
        values = np.repeat(triples, 2, axis=0) if questions_apart else triples
        (found,) = intervals(values, samples=400, seed=int(generator.integers(1 << 31)))
        held += found.low <= 1.0 <= found.high
    return held / 400


def test_intervals_of_95_percent_hold_the_truth_about_as_often() -> None:
    """Skewed data, 60 triples: a little below 95 % is known of this interval; 0.011 is the standard error of the count.

    Questions drawn apart would make it narrower by √2: P(|z| < 1.96 / √2) = 83 %.
    """
    assert 0.90 <= coverage(questions_apart=False) <= 0.98
    assert coverage(questions_apart=True) < 0.88


def test_a_seed_gives_the_same_interval_however_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((30, 2))
    whole, other = resampled_means(values, samples=50, seed=3), resampled_means(values, samples=50, seed=4)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 100)  # three samples at once
    assert resampled_means(values, samples=50, seed=3) == pytest.approx(whole, rel=1e-12)
    assert not np.allclose(whole, other)
