"""Figures as PNG or SVG files, drawn on a canvas of their own: no display, no state shared with a notebook's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from pykalm.evaluate.similarity import FloatMatrix
from pykalm.files import replace_file

COLOURS = "viridis"  # equal steps in cosine look equal, in print and to the colour-blind
INK, FAINT, LINE = "#222222", "#777777", "#2a6f97"
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
    title: str = "Similarity of queries and answers",
    diagonal: str | None = "answers",
) -> None:
    """Draw the cosines (n, n) of queries and tails before and after alignment side by side, in one scale.

    Row i and column i belong to one triple, so the answers lie on the diagonal; diagonal names what lies there, None
    where it is each thing with itself, which says nothing.
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
        axes.text(
            0, 1.015, _contrast(matrix, diagonal), transform=axes.transAxes, fontsize=8.5, color=FAINT, va="bottom"
        )
        axes.set_yticks(range(len(rows)), rows if place == 0 else [], fontsize=FONT)
    bar = figure.colorbar(image, cax=_axes(figure, left + 2 * side + GAP + 0.2, bottom + side * 0.2, 0.13, side * 0.6))
    bar.set_label("cosine", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, length=2, colors=INK)
    bar.outline.set_visible(False)
    figure.text(0.2 / figure.get_figwidth(), 1 - 0.18 / figure.get_figheight(), title, va="top", fontsize=14,
                fontweight="bold", color=INK)  # fmt: skip
    save_figure(figure, path)


def training_curves_figure(records: Sequence[Mapping[str, Any]], path: Path, *, title: str = "Training") -> None:
    """Draw loss, valid MRR, temperature and learning rate against the step, from the lines of metrics.jsonl."""
    figure = Figure(figsize=(9.6, 5.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    names = (
        ("loss", "loss"),
        ("valid_mrr", "valid MRR"),
        ("temperature", "temperature τ"),
        ("learning_rate", "learning rate"),
    )
    for axes, (name, heading) in zip(panels.flat, names, strict=True):
        points = [(line["step"], line[name]) for line in records if line.get(name) is not None]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        _draw_curve(axes, steps, values, heading)
    for axes in panels[1]:
        axes.set_xlabel("step", fontsize=9, color=INK)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    save_figure(figure, path)


def _draw_matrix(axes: Axes, matrix: FloatMatrix, lowest: float, labels: Sequence[str]) -> AxesImage:
    image = axes.imshow(matrix, cmap=COLOURS, vmin=lowest, vmax=1.0, interpolation="nearest")
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=FONT)
    axes.tick_params(length=0, pad=3, colors=INK)
    axes.spines[:].set_visible(False)
    return image


def _contrast(matrix: FloatMatrix, diagonal: str | None) -> str:
    """Say how far the diagonal stands out from the rest."""
    answers, others = matrix.diagonal(), matrix[~np.eye(len(matrix), dtype=np.bool_)]
    if diagonal is None:
        return f"mean cosine of different ones: {others.mean():.2f}" if len(others) else ""
    rest = f", all others {others.mean():.2f}" if len(others) else ""
    return f"mean cosine: {diagonal} {answers.mean():.2f}{rest}"


def _draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, heading: str) -> None:
    """Draw one curve; where it is noisy, the running mean over a hundredth of the steps, with the values behind it."""
    axes.set_title(heading, loc="left", fontsize=10, fontweight="bold", color=INK)
    window = max(1, len(values) // 50)
    if window > 1 and heading == "loss":
        axes.plot(steps, values, color=LINE, alpha=0.25, linewidth=0.8)
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color=LINE, linewidth=1.8)
    else:
        axes.plot(steps, values, color=LINE, linewidth=1.8, marker="o" if len(values) < 40 else None, markersize=4)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.tick_params(labelsize=8, length=0, colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place given in inches."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def _shorten(label: str, most: int) -> str:
    # A dollar sign would begin a formula.
    short = label if len(label) <= most else label[: most - 1].rstrip() + "…"
    return short.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, as the ending of its file says; the letters of an SVG stay letters."""
    ending = path.suffix.removeprefix(".")
    metadata = {"Date": None} if ending == "svg" else None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "kalm"}):
        replace_file(path, lambda draft: FigureCanvasAgg(figure).print_figure(draft, format=ending, metadata=metadata))
