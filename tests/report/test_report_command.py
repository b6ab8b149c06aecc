"""`kalm report`: where its page is goes to stdout, what is wrong to stderr; nothing heavy is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pykalm import cli, cli_report
from tests.report.sample_run import write_bare_run


def test_the_path_of_the_page_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_bare_run(tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr() == (f"{run / 'report' / 'index.html'}\n", "")
    assert (run / "report" / "index.html").is_file()


def test_json_names_page_figures_and_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_bare_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"page": str(run / "report" / "index.html"), "figures": [], "problems": []}


def test_a_damaged_file_ends_with_one_after_the_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_bare_run(tmp_path / "run")
    (run / "results").mkdir()
    (run / "results" / "rerank.json").write_text("{", encoding="utf-8")
    assert cli.main(["report", str(run)]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{run / 'report' / 'index.html'}\n"
    assert "written, but without a file that cannot be read" in printed.err
    assert f"Make it again: kalm evaluate rerank {run}" in printed.err
    assert "rerank.json" in (run / "report" / "index.html").read_text(encoding="utf-8")


def test_a_folder_that_is_no_run_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "wanted a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [True, False])
def test_open_shows_the_page_in_the_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_there: bool
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(cli_report.webbrowser, "open", lambda address: opened.append(address) or is_there)
    run = write_bare_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--open"]) == 0
    assert opened == [(run / "report" / "index.html").as_uri()]
    assert ("No browser was found" in capsys.readouterr().err) is not is_there


def test_a_report_loads_no_torch(tmp_path: Path) -> None:
    run = write_bare_run(tmp_path / "run")
    code = f"import sys; from pykalm import cli; cli.main(['report', {str(run)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
