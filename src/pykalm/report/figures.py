"""The figure of the demo as a PNG file, on a canvas of its own: no display, no state shared with the figures of a notebook."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from pykalm.evaluate.similarity import FloatMatrix
from pykalm.files import replace_file

COLOURS = "viridis"  # equal steps in cosine look equal, in print and to the colour-blind
INK, FAINT = "#222222", "#777777"
TITLE = "Similarity of queries and answers"
DPI = 160
# Sizes of the similarity figure in inches (points for the font), so that its cells are square and its labels have room.
CELL, GAP, FONT, LETTER = 0.235, 0.3, 7.5, 0.063


def similarity_figure(
    before: FloatMatrix,
    after: FloatMatrix,
    *,
    query_labels: Sequence[str],
    tail_labels: Sequence[str],
    path: Path,
) -> None:
    """Draw the cosines (n, n) of queries and tails before and after alignment side by side, in one scale.

    Row i and column i belong to one triple, so the answers lie on the diagonal.
    """
    rows, columns = ([_shorten(label, most) for label in labels] for labels, most in
                     ((query_labels, 40), (tail_labels, 28)))  # fmt: skip
    side = max(3.0, CELL * len(before))
    left, bottom = LETTER * max(map(len, rows)) + 0.2, LETTER * max(map(len, columns)) + 0.25
    figure = Figure(figsize=(left + 2 * side + GAP + 1.1, bottom + side + 1.0), dpi=DPI)
    lowest = np.floor(10 * min(before.min(), after.min())) / 10
    for place, (name, matrix) in enumerate((("before alignment", before), ("after alignment", after))):
        axes = _axes(figure, left + place * (side + GAP), bottom, side, side)
        image = _draw_matrix(axes, matrix, float(lowest), columns)
        axes.set_title(f"{name}\n", loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.text(0, 1.015, _contrast(matrix), transform=axes.transAxes, fontsize=8.5, color=FAINT, va="bottom")
        axes.set_yticks(range(len(rows)), rows if place == 0 else [], fontsize=FONT)
    bar = figure.colorbar(image, cax=_axes(figure, left + 2 * side + GAP + 0.2, bottom + side * 0.2, 0.13, side * 0.6))
    bar.set_label("cosine", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, length=2, colors=INK)
    bar.outline.set_visible(False)
    figure.text(0.2 / figure.get_figwidth(), 1 - 0.18 / figure.get_figheight(), TITLE, va="top", fontsize=14,
                fontweight="bold", color=INK)  # fmt: skip
    _save(figure, path)


def _draw_matrix(axes: Axes, matrix: FloatMatrix, lowest: float, labels: Sequence[str]) -> AxesImage:
    image = axes.imshow(matrix, cmap=COLOURS, vmin=lowest, vmax=1.0, interpolation="nearest")
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=FONT)
    axes.tick_params(length=0, pad=3, colors=INK)
    axes.spines[:].set_visible(False)
    return image


def _contrast(matrix: FloatMatrix) -> str:
    """Say how far the diagonal stands out from the rest."""
    answers, others = matrix.diagonal(), matrix[~np.eye(len(matrix), dtype=np.bool_)]
    rest = f", all others {others.mean():.2f}" if len(others) else ""
    return f"mean cosine: answers {answers.mean():.2f}{rest}"


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place given in inches."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def _shorten(label: str, most: int) -> str:
    # A dollar sign would begin a formula.
    short = label if len(label) <= most else label[: most - 1].rstrip() + "…"
    return short.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    replace_file(path, lambda draft: FigureCanvasAgg(figure).print_figure(draft, format="png"))
