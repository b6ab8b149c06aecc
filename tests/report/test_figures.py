"""Figures: valid PNG files whose pixels show the matrices; no figure state is left behind."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from pykalm.evaluate.similarity import triple_labels
from pykalm.report.figures import COLOURS, similarity_figure
from tests.evaluate.fakes import geography


def pixels_near(image: np.ndarray, value: float, lowest: float) -> int:
    """Count the pixels in the colour of a cosine."""
    colour = colormaps[COLOURS]((value - lowest) / (1 - lowest))[:3]
    return int((np.abs(image[:, :, :3] - colour).max(axis=2) < 0.01).sum())


def draw(path: Path, size: int, label: str = "France · capital") -> np.ndarray:
    before = np.full((size, size), 0.9, dtype=np.float32)
    after = np.where(np.eye(size, dtype=bool), 0.8, 0.0).astype(np.float32)
    similarity_figure(before, after, query_labels=[label] * size, tail_labels=["Paris"] * size, path=path)
    return np.asarray(imread(path))


@pytest.mark.parametrize("size", [1, 5, 24])
def test_similarity_figure_shows_both_matrices_in_one_scale(tmp_path: Path, size: int) -> None:
    image = draw(tmp_path / "report" / "similarity.png", size)
    lowest = 0.0 if size > 1 else 0.8
    whole, diagonal = pixels_near(image, 0.9, lowest), pixels_near(image, 0.8, lowest)
    if size > 1:
        assert whole == pytest.approx(diagonal * size, rel=0.1)  # n² cells before, n on the diagonal after
    assert whole > 10_000
    assert sorted(tmp_path.rglob("*.png")) == [tmp_path / "report" / "similarity.png"]


def test_long_labels_and_dollar_signs_do_not_break_the_figure(tmp_path: Path) -> None:
    wide = draw(tmp_path / "a.png", 5, "a name that goes on and on and on, $5 and then $x_{ more")
    assert wide.shape[1] > draw(tmp_path / "b.png", 5, "France").shape[1]


def test_figures_do_not_touch_pyplot() -> None:
    source = Path(sys.modules["pykalm.report.figures"].__file__ or "").read_text(encoding="utf-8")
    assert "pyplot" not in source


def test_labels_name_query_and_tail() -> None:
    graph = geography()
    assert triple_labels(graph, graph.triples("test")) == (
        ["Spain · has capital", "France · borders"],
        ["Madrid", "Georgia"],
    )
