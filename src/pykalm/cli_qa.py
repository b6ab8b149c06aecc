"""The command `kalm evaluate qa`: questions put to a run as text."""

from typing import TYPE_CHECKING, Annotated

import typer

import pykalm
from pykalm.cli_options import (
    AsJson,
    AskedSplit,
    Baseline,
    Device,
    OtherGraph,
    RunFolder,
    has_split,
    label_of,
    listed,
    opened,
    other_graph,
    show_measured,
)
from pykalm.terminal import say, show_progress

if TYPE_CHECKING:
    from pykalm.api_qa import QaReport


def evaluate_qa(
    folder: RunFolder,
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
    split: AskedSplit = None,
    baseline: Baseline = False,
    graph: OtherGraph = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask about so many triples only, drawn by seed.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Let the model answer questions about triples in words, beside baselines without any model.

    Interrupted, it goes on where it stopped when it is called again.
    """
    other = other_graph(graph)
    run = opened(folder, device, has_split(split, other))

    def measure() -> "QaReport":
        with show_progress("asking") as watch:
            return pykalm.evaluate_qa(
                run, tasks=listed(tasks), shots=shots, descriptions=descriptions,
                constrained=constrained, ranked=ranked, wording=wording, max_new_tokens=max_new_tokens, split=split,
                baseline=baseline, graph=other, limit=limit, progress=watch,
            )  # fmt: skip

    try:
        show_measured(folder, {label_of(baseline): measure}, pykalm.qa_table, as_json=as_json)
    except KeyboardInterrupt:
        say("What was answered is kept. Go on with the same command.")
        raise
