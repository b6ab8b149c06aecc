"""The command line `kalm`: it reads arguments, calls the public functions of the package, prints the results.

Exit codes: 0 fine, 1 failed, 2 wrong usage or settings, 130 stopped by Ctrl-C.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import pykalm
from pykalm.config import load_config
from pykalm.errors import KalmError, UsageError
from pykalm.terminal import print_json, print_table, report_failure, say, show_progress

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

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that `kalm train` wrote.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error that one can mend is shown as one message."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with_traceback = "--traceback" in arguments or os.environ.get("KALM_TRACEBACK", "0") not in ("", "0")
    try:
        app(args=arguments, prog_name="kalm")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 130
    except KalmError as error:
        report_failure(error, expected=True, with_traceback=with_traceback)
        code = error.exit_code
    except BrokenPipeError:
        # The reader of stdout has gone, as in `kalm data list | head -1`; there is no one to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        report_failure(error, expected=False, with_traceback=with_traceback)
        code = 1
    if code == 130:
        say("kalm: stopped.")
    return code


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
        print_json([to_json(entry) for entry in entries])
        return
    table = Table("graph", "where", "what")
    for entry in entries:
        table.add_row(entry.name, str(entry.folder or f"kalm data fetch {entry.name}"), entry.summary)
    print_table(table)


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
    model: Annotated[str | None, typer.Option(help="Model whose tokenizer counts the texts that would be cut.")] = None,
    max_entity_tokens: Annotated[int, typer.Option(help="Where an entity text is cut.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Count what a graph holds and what may be wrong with it."""
    check = pykalm.check_data(source, model=model, max_entity_tokens=max_entity_tokens)
    print_json(to_json(check)) if as_json else print(check)


@app.command()
def train(
    *,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run; made where there is none.")],
    graph: Annotated[str | None, typer.Option(help="Name or folder of a graph.")] = None,
    model: Annotated[str | None, typer.Option(help="Known name, hub id, local folder or GGUF file.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with settings.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run where it stopped.")] = False,
    as_json: AsJson = False,
) -> None:
    """Align a model with a graph. With --resume the settings of the run are taken over."""
    kept = out / "config.yaml"
    file = kept if resume and config is None and kept.exists() else config
    # JSON is YAML too, and quotes every name that YAML would read otherwise.
    named = [f"{key}={json.dumps(value)}" for key, value in (("graph", graph), ("model", model)) if value]
    settings = load_config(file, [*(overrides or []), *named])
    with show_progress("training") as watch:
        run = pykalm.train(
            settings.graph,
            out=out,
            model=settings.model,
            config=settings,
            resume=resume,
            watch=lambda report: watch(report.step, report.num_steps, describe_step(report)),
        )
    say(f"The run is in {run.path}. Next: kalm evaluate links {run.path}")
    print_json({"run": str(run.path)}) if as_json else None


@evaluate_app.command("links")
def evaluate_links(
    folder: RunFolder,
    *,
    split: Annotated[str, typer.Option(help="Split whose triples are asked: test or valid.")] = "test",
    baseline: Annotated[bool, typer.Option("--baseline", help="Measure the unaligned model.")] = False,
    graph: Annotated[
        str | None, typer.Option(help="Another graph, of which the run may know no entity (inductive).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many triples only, drawn by seed.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Rank the true answer of every triple among all entities, in both directions (filtered)."""
    run = pykalm.load_run(folder, device=device)
    with show_progress("evaluating") as watch:
        report = pykalm.evaluate_links(run, split=split, baseline=baseline, graph=graph, limit=limit, progress=watch)
    print_json(report.to_dict()) if as_json else print(report)


@app.command()
def predict(
    folder: RunFolder,
    *,
    relation: Annotated[str, typer.Option(help="Id or text of the relation.")],
    head: Annotated[str | None, typer.Option(help="Asks for the tail: id, name or free text.")] = None,
    tail: Annotated[str | None, typer.Option(help="Asks for the head: id, name or free text.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of answers.")] = 5,
    free_text: Annotated[
        bool, typer.Option("--free-text", help="Take the text as it is: an entity that the graph lacks.")
    ] = False,
    hide_known: Annotated[bool, typer.Option("--hide-known", help="Leave known answers out.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer (head, relation, ?) or (?, relation, tail) with the most likely entities."""
    if (head is None) == (tail is None):
        found = "neither" if head is None else "both"
        raise UsageError(f"wanted one of --head and --tail, found {found}. The other one is what is asked.")
    run = pykalm.load_run(folder, device=device)
    prediction = pykalm.predict(
        run, head=head, tail=tail, relation=relation, k=k, free_text=free_text, hide_known=hide_known
    )
    print_json(to_json(prediction)) if as_json else print(prediction)


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Train so many steps only.")] = None,
) -> None:
    """Do the main job on the bundled graph: measure, align, measure again, ask."""
    with show_progress("training") as watch:
        pykalm.run_demo(
            out,
            steps=steps,
            watch=lambda report: watch(report.step, report.num_steps, describe_step(report)),
        )


def describe_step(report: "pykalm.api.StepReport") -> str:
    """Write the parts of a step's report that people watch."""
    parts = [
        f"epoch {report.epoch:.2f}",
        f"loss {report.loss:.3f} (explicit {report.explicit:.3f}, implicit {report.implicit:.3f})",
        f"τ {report.temperature:.4f}",
        f"{report.examples_per_second:.1f} examples/s",
        f"{report.tokens_per_second:.0f} tokens/s",
    ]
    return ", ".join(parts + ([f"valid MRR {report.valid_mrr:.3f}"] if report.valid_mrr is not None else []))


def to_json(value: Any) -> Any:
    """Turn a dataclass into plain values for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(value), default=str))


if __name__ == "__main__":
    sys.exit(main())
