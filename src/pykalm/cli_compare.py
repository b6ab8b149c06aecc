"""Commands that compare: runs with each other, an order with its re-ranking, one setting with another."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pykalm
from pykalm.cli_options import AsJson, AskedSplit, Device, RunFolder, has_split, listed, opened, show_measured
from pykalm.config import load_config
from pykalm.errors import UsageError
from pykalm.terminal import print_json, print_table, say, show_progress

if TYPE_CHECKING:
    from pykalm.evaluate.rerank_report import RerankReport


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; the first is the measure.")],
    *,
    split: Annotated[str, typer.Option(help="Split whose saved ranks are compared.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Compare what was measured with this --limit.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Add the unaligned model of the first run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare what `kalm evaluate links` has saved, with 95 % intervals and differences to the first run."""
    result = pykalm.compare_runs(folders, split=split, limit=limit, baseline=baseline)
    print_json(result) if as_json else print_table(pykalm.comparison_table(result))


def evaluate_rerank(
    folder: RunFolder,
    *,
    k: Annotated[int, typer.Option("--k", "-k", min=2, help="Answers of each question that are read again.")] = 20,
    split: AskedSplit = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many triples only, drawn by seed.")] = None,
    valid_limit: Annotated[
        int, typer.Option(min=1, help="Valid triples, drawn by seed, on which the weight is chosen.")
    ] = 500,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Re-rank the best answers by how likely the language model writes them; the weight is chosen on valid."""
    run = opened(folder, device, has_split(split))

    def measure() -> "RerankReport":
        with show_progress("reading answers") as watch:
            return pykalm.evaluate_rerank(run, k=k, split=split, limit=limit, valid_limit=valid_limit, progress=watch)

    show_measured(
        folder, {"reranked": measure}, lambda results: pykalm.rerank_table(results["reranked"]), as_json=as_json
    )


def ablate(
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs, one for each variant and seed.")],
    graph: Annotated[str | None, typer.Option(help="Name or folder of a graph.")] = None,
    model: Annotated[str | None, typer.Option(help="Known name, hub id, local folder or GGUF file.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with settings that all share.")] = None,
    variants: Annotated[
        str | None, typer.Option(help="Names, with commas between them (docs/compare.md); the first is compared with.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Numbers, with commas between them.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of every run (training.max_steps).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting that all share; may be repeated.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split whose figures are summed up: test or valid.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Train and measure variants of the method with the same budget. Goes on where it was stopped."""
    named = [f"{key}={json.dumps(value)}" for key, value in (("graph", graph), ("model", model)) if value]
    shared = load_config(config, [*(overrides or []), *named])
    names = None if variants is None else listed(variants)
    with show_progress("ablation") as watch:
        result = pykalm.run_ablation(
            out=out,
            config=shared,
            variants=names,
            seeds=_numbers(seeds),
            steps=steps,
            split=split,
            watch=lambda report: watch(report.step, report.num_steps, f"loss {report.loss:.3f}"),
            progress=watch,
        )
    say(f"Saved in {out / 'ablation.json'}")
    print_json(result) if as_json else print_table(pykalm.ablation_table(result))


def _numbers(text: str) -> list[int]:
    """Read numbers with commas between them; raises UsageError for anything else."""
    parts = listed(text)
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--seeds: wanted numbers with commas between them, as in 0,1,2; found {text!r}.")
    return [int(part) for part in parts]
