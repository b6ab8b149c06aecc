"""The command line `kalm`: it reads arguments, calls the public functions of the package, prints the results.

Exit codes: 0 fine, 1 failed, 2 wrong usage or settings, 130 stopped by Ctrl-C.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pykalm
from pykalm import cli_compare, cli_measures, cli_qa, cli_report
from pykalm.cli_options import (
    AsJson,
    AskedSplit,
    Baseline,
    Device,
    OtherGraph,
    RunFolder,
    has_split,
    label_of,
    opened,
    other_graph,
    show_measured,
)
from pykalm.config import load_config, load_kept_config
from pykalm.errors import KalmError, RunError, UsageError
from pykalm.launch import launched_rank, num_launched
from pykalm.terminal import Watcher, print_json, print_table, report_failure, say, show_progress

if TYPE_CHECKING:
    from pykalm.api import LinkPredictionReport, StepReport

app = typer.Typer(
    help="Align an autoregressive language model with a knowledge graph, measure it, ask it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="List, fetch and check graphs.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Measure a run.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(evaluate_app, name="evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error that one can mend is shown as one message."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with_traceback = "--traceback" in arguments or os.environ.get("KALM_TRACEBACK", "0") not in ("", "0")
    try:
        with warnings.catch_warnings(), printed_by_main_only():
            if not with_traceback:
                # Warnings of libraries speak to programmers; what concerns the user, kalm says itself.
                warnings.simplefilter("ignore")
            app(args=arguments, prog_name="kalm")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 130
    except KalmError as error:
        if num_launched() == 1 or pykalm.may_report_failure():
            report_failure(error, expected=True, with_traceback=with_traceback)
        code = error.exit_code
    except BrokenPipeError:
        # The reader of stdout has gone, as in `kalm data list | head -1`; there is no one to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if num_launched() == 1 or pykalm.may_report_failure():
            report_failure(error, expected=False, with_traceback=with_traceback)
        code = 1
    if code == 130:
        with printed_by_main_only():
            say("kalm: stopped.")
    return code


@contextlib.contextmanager
def printed_by_main_only() -> Iterator[None]:
    """Of several processes let only the main one print; `main` lets the first that fails say why."""
    if launched_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        print(f"kalm {pykalm.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error happened (also KALM_TRACEBACK=1).")
    ] = False,
) -> None:
    """Take the options that stand before a command; `main` has read them."""


@data_app.command("list")
def list_data(as_json: AsJson = False) -> None:
    """List the graphs that have a name and where each lies."""
    entries = pykalm.list_data()
    if as_json:
        print_json([{"name": e.name, "what": e.summary, "folder": e.folder and str(e.folder)} for e in entries])
    else:
        print_table(pykalm.catalogue_table(entries))


@data_app.command("fetch")
def fetch_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a graph (`kalm data list`).")],
    to: Annotated[Path | None, typer.Option(help="Folder to put it in; the cache by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a graph, check its size and digest, and print its folder."""
    folder = pykalm.fetch_data(name, to)
    print_json({"name": name, "folder": str(folder)}) if as_json else print(folder)


@data_app.command("check")
def check_data(
    source: Annotated[str, typer.Argument(metavar="PATH", help="Name or folder of a graph.")],
    model: Annotated[str | None, typer.Option(help="Model whose tokenizer counts the texts that are cut.")] = None,
    max_entity_tokens: Annotated[int, typer.Option(min=1, help="Where an entity text is cut.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Count what a graph holds and what may be wrong with it. Exit code 1 where something should be mended."""
    check = pykalm.check_data(source, model=model, max_entity_tokens=max_entity_tokens)
    print_json(check.to_dict()) if as_json else print_table(pykalm.graph_check_table(check))
    if check.problems:
        raise typer.Exit(1)


@app.command()
def train(
    *,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run; made where there is none.")],
    graph: Annotated[str | None, typer.Option(help="Name or folder of a graph.")] = None,
    model: Annotated[str | None, typer.Option(help="Known name, hub id, local folder or GGUF file.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with settings.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory that training may take, such as 8GB (training.memory).")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run where it stopped.")] = False,
    as_json: AsJson = False,
) -> None:
    """Align a model with a graph. With --resume the settings are those of the run."""
    kept = out / "config.yaml"
    if resume and not kept.is_file():
        raise RunError(f"{out}: wanted a run to go on with, found no config.yaml. Start it without --resume.")
    given = (("graph", graph), ("model", model), ("training.memory", memory))
    # JSON is YAML too, and quotes every name that YAML would read otherwise.
    named = [f"{key}={json.dumps(value)}" for key, value in given if value]
    overrides = [*(overrides or []), *named]
    settings = load_kept_config(kept, overrides) if resume and config is None else load_config(config, overrides)
    if resume and pykalm.has_ended(out, config=settings):
        say(
            "No step is left: this training has ended (a longer one is a new run, with another --out). What it left is checked."
        )
    say(f"Reading {settings.graph} and {settings.model} ...")
    try:
        with show_progress("training") as watch:
            run = pykalm.train(
                out=out, config=settings, resume=resume, watch=watch_training(watch), progress=watch_texts(watch)
            )
    except KeyboardInterrupt:
        if not kept.is_file():
            say("Nothing is saved yet: begin again with the same command.")
        else:
            saved = (out / "state").is_dir()  # a second Ctrl-C does not wait for a save
            say(
                f"{'What was learned is saved. Go on' if saved else 'Nothing is saved yet. Begin again'} with: kalm train "
                f"--out {out} --resume"
            )
        raise
    say(f"The run is in {run.path}. Next: kalm evaluate links {run.path}")
    print_json({"run": str(run.path)}) if as_json else None


@evaluate_app.command("links")
def evaluate_links(
    folder: RunFolder,
    *,
    split: AskedSplit = None,
    baseline: Baseline = False,
    graph: OtherGraph = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many triples only, drawn by seed.")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Rank the true answer of every triple among all entities, in both directions (filtered)."""
    other = other_graph(graph)
    run = opened(folder, device, has_split(split, other))
    label = label_of(baseline)

    def measure() -> "LinkPredictionReport":
        with show_progress("evaluating") as watch:
            return pykalm.evaluate_links(run, split=split, baseline=baseline, graph=other, limit=limit, progress=watch)

    def by_relation(results: dict[str, dict[str, Any]]) -> object:
        return pykalm.relation_table(results[label])

    show_measured(folder, {label: measure}, by_relation, pykalm.link_prediction_table, as_json=as_json)


evaluate_app.command("qa")(cli_qa.evaluate_qa)


@app.command()
def predict(
    folder: RunFolder,
    *,
    relation: Annotated[str, typer.Option(help="Id or text of the relation.")],
    head: Annotated[str | None, typer.Option(help="Asks for the tail: id, name or free text.")] = None,
    tail: Annotated[str | None, typer.Option(help="Asks for the head: id, name or free text.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of answers.")] = 5,
    free_text: Annotated[
        bool, typer.Option("--free-text", help='An entity that the graph lacks, best as "name: description".')
    ] = False,
    hide_known: Annotated[bool, typer.Option("--hide-known", help="Leave known answers out.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer (head, relation, ?) or (?, relation, tail) with the most likely entities."""
    if (head is None) == (tail is None):
        found = "neither" if head is None else "both"
        raise UsageError(f"wanted one of --head and --tail, found {found}. The other one is what is asked.")
    entity = None if free_text else head or tail
    run = opened(folder, device, lambda _, graph: pykalm.require_names(graph, relation=relation, entity=entity))
    with show_progress("embedding") as watch:
        prediction = pykalm.predict(
            run,
            head=head,
            tail=tail,
            relation=relation,
            k=k,
            free_text=free_text,
            hide_known=hide_known,
            progress=watch,
        )
    print_json(prediction.to_dict()) if as_json else print_table(pykalm.prediction_table(prediction))


app.command("report")(cli_report.report)


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Train so many steps only.")] = None,
) -> None:
    """Do the main job on the bundled graph: measure, align, measure again, ask."""
    with show_progress("demo") as watch:
        pykalm.run_demo(out, steps=steps, watch=watch_training(watch), progress=watch)


@app.command()
def bench(
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file; bench/results.json, runs/bench-part.json with --only, runs/bench-quick.json with --quick.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small and short, on the bundled graph: does it work?")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="Some of train,utilisation,embed,rank,scaling; all by default.")
    ] = None,
    graphs: Annotated[str | None, typer.Option(help="Names or folders; the first is also embedded and ranked.")] = None,
    model: Annotated[str | None, typer.Option(help="Known name, hub id, local folder or GGUF file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU; PyTorch's choice by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Triples of a kalm step; suits the device.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds that count, after one that does not.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Start of every random generator.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Embed all entities, not a sample of them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast kalm is beside the published recipe and others, in one run on this machine."""
    # The short form shows no speed, and a part must not take the place of the whole.
    out = out or Path("runs/bench-quick.json" if quick else "runs/bench-part.json" if only else "bench/results.json")
    say(f"Measuring, for {out} ...")
    lists = {"only": only, "graphs": graphs}
    given = {name: tuple(filter(None, value.split(","))) if value else None for name, value in lists.items()}
    with show_progress("measuring") as watch:
        results = pykalm.run_bench(
            out=out, quick=quick, watch=watch, model=model, device=device, threads=threads, batch_size=batch_size,
            repeats=repeats, seed=seed, entities=0 if full else None, **given,
        )  # fmt: skip
    say(f"Saved in {out}")
    print_json(results) if as_json else print_table(pykalm.bench_table(results))


app.command()(cli_compare.compare)
app.command()(cli_compare.ablate)
evaluate_app.command("rerank")(cli_compare.evaluate_rerank)
evaluate_app.command("language")(cli_measures.evaluate_language)
evaluate_app.command("geometry")(cli_measures.evaluate_geometry)


def watch_training(watch: Watcher) -> "Callable[[StepReport], None]":
    """Turn reports of steps into progress; every evaluation is a line that stays."""

    def report_step(report: "StepReport") -> None:
        watch(report.step, report.num_steps, describe_step(report))
        if report.valid_mrr is not None:
            say(f"step {report.step}/{report.num_steps}: valid MRR {report.valid_mrr:.3f}, {describe_step(report)}")

    return report_step


def watch_texts(watch: Watcher) -> Callable[[int, int], None]:
    """Turn reports of the base model's own texts into progress."""
    return lambda done, total: watch(done, total, "the base model's own texts")


def describe_step(report: "StepReport") -> str:
    """Write the parts of a step's report that people watch."""
    kl = f", KL {report.kl:.3f}" if report.kl else ""
    return (
        f"epoch {report.epoch:.2f}, loss {report.loss:.3f} (explicit {report.explicit:.3f}, implicit"
        f" {report.implicit:.3f}{kl}), τ {report.temperature:.4f}, {report.examples_per_second:.1f} examples/s,"
        f" {report.tokens_per_second:.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
