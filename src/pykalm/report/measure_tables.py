"""Tables of language and geometry for a terminal; they take the plain data that the results files hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pykalm.report.tables import new_table

MEASURES = {
    "num_vectors": ("vectors", "{:,}"),
    "alignment": ("alignment", "{:.3f}"),
    "uniformity": ("uniformity", "{:.3f}"),
    "mean_cosine": ("mean cosine", "{:.3f}"),
    "top_eigenvalue_share": ("top share", "{:.3f}"),
    "effective_rank": ("eff. rank", "{:.1f}"),
}


def language_table(results: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Lay out perplexities and the results of tasks (`LanguageReport.to_dict`) by label, such as unaligned and aligned."""
    first = next(iter(results.values()))
    tables = []
    if any(result["perplexity"] for result in results.values()):
        headings: Sequence[str] = ("text", "model", "per word", "per token", "per byte", "tokens", "window", "stride")
        tables.append(_table("Perplexity", headings, _perplexity_rows(results), caption=first["protocol"], texts=2))
    if any(_tasks(result) for result in results.values()):
        headings = ("task", "model", "metric", "value", "±", "questions", "shots")
        tables.append(_table("Tasks of lm-eval", headings, _task_rows(results), caption=first["protocol"], texts=3))
    return Group(*tables)


def geometry_table(results: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Lay out the geometry of each group of vectors and Theorem 1 (`GeometryReport.to_dict`) by label."""
    first = next(iter(results.values()))
    names = list(dict.fromkeys(name for result in results.values() for name in result["groups"]))
    rows = [
        (name, label, *(_cell(result["groups"][name][key], form) for key, (_, form) in MEASURES.items()))
        for name in names
        for label, result in results.items()
        if name in result["groups"]
    ]
    headings = ("vectors of", "model", *(heading for heading, _ in MEASURES.values()))
    title = f"Geometry on {first['graph']}, {first['split']}"
    curves = {label: result["theorem_1"] for label, result in results.items()}
    limits = [
        (label, f"{curve['num_negatives'][-1]:,}", f"{curve['normalised_loss'][-1]:.3f}", f"{curve['limit']:.3f}",
         f"{curve['temperature']:.4f}")
        for label, curve in curves.items()
    ]  # fmt: skip
    theorem = _table("Theorem 1", ("model", "N", "L_exp − log N", "limit", "τ"), limits, texts=1)
    return Group(_table(title, headings, rows, caption=first["protocol"], texts=2), theorem)


def _perplexity_rows(results: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    texts = dict.fromkeys(name for result in results.values() for name in result["perplexity"])
    return [
        (text, label, *(_cell(found[unit], "{:,.3f}") for unit in ("word", "token", "byte")),
         *(f"{found[key]:,}" for key in ("num_tokens", "window", "stride")))
        for text in texts
        for label, result in results.items()
        if (found := result["perplexity"].get(text))
    ]  # fmt: skip


def _tasks(result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result["lm_eval"], **result["lm_eval_other"]}


def _task_rows(results: Mapping[str, Mapping[str, Any]]) -> list[Sequence[str]]:
    """Return a row for each metric that is no error of another one, of the tasks that were asked for."""
    rows: list[Sequence[str]] = []
    for task in dict.fromkeys(name for result in results.values() for name in _tasks(result)):
        for label, result in results.items():
            found = _tasks(result).get(task, {"metrics": {}})
            for metric, value in found["metrics"].items():
                if not metric.partition(",")[0].endswith("_stderr"):
                    name, comma, kind = metric.partition(",")
                    error = _cell(found["metrics"].get(f"{name}_stderr{comma}{kind}"), "{:.4f}")
                    counts = (f"{found[key]:,}" for key in ("num_questions", "shots"))
                    rows.append((task, label, metric, f"{value:.4f}", error, *counts))
    return rows


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int, caption: str | None = None
) -> Table:
    """Return a table whose first columns are texts and whose others are numbers."""
    table = new_table(title, caption=caption)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < texts else "right", no_wrap=place >= texts)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
