"""The report page: every section of a run in one HTML file that needs no network and no script."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import jinja2

from pykalm.report.blocks import Section
from pykalm.report.run_files import RunFiles
from pykalm.report.sections.geometry import similarity_section, spectrum_section, theorem_section
from pykalm.report.sections.headline import headlines
from pykalm.report.sections.language import language_section
from pykalm.report.sections.links import links_section
from pykalm.report.sections.origin import origin_section, settings_section
from pykalm.report.sections.questions import cases_section, questions_section
from pykalm.report.sections.ranks import ranks_section, relations_section, rerank_section
from pykalm.report.sections.training import training_section

UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
SECTIONS = (
    training_section,
    links_section,
    relations_section,
    ranks_section,
    rerank_section,
    questions_section,
    cases_section,
    language_section,
    similarity_section,
    spectrum_section,
    theorem_section,
    settings_section,
    origin_section,
)


def build_sections(run: RunFiles) -> Iterator[Section]:
    """Yield the sections of the page in order, one at a time, since drawing takes its time."""
    return (section(run) for section in SECTIONS)


def render_page(run: RunFiles, sections: Sequence[Section], *, written: datetime, version: str) -> str:
    """Put the sections of a run into the page and return its HTML."""
    model, graph = (_short(run.settings.get(key)) for key in ("model", "graph"))
    name = f"{model or 'A language model'} aligned with {graph or 'a graph'}"
    text: str = _template().render(
        title=name,
        run=str(run.path),
        written=f"{written.day} {written:%B %Y, %H:%M}",
        machine_date=written.isoformat(timespec="minutes"),
        version=version,
        seed=run.settings.get("seed"),
        headlines=headlines(run),
        sections=sections,
        problems=run.problems,
        css=_resource("page.css"),
    )
    return text


@cache
def _template() -> jinja2.Template:
    """Read the template; whatever is put into it is escaped, and a name that it does not know is an error."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    return environment.from_string(_resource("page.html.j2"))


def _resource(name: str) -> str:
    return files("pykalm.report").joinpath(name).read_text(encoding="utf-8")


def _visible(value: Any) -> Any:
    """Put a sign in the place of characters that no HTML file may hold."""
    return UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _short(source: Any) -> str:
    """Return the last part of a model's or graph's name, which may be a folder."""
    return PurePath(str(source)).name if source else ""
