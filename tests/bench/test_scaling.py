"""Claims about cost against size: what its slope is, and which graphs are measured."""

import pytest

from pykalm.bench import scaling
from pykalm.bench.plan import Plan
from pykalm.bench.scaling import LARGE_GRAPH, Scaling, scaling_parts
from pykalm.errors import GraphError
from tests.laws.common import tiny_graph


@pytest.mark.parametrize(
    ("costs", "slope"),
    [({10: 3.0, 100: 3.0, 1000: 3.0}, 0), ({10: 1.0, 100: 10.0}, 1), ({4: 8.0, 16: 4.0}, -0.5), ({7: 2.0}, 0)],
)
def test_a_slope_is_that_of_log_cost_against_log_size(costs: dict[int, float], slope: float) -> None:
    found = Scaling.of("a step", "seconds per triple", costs)
    assert found.slope == pytest.approx(slope)
    assert (found.sizes, found.cost) == (list(costs), list(costs.values()))


def notes(plan: Plan) -> str:
    return " ".join(note for note, _ in scaling_parts(plan))


def test_a_large_graph_that_is_not_here_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere(name: str) -> None:
        raise GraphError(f"there is no graph {name}")

    monkeypatch.setattr(scaling, "load_graph", nowhere)
    assert LARGE_GRAPH not in notes(Plan())
    assert f"{LARGE_GRAPH} is in none of the folders" in caplog.text
    monkeypatch.setattr(scaling, "load_graph", lambda name: tiny_graph())
    assert LARGE_GRAPH in notes(Plan())


def test_graphs_that_are_named_are_measured_and_no_others() -> None:
    assert "building of umls" in notes(Plan(graphs=("umls",)))
    assert LARGE_GRAPH not in notes(Plan(graphs=("umls",)))
