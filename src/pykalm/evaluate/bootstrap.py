"""How sure a figure is: bootstrap intervals over the triples of a split, paired between models. docs/compare.md.

What is drawn again is the triple, with both of its questions. (h, r, ?) and (t, r⁻¹, ?) ask for the same fact with the
same texts, so that their ranks go together; drawn one by one, questions would count such a pair as two independent
observations, and intervals would come out too narrow.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from pykalm.evaluate.ranking import FloatArray, RankTable

SAMPLES = 2000
"""Samples drawn: another seed then moves an end by about 1.5 % of the interval's width (standard error of a quantile)."""
LEVEL = 0.95
METRICS = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10")
DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """Hold a mean over the triples that were asked and the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Return whether 0 lies outside, so that a difference is more than the choice of the triples."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float]:
        """Return the three numbers by name, for JSON."""
        return asdict(self)


def triple_scores(tail: RankTable, head: RankTable) -> FloatArray:
    """Return for N triples the mean over both directions of 1/rank and of rank ≤ 1, 3, 10, in the order of METRICS (N, 4).

    The mean over the triples is the metric over all 2N questions. EVALUATION.md §1.
    """
    assert len(tail) == len(head), "both directions of every triple"
    ranks = np.stack([tail.realistic, head.realistic])
    scores: FloatArray = np.stack([1 / ranks, ranks <= 1, ranks <= 3, ranks <= 10], axis=-1).mean(axis=0)
    return scores


def resampled_means(values: FloatArray, *, samples: int = SAMPLES, seed: int = 0) -> FloatArray:
    """Return the means (S, M) of S samples of N rows of values (N, M), drawn with replacement.

    All columns of a sample come from the same rows: this is what pairs metrics, and models, with each other.
    """
    num_rows = len(values)
    assert num_rows, "a sample of nothing"
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // num_rows)
    means = np.empty((samples, values.shape[1]))
    for start in range(0, samples, at_once):
        size = min(at_once, samples - start)
        drawn = generator.integers(num_rows, size=(size, num_rows))
        cells = (drawn + num_rows * np.arange(size)[:, None]).ravel()
        counts = np.bincount(cells, minlength=size * num_rows).reshape(size, num_rows)
        means[start : start + size] = counts @ values / num_rows
    return means


def intervals(values: FloatArray, *, samples: int = SAMPLES, seed: int = 0, level: float = LEVEL) -> list[Interval]:
    """Return the percentile interval of the mean of every column of values (N, M)."""
    drawn = resampled_means(values, samples=samples, seed=seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    ends = zip(values.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [Interval(*numbers) for numbers in ends]


def metric_intervals(scores: FloatArray, *, samples: int = SAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Return the interval of every metric from the scores (N, 4) of `triple_scores`."""
    return dict(zip(METRICS, intervals(scores, samples=samples, seed=seed), strict=True))


def difference_intervals(
    scores: FloatArray, others: FloatArray, *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Return the interval of every metric of `scores` minus that of `others`, both (N, 4) over the same triples.

    A sample takes the same triples of both, so that what makes a triple easy or hard for both falls out.
    """
    assert scores.shape == others.shape, "scores of the same triples"
    return metric_intervals(scores - others, samples=samples, seed=seed)


def plain_intervals(found: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    """Return intervals by metric as plain data, for JSON."""
    return {name: interval.to_dict() for name, interval in found.items()}
