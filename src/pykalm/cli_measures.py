"""The commands `kalm evaluate language` and `kalm evaluate geometry`."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pykalm
from pykalm.cli_options import AsJson, Baseline, Device, RunFolder, has_split, label_of, listed, opened, show_measured
from pykalm.terminal import say, show_progress

if TYPE_CHECKING:
    from pykalm.api_geometry import GeometryReport
    from pykalm.api_language import LanguageReport

Both = Annotated[bool, typer.Option("--both", help="Measure the unaligned model, then the aligned one.")]


def evaluate_language(
    folder: RunFolder,
    *,
    text: Annotated[
        str | None,
        typer.Option(
            help="Some of wikitext2,wikitext103 or paths of text files; wikitext2 where no task is asked for."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, as mmlu,arc_easy; MMLU is taken from $KALM_DATA if it is there."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that are read at once; 1024, or as many as the model has positions."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a window counts; all of it by default.")
    ] = None,
    limit_tokens: Annotated[
        int | None, typer.Option(min=1, help="Read so many tokens of each text only, from its beginning.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many questions of each task only.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question; as the task says.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that a task reads at once.")] = 4,
    baseline: Baseline = False,
    both: Both = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure what is left of the language: perplexity on plain texts, and any task of lm-eval."""
    run = opened(folder, device)

    def measure(is_baseline: bool) -> "LanguageReport":
        with show_progress("reading") as watch:
            return pykalm.evaluate_language(
                run, texts=listed(text), tasks=listed(tasks), window=window, stride=stride, limit_tokens=limit_tokens,
                limit=limit, shots=shots, batch_size=batch_size, baseline=is_baseline, progress=watch,
            )  # fmt: skip

    show_measured(folder, _models(measure, baseline=baseline, both=both), pykalm.language_table, as_json=as_json)


def evaluate_geometry(
    folder: RunFolder,
    *,
    split: Annotated[
        str | None, typer.Option(help="Split whose triples are the pairs; evaluation.split of the run by default.")
    ] = None,
    sentences: Annotated[
        str, typer.Option(help="wikitext103, wikitext2 or a text file, from which plain sentences are drawn.")
    ] = "wikitext103",
    limit: Annotated[
        int | None, typer.Option(min=2, help="Take so many entities, queries and sentences only, drawn by seed.")
    ] = None,
    baseline: Baseline = False,
    both: Both = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure how the vectors of queries, candidates and plain sentences lie, and Theorem 1."""
    run = opened(folder, device, has_split(split))

    def measure(is_baseline: bool) -> "GeometryReport":
        with show_progress("measuring") as watch:
            return pykalm.evaluate_geometry(
                run, split=split, sentences=sentences, limit=limit, baseline=is_baseline, progress=watch
            )

    show_measured(folder, _models(measure, baseline=baseline, both=both), pykalm.geometry_table, as_json=as_json)
    say(f"Drawn by: kalm report {folder}")


def _models(measure: Callable[[bool], Any], *, baseline: bool, both: bool) -> dict[str, Callable[[], Any]]:
    """Return what measures the models that were asked for, by label; the unaligned one first."""
    return {label_of(one): partial(measure, one) for one in ((True, False) if both else (baseline,))}
