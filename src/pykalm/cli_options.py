"""Options that several commands have, and what all commands do that measure: print, then say what could not be saved."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pykalm
from pykalm.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from pykalm.config import Config
    from pykalm.graph.graph import KnowledgeGraph
    from pykalm.model.run import Run

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that `kalm train` wrote.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps; that of the run by default.")]
Baseline = Annotated[bool, typer.Option("--baseline", help="Measure the unaligned model.")]
AskedSplit = Annotated[
    str | None, typer.Option(help="Split whose triples are asked; evaluation.split of the run by default.")
]
OtherGraph = Annotated[str | None, typer.Option(help="Another graph, of which the run may know no entity (inductive).")]


def listed(names: str | None) -> tuple[str, ...]:
    """Return the names of a list with commas."""
    return tuple(name.strip() for name in (names or "").split(",") if name.strip())


Check = Callable[["Config", "KnowledgeGraph"], None]


def opened(folder: Path, device: str | None, check: Check | None = None) -> "Run":
    """Return the run of a folder; what takes some seconds is said before, and what is wrong with a question before these."""
    say(f"Reading {folder}: its graph, base model and learned weights ...")
    return pykalm.load_run(folder, device=device, check=check)


def other_graph(source: str | None) -> "KnowledgeGraph | None":
    """Return the graph that --graph names."""
    return None if source is None else pykalm.load_graph(source)


def has_split(split: str | None, other: "KnowledgeGraph | None" = None) -> Check:
    """Return the check that the graph of a run, or the other one that is asked about, has triples in a split."""
    return lambda config, own: pykalm.require_split(own if other is None else other, config, split)


def label_of(is_baseline: bool) -> str:
    """Return the row label of a model in the tables."""
    return "unaligned" if is_baseline else "aligned"


def show_measured(
    folder: Path,
    measures: Mapping[str, Callable[[], Any]],
    *tables: Callable[[dict[str, dict[str, Any]]], object],
    as_json: bool,
) -> None:
    """Measure each labelled model, print all results, and only then say it where RUN/results could not be written.

    tables: each makes a table of the plain data by label. JSON is that of the one report, or by label where there are several.
    """
    results, unsaved = {}, None
    for label, measure in measures.items():
        try:
            report = measure()
        except pykalm.UnsavedReport as error:
            report, unsaved = error.report, error
        results[label] = report.to_dict()
    say(f"Saved in {folder / 'results'}") if unsaved is None else None
    if as_json:
        print_json(results if len(results) > 1 else next(iter(results.values())))
    else:
        for table in tables:
            print_table(table(results))
    if unsaved is not None:
        raise unsaved
