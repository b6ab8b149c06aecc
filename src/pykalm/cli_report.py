"""The command `kalm report`: it writes the page of a run and says where it is."""

import webbrowser
from typing import Annotated

import typer

import pykalm
from pykalm.cli_options import RunFolder
from pykalm.terminal import print_json, say, show_progress


def report(
    folder: RunFolder,
    *,
    is_opened: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs instead of the page's path.")
    ] = False,
) -> None:
    """Write one page with everything that was measured of a run, and print its path. No model is loaded."""
    with show_progress("drawing") as watch:
        written = pykalm.write_report(folder, progress=watch)
    if as_json:
        print_json(
            {
                "page": str(written.page),
                "figures": [str(figure) for figure in written.figures],
                "problems": list(written.problems),
            }
        )
    else:
        typer.echo(written.page)
    if is_opened and not webbrowser.open(written.page.resolve().as_uri()):
        say("No browser was found: open the page by hand.")
    written.require_whole()
