"""Theorem 1 against loops, against the loss that is trained, and against its own limit."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from pykalm.errors import ModelError, UsageError
from pykalm.evaluate import asymptotics
from pykalm.evaluate.asymptotics import Asymptotics, ladder, measure_asymptotics
from pykalm.learn.losses import dual_view_loss

TEMPERATURE = 0.2


def unit_rows(count: int, seed: int, width: int = 6) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def scene(num_queries: int = 40, num_candidates: int = 30, num_pairs: int = 25) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return queries, candidates, and pairs of which some share a query or a candidate."""
    drawn = np.random.default_rng(3)
    pairs = np.stack([drawn.integers(0, num_queries, num_pairs), drawn.integers(0, num_candidates, num_pairs)], axis=1)
    return unit_rows(num_queries, 1), unit_rows(num_candidates, 2), np.unique(pairs, axis=0)


def measure(query: Tensor, candidates: Tensor, pairs: np.ndarray, **rest: object) -> Asymptotics:
    return measure_asymptotics(query, candidates, pairs, temperature=TEMPERATURE, **rest)  # type: ignore[arg-type]


def test_the_limit_is_the_right_hand_side_of_the_theorem() -> None:
    query, candidates, pairs = scene()
    left, right = query[pairs[:, 0]].double().numpy(), candidates[pairs[:, 1]].double().numpy()
    near = [float(q @ k) / TEMPERATURE for q, k in zip(left, right, strict=True)]
    tails = [
        math.log(np.mean([math.exp(float(q @ k) / TEMPERATURE) for k in candidates.double().numpy()])) for q in left
    ]
    heads = [math.log(np.mean([math.exp(float(q @ k) / TEMPERATURE) for q in query.double().numpy()])) for k in right]
    expected = -np.mean(near) + np.mean(tails) / 2 + np.mean(heads) / 2
    assert measure(query, candidates, pairs).limit == pytest.approx(expected, rel=1e-12)


def test_with_all_others_as_negatives_the_loss_is_that_of_training() -> None:
    """Each query with its own candidate: the dual-view loss of the whole batch, margin 0, only the positives known."""
    query, candidates = unit_rows(12, 1), unit_rows(12, 2)
    pairs = np.stack([np.arange(12), np.random.default_rng(0).permutation(12)], axis=1)
    known = torch.zeros(12, 12, dtype=torch.bool)
    known[tuple(pairs.T)] = True
    trained = dual_view_loss(
        query, candidates, log_scale=torch.tensor(math.log(1 / TEMPERATURE)), margin=0.0,
        positives=torch.from_numpy(pairs), masked=known,
    )  # fmt: skip
    found = measure(query, candidates, pairs)
    assert found.num_negatives[-1] == 11
    assert found.normalised_loss[-1] + math.log(11) == pytest.approx(float(trained), rel=1e-5)  # it is in float32


def test_the_loss_with_some_negatives_is_the_mean_over_all_ways_to_draw_them() -> None:
    """Over many draws each N comes, within four standard errors, to the mean of a loop with draws of its own."""
    query, candidates, pairs = scene(9, 8, 4)
    drawn = random.Random(5)
    for view, (near, far, anchors, others) in {
        "tails": (0, 1, query, candidates),
        "heads": (1, 0, candidates, query),
    }.items():
        runs = [
            getattr(measure(query, candidates, pairs, num_negatives=[3], seed=seed), view)[0][0] for seed in range(400)
        ]
        table = (anchors.double() @ others.double().T / TEMPERATURE).exp().tolist()
        losses = []
        for _ in range(400):
            one = []
            for pair in pairs.tolist():
                scores = table[pair[near]]
                chosen = drawn.sample([row for row in range(len(others)) if row != pair[far]], 3)
                one.append(-math.log(scores[pair[far]] / (scores[pair[far]] + sum(scores[row] for row in chosen))))
            losses.append(np.mean(one) - math.log(3))
        error = math.hypot(np.std(runs) / 20, np.std(losses) / 20)
        assert np.mean(runs) == pytest.approx(np.mean(losses), abs=4 * error)
        assert error < 0.05  # one negative more or fewer changes it by log(4/3) = 0.29


def test_the_normalised_loss_comes_to_its_limit() -> None:
    """On random vectors: within log(M / (M − 1)) with all others, and on the way there ever nearer in the mean of ten draws."""
    query, candidates = unit_rows(600, 1), unit_rows(600, 2)
    pairs = np.stack([np.arange(600)] * 2, axis=1)
    runs = [measure(query, candidates, pairs, seed=seed) for seed in range(10)]
    found = runs[0]
    gaps = np.abs(np.mean([run.normalised_loss for run in runs], axis=0) - found.limit)
    assert found.num_negatives == (1, 2, 4, 8, 16, 32, 64, 128, 256, 599)
    assert gaps[-1] == pytest.approx(math.log(600 / 599), abs=1e-9)
    assert gaps[0] > 0.3
    assert all(later < earlier for earlier, later in itertools.pairwise(gaps[:7]))
    assert gaps[6:].max() < 0.05


def test_chunks_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    query, candidates, pairs = scene()
    whole = measure(query, candidates, pairs)
    monkeypatch.setattr(asymptotics, "SCORES_AT_ONCE", 100)
    done: list[int] = []
    parts = measure(query, candidates, pairs, step=done.append)
    assert parts.limit == pytest.approx(whole.limit, rel=1e-12)
    assert parts.normalised_loss[-1] == pytest.approx(whole.normalised_loss[-1], abs=0.02)  # of 40 queries 29 are drawn
    assert max(done) <= 3
    assert sum(done) == 2 * len(pairs)


def test_a_seed_gives_the_same_curve() -> None:
    query, candidates, pairs = scene()
    first, again, other = (measure(query, candidates, pairs, seed=seed).normalised_loss for seed in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_scores_beyond_the_range_of_exp_are_added_up() -> None:
    """At τ = 0.001 a cosine of 1 is e^1000; two orthogonal pairs lose nothing, and the limit is −1000 + 1000 − log 2."""
    found = measure_asymptotics(torch.eye(2), torch.eye(2), np.array([[0, 0], [1, 1]]), temperature=0.001)
    assert found.normalised_loss.tolist() == pytest.approx([0.0], abs=1e-6)
    assert found.limit == pytest.approx(-math.log(2), abs=1e-6)


def test_the_ladder_ends_with_all_others() -> None:
    assert [ladder(most) for most in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 9]]


def test_numbers_that_cannot_be_are_refused() -> None:
    query, candidates, pairs = scene()
    for numbers in ([0], [30], []):
        with pytest.raises(UsageError, match="1 to 29"):
            measure(query, candidates, pairs, num_negatives=numbers)
    with pytest.raises(ModelError, match="finite"):
        measure(query * float("nan"), candidates, pairs)
