"""Drawing figures that serve twice: as files in light colours, and inside the page in the colours of its reader.

Every role has a colour that is used for nothing else. On the page that colour becomes a CSS variable of the same name, and
text takes the page's font, so that one drawing is right on light, on dark and on paper.
"""

import html
import io
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

INK, FAINT, RULE = "#1d2733", "#66717d", "#dfe4e9"
ALIGNED, UNALIGNED, REFERENCE = "#1b6e9e", "#98a3ae", "#c4751a"
ROLES = {"ink": INK, "faint": FAINT, "rule": RULE, "aligned": ALIGNED, "unaligned": UNALIGNED, "reference": REFERENCE}
COLOURS = {"aligned": ALIGNED, "unaligned": UNALIGNED}
HEAT = "viridis"  # equal steps in cosine look equal, in print and to the colour-blind

WIDTH, HEIGHT = 5.0, 3.0
"""Inches of a panel. In the page it is as wide as a phone, or half as wide as the text: its letters stay legible in both."""
DPI = 160
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.labelcolor": FAINT,
    "axes.labelsize": 9,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",  # also behind the bar of colours
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: it can be selected, and names in every script find their letters
    "svg.hashsalt": "kalm",
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """Hold a drawn figure in the forms that are written: SVG and PNG files, and SVG to be put into a page."""

    name: str
    svg: str
    inline: str
    png: bytes


def draw(
    name: str,
    title: str,
    paint: Callable[[Axes], object],
    *,
    alt: str = "",
    height: float = HEIGHT,
    legend: bool = True,
) -> Drawing:
    """Let `paint` fill the axes of one panel under a title, with a legend where there is more than one label.

    name becomes the name of the files. No state of matplotlib is changed, and no display is needed.
    """
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that matplotlib's own font lacks are measured by a blank
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
        figure = Figure(figsize=(WIDTH, height), facecolor="none", layout=layout)
        axes = figure.add_subplot(facecolor="none")
        paint(axes)
        top = _head(figure, axes, title, height=height, has_legend=legend)
        layout.set(rect=(0, 0, 1, 1 - top))
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    return Drawing(name, svg.getvalue(), inline_svg(svg.getvalue(), name, alt or title), png.getvalue())


def _head(figure: Figure, axes: Axes, title: str, *, height: float, has_legend: bool) -> float:
    """Put the title and, where there is more than one label, the legend at the left edge; return their share of the height."""
    handles, labels = axes.get_legend_handles_labels()
    has_legend = has_legend and len(labels) > 1
    left, below = 0.03 / WIDTH, 0.26 / height
    figure.text(left, 1 - 0.04 / height, title, va="top", fontsize=11, fontweight="bold").set_in_layout(False)
    if has_legend:
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(left, 1 - below), ncols=4, borderaxespad=0, borderpad=0,
            handlelength=1.1, handleheight=0.8, handletextpad=0.5, columnspacing=1.4, labelcolor=FAINT,
        ).set_in_layout(False)  # fmt: skip
    return (0.52 if has_legend else 0.34) / height


def inline_svg(svg: str, name: str, alt: str) -> str:
    """Return an SVG of matplotlib's for use inside a page: of the page's colours and font, ids with `name` before them."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    referenced = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in referenced else "", rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"font-family: [^;\"]*;? ?", "", rest)
    variables = {colour: f"var(--{role})" for role, colour in ROLES.items()}
    rest = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})", lambda found: f"{found[1]}: {variables.get(found[2], found[2])}", rest
    )
    label = html.escape(tidy(alt, 300))
    return f'<svg {view[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{label}">{rest}'.strip()


def thousands(value: float, position: object = None) -> str:
    """Write a number of an axis: 1,000, 0.25 and 0.05025, without zeros that say nothing."""
    text = f"{value:,.0f}" if abs(value) >= 10 or value == round(value) else f"{value:.4g}"
    return text.replace("-", "−")


def percent(value: float, position: object = None) -> str:
    """Write a share of an axis as a percentage."""
    return f"{100 * value:.0f} %" if value == 0 or abs(value) >= 0.01 else f"{100 * value:.1g} %"


def grid(axes: Axes, *, x_label: str = "", y_format: Callable[[float, object], str] = thousands) -> None:
    """Draw faint horizontal lines, and write the numbers beside them."""
    axes.grid(axis="y")
    axes.set_xlabel(x_label)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(y_format))
    axes.yaxis.set_minor_locator(NullLocator())


def mark_x(axes: Axes, values: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Write labels at places of the x axis, the values themselves by default; crowded ones are thinned."""
    labels = [thousands(value) for value in values] if labels is None else labels
    step = -(-len(values) // 8)
    chosen = list(itertools.islice(zip(values, labels, strict=True), 0, None, step))
    axes.set_xticks([value for value, _ in chosen], [label for _, label in chosen])
    axes.xaxis.set_minor_locator(NullLocator())


def tidy(label: str, most: int) -> str:
    """Return a label of at most so many characters, without any that cannot be drawn."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    return plain if len(plain) <= most else plain[: most - 1].rstrip() + "…"
