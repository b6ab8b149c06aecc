"""Reports that are written once for all tests that look at them."""

import shutil
from pathlib import Path

import pytest

from pykalm.api_report import WrittenReport, write_report
from pykalm.report import charts
from pykalm.report.drawing import Drawing
from tests.report.sample_run import write_bare_run, write_full_run


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> WrittenReport:
    """Return the report of a run of which everything was measured, on a graph whose names hold HTML and formulas."""
    return write_report(write_full_run(tmp_path_factory.mktemp("hostile"), is_hostile=True))


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> WrittenReport:
    """Return the report of a run that has settings and nothing else."""
    return write_report(write_bare_run(tmp_path_factory.mktemp("bare")))


@pytest.fixture(scope="session")
def full_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of which everything was measured; not to be changed."""
    return write_full_run(tmp_path_factory.mktemp("full"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave every figure blank: drawing takes the most time, and some claims are not about it."""
    monkeypatch.setattr(charts, "draw", lambda name, title, paint, **options: Drawing(name, "", "", b""))


@pytest.fixture
def full(full_files: Path, tmp_path: Path) -> Path:
    """Return a run of which everything was measured, to be damaged."""
    return shutil.copytree(full_files, tmp_path / "run")
