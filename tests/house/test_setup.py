"""Claims about scripts/setup, with a stand-in for Python that records what it is asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Plays Python and pip: the version and a missing venv module are chosen by files beside it.
PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
    *version_info*) [ ! -f "$here/is-old" ] ;;
    --version) echo "Python 3.$([ -f "$here/is-old" ] && echo 8 || echo 12).0" ;;
    *ensurepip*) [ ! -f "$here/no-venv" ] ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) echo "$*" >>pip.log; [ ! -f fail ] || ! grep -q "$(cat fail)" pip.log ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path, repository: Path) -> Path:
    """Make a folder with the files that setting up reads, and a stand-in for Python."""
    folder = tmp_path / "a clone"
    shutil.copytree(repository / "scripts", folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, folder / name)
    python = folder / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    return folder


def set_up(clone: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{clone / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    environment = {"PATH": path, "PYTHON": str(clone / "bin" / "python3"), **variables}
    return subprocess.run(
        ["sh", str(clone / "scripts" / "setup")], env=environment, capture_output=True, text=True, check=False
    )


def installs(clone: Path) -> list[str]:
    log = clone / "pip.log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def test_torch_is_installed_first_and_all_under_constraints(clone: Path) -> None:
    assert set_up(clone).returncode == 0
    lines = installs(clone)
    assert lines[0].endswith("-c constraints.txt torch")
    assert "-e .[dev]" in lines[1]
    assert all("-c constraints.txt" in line for line in lines)


def test_a_second_run_installs_nothing(clone: Path) -> None:
    set_up(clone)
    count = len(installs(clone))
    again = set_up(clone)
    assert (again.returncode, again.stdout, again.stderr, len(installs(clone))) == (0, "", "", count)


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(clone: Path, changed: str) -> None:
    set_up(clone)
    count = len(installs(clone))
    with (clone / changed).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert set_up(clone).returncode == 0
    assert len(installs(clone)) == 2 * count


def test_an_interrupted_set_up_is_done_again(clone: Path) -> None:
    (clone / "fail").write_text("dev", encoding="utf-8")
    broken = set_up(clone)
    assert broken.returncode == 1
    assert "could not install" in broken.stderr
    (clone / "fail").unlink()
    assert set_up(clone).returncode == 0
    assert "-e .[dev]" in installs(clone)[-1]


def test_a_moved_clone_is_set_up_again(clone: Path, tmp_path: Path) -> None:
    set_up(clone)
    count = len(installs(clone))
    moved = clone.rename(tmp_path / "elsewhere")
    assert set_up(moved).returncode == 0
    assert len(installs(moved)) == 2 * count


def test_an_old_python_gets_a_sentence(clone: Path) -> None:
    (clone / "bin" / "is-old").touch()
    ended = set_up(clone)
    assert ended.returncode == 1
    assert "wanted Python 3.11 or newer, found Python 3.8.0. Set PYTHON" in ended.stderr
    assert installs(clone) == []


def test_no_python_gets_a_sentence(clone: Path) -> None:
    (clone / "bin" / "is-old").touch()
    for name in ("python3.13", "python3.12", "python3.11", "python"):
        (clone / "bin" / name).symlink_to("python3")
    ended = set_up(clone, PYTHON="")
    assert ended.returncode == 1
    assert "wanted Python 3.11 or newer, found Python 3.8.0. Install one" in ended.stderr


def test_a_missing_venv_module_gets_a_sentence(clone: Path) -> None:
    (clone / "bin" / "no-venv").touch()
    ended = set_up(clone)
    assert ended.returncode == 1
    assert "apt install python3-venv" in ended.stderr


@pytest.mark.parametrize("script", ["setup", "demo", "test", "check", "breaks", "docs", "../.ci/run"])
def test_a_script_is_posix_shell_and_can_be_run(repository: Path, script: str) -> None:
    file = repository / "scripts" / script
    assert os.access(file, os.X_OK)
    assert file.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    shell = shutil.which("dash") or "sh"
    assert subprocess.run([shell, "-n", str(file)], capture_output=True, check=False).returncode == 0
