"""Tables of figures with intervals or spread: runs compared, answers re-ranked, ablations."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from pykalm.report.tables import METRICS, new_table

WITH_INTERVALS = {name: heading for name, heading in METRICS.items() if name != "mr"}
ABLATION_LEGEND = (
    "Answer loss: −log p per token of the answers, to be compared where answers have the same wording. "
    "MRR − first: to the first variant, seed by seed."
)
LEGEND = "Below each figure its {level:.0%} interval over {samples:,} samples of triples; *: the interval excludes 0."


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Lay out several runs (`evaluate.compare.compare`): each with its intervals, then its difference to the first."""
    table = _interval_table(
        f"Link prediction on {result['graph']}, {result['split']}", LEGEND.format(**result["bootstrap"])
    )
    first = result["runs"][0]["label"]
    for row in result["runs"]:
        table.add_section()
        _add_figures(table, row["label"], row["metrics"], row["intervals"])
        if row["difference"] is not None:
            _add_difference(table, f"  − {first}", row["difference"])
    return table


def rerank_table(result: Mapping[str, Any]) -> Table:
    """Lay out what re-ranking brings (`RerankReport.to_dict`), and what was chosen on valid."""
    table = _interval_table(
        f"Re-ranking the first {result['k']} on {result['graph']}, {result['split']}", _chosen(result)
    )
    for label in ("plain", "reranked"):
        _add_figures(table, label, result[label], result["intervals"][label])
    table.add_section()
    _add_difference(table, "difference", result["difference"])
    return table


def ablation_table(result: Mapping[str, Any]) -> Table:
    """Lay out an ablation (`ablate.run_ablation`): by variant the mean over its seeds ± their standard deviation."""
    seeds = ", ".join(map(str, result["seeds"]))
    table = new_table(
        f"Ablation on {result['graph']}, {result['split']}, {result['model']}",
        caption=f"Mean ± standard deviation over seeds {seeds}; the same {result['budget']} for all. {ABLATION_LEGEND}",
    )
    table.add_column("variant")
    headings = {**WITH_INTERVALS, "answer_loss": "answer loss", "mrr_difference": "MRR − first"}
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, variant in result["variants"].items():
        cells = [_spread(variant["figures"][figure], "+" * (figure == "mrr_difference")) for figure in headings]
        table.add_row(Text(name), *map(Text, cells))
    return table


def _interval_table(title: str, caption: str) -> Table:
    table = new_table(title, caption=caption)
    table.add_column("model")
    for heading in METRICS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add_figures(table: Table, label: str, metrics: Mapping[str, float], intervals: Mapping[str, Any]) -> None:
    cells = [Text(f"{metrics['mr']:,.1f}")]
    cells += [_with_ends(f"{metrics[name]:.3f}", intervals[name], "") for name in WITH_INTERVALS]
    table.add_row(Text(label), *cells)


def _add_difference(table: Table, label: str, difference: Mapping[str, Any]) -> None:
    cells = []
    for name in WITH_INTERVALS:
        found = difference[name]
        is_sure = found["low"] > 0 or found["high"] < 0
        cells.append(_with_ends(f"{found['mean']:+.3f}{'*' * is_sure}", found, "+", style="bold" if is_sure else ""))
    table.add_row(Text(label, style="dim"), "", *cells)


def _with_ends(figure: str, interval: Mapping[str, float], sign: str, *, style: str = "") -> Text:
    """Write a figure and, below it, the ends of its interval."""
    ends = "…".join(f"{interval[end]:{sign}.3f}" for end in ("low", "high"))
    return Text.assemble((figure, style), "\n", (ends, "dim"))


def _spread(figure: Mapping[str, Any], sign: str) -> str:
    """Write a mean ± its standard deviation where there were several seeds; – where nothing was measured."""
    if figure["mean"] is None:
        return "–"
    deviation = "" if figure["deviation"] is None else f"±{figure['deviation']:.3f}"
    return f"{figure['mean']:{sign}.3f}{deviation}"


def _chosen(result: Mapping[str, Any]) -> str:
    valid = result["valid"]
    how = f"weight {result['weight']:g}, {result['normalisation']} over tokens" if result["weight"] else "weight 0"
    return (
        f"Chosen on valid ({valid['num_triples']:,} triples): {how}; valid MRR {valid['plain']['mrr']:.3f} → "
        f"{valid['reranked']['mrr']:.3f}. {result['share_listed']:.0%} of the answers are among the first {result['k']}. "
        "Below each figure its 95 % interval; *: the interval excludes 0."
    )
