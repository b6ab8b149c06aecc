"""The table of question answering for a terminal: a model beside the baselines that have none."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from pykalm.report.tables import new_table

COLUMNS = {"exact": "exact", "contains": "contains", "any_valid": "any valid"}
Row = tuple[str, Mapping[str, float]]


def qa_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay out results of question answering (`QaReport.to_dict`) by label, such as unaligned and aligned: shares in %."""
    first = next(iter(results.values()))
    table = new_table(f"Questions about {first['graph']}, {first['split']}", caption=str(first["protocol"]))
    table.add_column("task")
    table.add_column("answered by", no_wrap=True)
    for heading in ("questions", *COLUMNS.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, name in _tasks(results):
        table.add_section()
        shown = {label: _find(result, task) for label, result in results.items() if _find(result, task)}
        for position, (system, shares) in enumerate(_rows(shown)):
            is_model = system in shown
            count = f"{shares['num_questions']:,}" if "num_questions" in shares else ""
            cells = [system, count, *(_percent(shares.get(measure)) for measure in COLUMNS)]
            table.add_row(
                Text(name if position == 0 else ""), *(Text(c, style="bold" if is_model else "") for c in cells)
            )
    return table


def _tasks(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield where the results of a task, or of classification against hard negatives, stand, and what it is called."""
    names = dict.fromkeys(task for result in results.values() for task in result["tasks"])
    for task in names:
        yield (task,), task
        if any("hard" in result["tasks"].get(task, {}) for result in results.values()):
            yield (task, "hard"), f"{task}, hard"


def _find(result: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = result["tasks"].get(path[0], {})
    by_score = found.get("by_score", {}).get("hard" if len(path) > 1 else "random")
    found = found.get(path[1], {}) if len(path) > 1 else found
    return {**found, "by_score": by_score} if found else {}


def _rows(shown: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yield every model's row, what it does by ranks and by scores, and the baselines, which are the same for all."""
    for label, result in shown.items():
        yield label, result
        if ranked := result.get("ranked"):
            best = {name: share for name, share in ranked.items() if name.startswith("hits")}
            for name, share in best.items():
                yield f"{label}, {name.replace('hits_at_', 'ranked hits@')}", {"any_valid": share}
        if by_score := result.get("by_score"):
            yield f"{label}, by link score", {"exact": by_score["accuracy"]}
    yield from next(iter(shown.values()))["baselines"].items()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
