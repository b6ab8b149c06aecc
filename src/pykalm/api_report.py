"""The report of a run for people: one page and its figures, made from the files of the run alone."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from pykalm.errors import RunError
from pykalm.files import replace_file
from pykalm.report.blocks import Section
from pykalm.report.page import SECTIONS, build_sections, render_page
from pykalm.report.run_files import read_run_files
from pykalm.report.sections.origin import installed_version

PAGE = Path("report") / "index.html"
FIGURES = Path("report") / "figures"


@dataclass(frozen=True)
class WrittenReport:
    """Say where the page and its figures lie, and name the files that could not be read for it."""

    page: Path
    figures: tuple[Path, ...]
    problems: tuple[str, ...]

    def require_whole(self) -> None:
        """Raise RunError where a file of the run could not be read; the page is written all the same."""
        if self.problems:
            count = "a file" if len(self.problems) == 1 else f"{len(self.problems)} files"
            raise RunError(
                "\n  ".join([f"{self.page}: written, but without {count} that cannot be read:", *self.problems])
            )


def write_report(run: str | Path, *, progress: Callable[[int, int], object] | None = None) -> WrittenReport:
    """Write RUN/report/index.html and its figures as SVG and PNG files, from what has been measured of the run so far.

    No model is loaded. What was not measured is said on the page, with the command that measures it; a damaged file is
    named there and among the problems of the result. progress is told of (sections done, all). Raises RunError where there
    is no run, TrainingError where the page cannot be written.
    """
    path = Path(run)
    files = read_run_files(path)
    sections: list[Section] = []
    figures: list[Path] = []
    for section in build_sections(files):
        sections.append(section)
        figures += _write_figures(section, path / FIGURES)
        if progress is not None:
            progress(len(sections), len(SECTIONS))
    html = render_page(files, sections, written=datetime.now().astimezone(), version=installed_version("pykalm"))
    replace_file(path / PAGE, partial(_write, content=html.encode("utf-8")))
    return WrittenReport(path / PAGE, tuple(figures), tuple(files.problems))


def _write_figures(section: Section, folder: Path) -> list[Path]:
    """Write the drawings of a section and return their files."""
    written = []
    for drawing in section.drawings():
        for ending, content in (("svg", drawing.svg.encode("utf-8")), ("png", drawing.png)):
            written.append(folder / f"{drawing.name}.{ending}")
            replace_file(written[-1], partial(_write, content=content))
    return written


def _write(path: Path, *, content: bytes) -> None:
    path.write_bytes(content)
