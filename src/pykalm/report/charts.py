"""The kinds of charts of the report page: curves, bars and matrices, each from plain numbers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from pykalm.report.drawing import (
    ALIGNED,
    COLOURS,
    FAINT,
    HEAT,
    INK,
    REFERENCE,
    Drawing,
    draw,
    grid,
    mark_x,
    percent,
    thousands,
    tidy,
)

Points = tuple[Sequence[float], Sequence[float]]
ROUNDING = 1e-8
"""Shares of eigenvalues below this are rounding errors of float32 vectors."""
MAX_POINTS = 600
"""Points of a drawn curve; longer ones are averaged in blocks, since no screen shows more."""


def curve(
    name: str,
    title: str,
    lines: Mapping[str, Points],
    *,
    x_label: str = "step",
    y_format: Callable[[float, object], str] = thousands,
    smooth: bool = False,
) -> Drawing:
    """Draw y against x for each label; smooth puts a running mean over a noisy line, which stays visible behind it."""

    def paint(axes: Axes) -> None:
        for (label, (x, y)), colour in zip(lines.items(), _line_colours(lines), strict=True):
            places, values = _thinned(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
            window = max(1, len(values) // 40)
            if smooth and window > 1:
                axes.plot(places, values, color=colour, alpha=0.3, linewidth=0.8)
                mean = np.convolve(values, np.ones(window) / window, mode="valid")
                axes.plot(places[window - 1 :], mean, color=colour, label=label)
            else:
                marker = "o" if len(values) < 30 else None
                axes.plot(places, values, color=colour, label=label, marker=marker, markersize=4)
        axes.margins(y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        grid(axes, x_label=x_label, y_format=y_format)

    return draw(name, title, paint, alt=_alt(title, lines))


def rising(name: str, title: str, bounds: Sequence[int], shares: Mapping[str, Sequence[float]]) -> Drawing:
    """Draw the share that lies within each bound, for bounds on a logarithmic axis."""

    def paint(axes: Axes) -> None:
        for label, values in shares.items():
            axes.plot(bounds, values, color=COLOURS[label], marker="o", markersize=4, label=label)
        axes.set_xscale("log")
        mark_x(axes, bounds)
        axes.set_ylim(0, 1.04)
        grid(axes, x_label="k (logarithmic)", y_format=percent)

    return draw(name, title, paint, alt=_alt(title, shares))


def limit_curve(name: str, title: str, points: Points, *, limit: float, limit_label: str, colour: str) -> Drawing:
    """Draw a measured curve over a logarithmic axis of counts, and the line that it must come to."""
    x, y = points

    def paint(axes: Axes) -> None:
        axes.axhline(limit, color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1.4, label=limit_label)
        axes.plot(x, y, color=colour, marker="o", markersize=4, label="measured")
        axes.set_xscale("log")
        mark_x(axes, x)
        axes.margins(y=0.15)
        grid(axes, x_label="negatives N (logarithmic)")

    return draw(name, title, paint, alt=f"{title}: {y[-1]:.3f} at N = {x[-1]:,}, limit {limit:.3f}")


def spectrum(name: str, title: str, shares: Mapping[str, Sequence[float]]) -> Drawing:
    """Draw the shares of the eigenvalues, largest first, with both axes logarithmic."""

    def paint(axes: Axes) -> None:
        for label, values in shares.items():
            positive = [value for value in values if value > ROUNDING]
            axes.plot(range(1, len(positive) + 1), positive, color=COLOURS[label], label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        longest = max(len(values) for values in shares.values())
        mark_x(axes, [count for count in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if count <= longest] or [1])
        grid(axes, x_label="eigenvalue, largest first (logarithmic)", y_format=percent)

    return draw(name, title, paint, alt=f"{title}: shares of the eigenvalues, largest first")


def columns(
    name: str,
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str = "",
    top: float | None = None,
    colours: Mapping[str, str] | None = None,
    has_values: bool = True,
) -> Drawing:
    """Draw shares as groups of standing bars; top: the end of the axis, else what the bars need."""
    colours = COLOURS | {} if colours is None else colours

    def paint(axes: Axes) -> None:
        places, width = np.arange(len(groups)), 0.8 / len(series)
        for number, (label, values) in enumerate(series.items()):
            left = places + (number - (len(series) - 1) / 2) * width
            bars = axes.bar(left, values, width * 0.92, color=colours[label], label=label)
            if has_values:
                texts = [f"{100 * value:.0f}" for value in values]
                axes.bar_label(bars, texts, padding=2, fontsize=8, color=FAINT)
        mark_x(axes, places.tolist(), [tidy(group, 14) for group in groups])
        axes.tick_params(axis="x", length=0)
        highest = max((value for values in series.values() for value in values), default=0.0)
        axes.set_ylim(0, top or max(0.05, highest * 1.14))
        grid(axes, x_label=x_label, y_format=percent)

    return draw(name, title, paint, alt=_alt(title, series))


def lying_bars(name: str, title: str, rows: Sequence[str], series: Mapping[str, Sequence[float]]) -> Drawing:
    """Draw values between 0 and 1 as lying bars, each group under its name, so that long names have room."""

    def paint(axes: Axes) -> None:
        thickness = 0.46 / len(series)
        for number, (label, values) in enumerate(series.items()):
            places = np.arange(len(rows)) + 0.06 + number * thickness
            axes.barh(places, values, thickness * 0.86, color=COLOURS[label], label=label)
            for place, value in zip(places, values, strict=True):
                axes.text(value + 0.01, place, f"{value:.3f}", va="center", fontsize=7.5, color=FAINT)
        for place, row in enumerate(rows):
            axes.text(0, place - 0.25, tidy(row, 60), va="center", fontsize=9, color=INK)
        axes.set_ylim(len(rows) - 0.35, -0.6)
        axes.set_xlim(0, 1.06)
        axes.yaxis.set_major_locator(NullLocator())
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes.grid(axis="x")

    return draw(name, title, paint, alt=_alt(title, series), height=0.9 + 0.5 * len(rows))


def intervals(name: str, title: str, rows: Mapping[str, tuple[float, float, float]]) -> Drawing:
    """Draw (mean, low, high) as a point on a line for each row, beside zero."""

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=FAINT, linewidth=1)
        for place, (mean, low, high) in enumerate(rows.values()):
            axes.plot([low, high], [place, place], color=ALIGNED, linewidth=3, alpha=0.45)
            axes.plot([mean], [place], color=ALIGNED, marker="o", markersize=6)
            axes.text(mean, place - 0.24, f"{mean:+.3f}".replace("-", "−"), ha="center", fontsize=8, color=FAINT)
        axes.set_ylim(len(rows) - 0.4, -0.7)
        axes.margins(x=0.15)
        axes.set_yticks(range(len(rows)), [tidy(row, 16) for row in rows])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, position: f"{value:+.3g}".replace("-", "−") if value else "0")
        )
        axes.grid(axis="x")

    return draw(name, title, paint, height=0.8 + 0.38 * len(rows))


def matrix(name: str, title: str, cosines: Sequence[Sequence[float]], *, lowest: float) -> Drawing:
    """Draw a matrix of cosines; rows and columns are numbered from 1, and the colours go from `lowest` to 1."""
    values = np.asarray(cosines, dtype=np.float64)

    def paint(axes: Axes) -> None:
        image = axes.imshow(values, cmap=HEAT, vmin=min(lowest, 0.99), vmax=1.0, interpolation="none", aspect="equal")
        for axis, count in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
            step = -(-count // 12)
            axis.set_ticks(range(0, count, step), [str(number + 1) for number in range(0, count, step)])
        axes.xaxis.tick_bottom()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.7, aspect=22, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8)
        bar.locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])
        bar.formatter = FuncFormatter(thousands)
        bar.update_ticks()

    rows, wide = values.shape
    return draw(name, title, paint, height=min(6.0, 0.55 + 4.1 * rows / wide), legend=False)


def _line_colours(lines: Mapping[str, object]) -> list[str]:
    """Return a colour for each label: its own where it has one, else the two strong ones in turn."""
    return [COLOURS.get(label, (ALIGNED, REFERENCE)[number % 2]) for number, label in enumerate(lines)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average a long line in blocks."""
    size = -(-len(x) // MAX_POINTS)
    whole = len(x) // size * size if size else 0
    if size <= 1:
        return x, y
    return x[:whole].reshape(-1, size).mean(axis=1), y[:whole].reshape(-1, size).mean(axis=1)


def _alt(title: str, lines: Mapping[str, object]) -> str:
    return f"{title}: {', '.join(lines)}"
