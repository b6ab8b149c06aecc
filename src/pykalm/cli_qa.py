"""The command `kalm evaluate qa`: questions put to a run as text."""

from pathlib import Path
from typing import Annotated

import typer

import pykalm
from pykalm.terminal import print_json, print_table, say, show_progress


def evaluate_qa(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that `kalm train` wrote.")],
    *,
    tasks: Annotated[
        str, typer.Option(help="Some of tail,head,relation,classification.")
    ] = "tail,head,relation,classification",
    shots: Annotated[int, typer.Option(min=0, help="Solved examples from train before every question.")] = 0,
    descriptions: Annotated[
        bool, typer.Option("--descriptions", help="Let entities stand with their descriptions.")
    ] = False,
    constrained: Annotated[
        bool, typer.Option("--constrained", help="Force answers onto the names of entities, relations, or yes and no.")
    ] = False,
    ranked: Annotated[
        int, typer.Option(metavar="K", min=0, help="Also find the K likeliest choices, and report hits@k.")
    ] = 0,
    wording: Annotated[
        str, typer.Option(help="published, or run: ask for tails and heads as the run was trained to answer.")
    ] = "published",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 32,
    split: Annotated[
        str | None, typer.Option(help="Split whose triples are asked; evaluation.split of the run by default.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Measure the unaligned model.")] = False,
    graph: Annotated[
        str | None, typer.Option(help="Another graph, of which the run may know no entity (inductive).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about so many triples only, drawn by seed.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps; that of the run by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")] = False,
) -> None:
    """Let the model answer questions about triples in words, beside baselines without any model.

    Interrupted, it goes on where it stopped when it is called again.
    """
    run = pykalm.load_run(folder, device=device)
    unsaved = None
    try:
        with show_progress("asking") as watch:
            report = pykalm.evaluate_qa(
                run, tasks=tuple(filter(None, tasks.split(","))), shots=shots, descriptions=descriptions,
                constrained=constrained, ranked=ranked, wording=wording, max_new_tokens=max_new_tokens, split=split,
                baseline=baseline, graph=graph, limit=limit, progress=watch,
            )  # fmt: skip
    except KeyboardInterrupt:
        say("What was answered is kept. Go on with the same command.")
        raise
    except pykalm.UnsavedReport as error:
        report, unsaved = error.report, error
    result = report.to_dict()
    say(f"Saved in {folder / 'results'}") if unsaved is None else None
    print_json(result) if as_json else print_table(pykalm.qa_table({"unaligned" if baseline else "aligned": result}))
    if unsaved is not None:
        raise unsaved
