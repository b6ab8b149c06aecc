"""Claims about cost against size: what its slope is, and which graphs are measured."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pykalm.bench.own_process import in_own_process
from pykalm.bench.plan import BATCHINGS, Plan
from pykalm.bench.scaling import LARGE_GRAPH, Scaling, _ordering_peak, _up_to, scaling_parts
from pykalm.errors import UsageError


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
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for name in ("KALM_DATA", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    assert LARGE_GRAPH not in notes(Plan())
    assert f"{LARGE_GRAPH} is in none of the folders" in caplog.text
    (tmp_path / LARGE_GRAPH).mkdir()
    (tmp_path / LARGE_GRAPH / "train.txt").write_text("damaged\n", encoding="utf-8")  # which its reading says
    assert LARGE_GRAPH in notes(Plan())


def test_graphs_that_are_named_are_measured_and_no_others() -> None:
    assert "building of umls" in notes(Plan(graphs=("umls",)))
    assert LARGE_GRAPH not in notes(Plan(graphs=("umls",)))


def test_the_memory_of_an_order_is_not_that_of_the_code_that_is_loaded_for_it() -> None:
    """Ten triples take some pages, of a process that has done nothing before hundreds of them."""
    few = np.stack([np.arange(10), np.zeros(10, int), np.arange(10) + 1], axis=1)
    for batching in BATCHINGS:
        assert in_own_process(partial(_ordering_peak, few, batching, 4)) < 100_000


def test_sizes_are_those_that_a_graph_has() -> None:
    assert _up_to(70, (32, 64, 128)) == [32, 64]
    assert _up_to(5, (32, 64, 128)) == [5]


@pytest.mark.parametrize("twice", [{"graphs": ("umls", "umls")}, {"only": ("rank", "rank")}])
def test_what_is_named_twice_is_refused(twice: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(UsageError, match="wanted every name once"):
        Plan(**twice)  # type: ignore[arg-type]
