"""Figures of what alignment does to representations, from two results files: Theorem 1, spectra, similarity of sentences."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pykalm.report.figures import DPI, INK, save_figure, similarity_figure

# Told apart by lightness and marker too, so that print and colour-blind readers lose nothing.
STYLES: dict[str, dict[str, Any]] = {
    "unaligned": {"color": "#8c6d31", "marker": "s", "markersize": 4.5},
    "aligned": {"color": "#2a6f97", "marker": "o", "markersize": 5},
}
GRID, FAINT = "#e4e4e4", "#666666"
GROUPS = {"queries": "queries (h, r)", "candidates": "candidates t", "sentences": "plain sentences"}
ENDINGS = (".png", ".svg")
LABEL_HEIGHT = 0.24
"""Share of the axes' height that the label of a curve takes."""


def draw_geometry(before: Mapping[str, Any], after: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the geometry (`GeometryReport.to_dict`) of the unaligned and the aligned model; return the PNG and SVG files."""
    results = {"unaligned": before, "aligned": after}
    shared = [name for name in GROUPS if all(name in result["groups"] for result in results.values())]
    painters: dict[str, Callable[[Path], None]] = {
        "theorem-1": lambda path: theorem_figure({key: one["theorem_1"] for key, one in results.items()}, path),
        "spectrum": lambda path: spectrum_figure({key: one["groups"] for key, one in results.items()}, shared, path),
    }
    similar = [result["similarity"].get("sentences") for result in results.values()]
    if all(similar):
        painters["similarity-sentences"] = lambda path: sentence_figure(similar[0], similar[1], path)
    files = [folder / f"{name}{ending}" for name in painters for ending in ENDINGS]
    for file in files:
        painters[file.stem](file)
    return files


def theorem_figure(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw L_exp − log N against N for each label, with its limit as a line that the points must come to."""
    figure = Figure(figsize=(7.6, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    most = max(max(curve["num_negatives"]) for curve in curves.values())
    for label, curve in curves.items():
        numbers, losses = curve["num_negatives"], curve["normalised_loss"]
        colour = STYLES[label]["color"]
        axes.axhline(curve["limit"], color=colour, linestyle=(0, (5, 3)), linewidth=1.3)
        axes.plot(numbers, losses, linewidth=1.8, **STYLES[label])
    for (label, curve), height in zip(curves.items(), _label_heights(axes, curves), strict=True):
        last, limit = curve["normalised_loss"][-1], curve["limit"]
        gap = f"\n({100 * abs(last / limit - 1):.2g} % apart)" if limit else ""
        said = f"{label}\nlimit {limit:.2f}\nmeasured {last:.2f}{gap}".replace("-", "−")
        axes.text(1.02, height, said, transform=axes.transAxes, va="center", fontsize=8.5, color=STYLES[label]["color"])
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.85, most * 1.18)
    axes.set_xlabel("number of negatives N", fontsize=9.5, color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    below = f"points: measured, τ = {_temperature(curves)}; dashed: limit"
    _title(axes, "Theorem 1: L_exp − log N flattens to its limit", below)
    _plain(axes)
    save_figure(figure, path)


def spectrum_figure(groups: Mapping[str, Mapping[str, Any]], names: list[str], path: Path) -> None:
    """Draw the shares of the eigenvalues of each group's second-moment matrix, both axes logarithmic, for each label."""
    figure = Figure(figsize=(1.2 + 3.3 * len(names), 3.9), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        ranks = []
        for label, measured in groups.items():
            shares = np.array(measured[name]["spectrum"])
            shown = np.where(shares > 1e-9, shares, np.nan)  # below are the zeros of directions that nothing has
            style = {"color": STYLES[label]["color"], "linestyle": "-" if label == "aligned" else (0, (4, 2))}
            axes.plot(np.arange(1, len(shares) + 1), shown, linewidth=1.9, label=label, **style)
            ranks.append(f"{measured[name]['effective_rank']:.1f}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=100))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("eigenvalue, largest first", fontsize=9.5, color=INK)
        _title(axes, GROUPS[name], f"effective rank {' → '.join(ranks)}")
        _plain(axes)
    panels[0].set_ylabel("share of the sum", fontsize=9.5, color=INK)
    panels[0].yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.10f}".rstrip("0").rstrip(".") + " %")
    )
    panels[-1].legend(frameon=False, fontsize=9, loc="lower left", labelcolor=INK)
    save_figure(figure, path)


def sentence_figure(before: Mapping[str, Any], after: Mapping[str, Any], path: Path) -> None:
    """Draw the cosines of plain sentences with each other before and after alignment, in one scale."""
    matrices = [np.array(similar["matrix"], dtype=np.float32) for similar in (before, after)]
    labels = after["labels"]
    similarity_figure(
        *matrices,
        query_labels=labels,
        tail_labels=labels,
        path=path,
        title="Similarity of plain sentences",
        diagonal=None,
    )


def _label_heights(axes: Axes, curves: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Return how high in the axes the label of each curve stands: at its limit, or beside it where two would touch."""
    low, high = axes.get_ylim()
    heights = np.array([(curve["limit"] - low) / (high - low) for curve in curves.values()])
    order = np.argsort(heights)
    for below, above in pairwise(order):
        missing = max(0.0, LABEL_HEIGHT - (heights[above] - heights[below]))
        heights[below] -= missing / 2
        heights[above] += missing / 2
    return [float(height) for height in heights]


def _temperature(curves: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(f"{curve['temperature']:.3g}" for curve in curves.values()))


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.text(0, 1.025, below, transform=axes.transAxes, fontsize=8.5, color=FAINT, va="bottom")


def _plain(axes: Axes) -> None:
    """Leave the figures of a plot to the data: faint lines across, no box."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.tick_params(which="both", labelsize=8.5, length=0, colors=INK)
