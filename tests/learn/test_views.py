"""One view or two: each alone by hand, both together their mean, and what is trained follows the setting."""

import math
from collections.abc import Callable

import pytest
import torch

from pykalm.learn.losses import dual_view_loss
from pykalm.learn.state import read_metrics
from pykalm.model.run import Run
from tests.laws.common import build_batch, gradients, largest_difference, tiny_encoder, tiny_graph, tiny_verbalizer


def loss_of(views: str) -> float:
    """Return the loss for cosines (0.5, 0.25; 0, 0.75), scale 4, margin 0.1, with the answers on the diagonal."""
    loss = dual_view_loss(
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[0.5, 0.0], [0.25, 0.75]]),
        log_scale=torch.tensor(math.log(4.0)),
        margin=0.1,
        positives=torch.tensor([[0, 0], [1, 1]]),
        masked=torch.eye(2, dtype=torch.bool),
        views=views,  # type: ignore[arg-type]
    )
    return float(loss)


def test_each_view_is_worked_out_by_hand() -> None:
    """Rows: 1.6 against 1.0, 2.6 against 0. Columns: 1.6 against 0, 2.6 against 1.0."""
    e = math.exp
    rows = [-math.log(e(1.6) / (e(1.6) + e(1.0))), -math.log(e(2.6) / (e(2.6) + e(0)))]
    columns = [-math.log(e(1.6) / (e(1.6) + e(0))), -math.log(e(2.6) / (e(2.6) + e(1.0)))]
    assert loss_of("query") == pytest.approx(sum(rows) / 2, abs=1e-6)
    assert loss_of("candidate") == pytest.approx(sum(columns) / 2, abs=1e-6)
    assert loss_of("both") == pytest.approx((sum(rows) + sum(columns)) / 4, abs=1e-6)


def test_the_gradient_of_both_views_is_the_mean_of_theirs() -> None:
    """Float32 rounding is 1e-6 relative; cached gradients take the same way."""
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    batch = build_batch(encoder, verbalizer)
    found = {
        views: gradients(encoder, batch, implicit_weight=0.0, views=views)[1]
        for views in ("both", "query", "candidate")
    }
    mean = {name: (found["query"][name] + found["candidate"][name]) / 2 for name in found["both"]}
    assert largest_difference(mean, found["both"]) < 1e-4
    assert largest_difference(found["query"], found["both"]) > 1e-2
    cached = gradients(encoder, batch, implicit_weight=0.0, views="query", memory_tokens=1)[1]
    assert largest_difference(cached, found["query"]) < 1e-4


def test_training_takes_the_view_of_its_settings(train: Callable[..., Run]) -> None:
    runs = [
        train(views, objective__views=views, training__max_steps=1).path for views in ("both", "query", "candidate")
    ]
    both, query, candidate = (read_metrics(run)[0]["explicit"] for run in runs)
    assert both == pytest.approx((query + candidate) / 2, rel=1e-5)
    assert abs(query - candidate) > 1e-4
