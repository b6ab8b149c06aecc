"""Claims about the documents: they agree with the code, and what they point at exists."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import pykalm
from pykalm.cli import app
from pykalm.config import configuration_page, load_config
from tests.tiny_models import save_tiny_model

REPOSITORY = Path(__file__).parent.parent
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Return every `kalm ...` line of the shell blocks of all pages."""
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith("kalm ")})


def test_the_configuration_page_is_generated_from_the_settings() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: make docs"


def test_the_example_of_the_configuration_page_is_valid(tmp_path: Path) -> None:
    (example,) = blocks(REPOSITORY / "docs" / "configuration.md", "yaml")
    (tmp_path / "example.yaml").write_text(example, encoding="utf-8")
    assert load_config(tmp_path / "example.yaml").training.batch_size == 64


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_and_script_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"`make (\w+)`|^make (\w+)", text, re.MULTILINE) for target in target}
    assert [target for target in targets if target and f"\n{target}:" not in makefile] == []
    scripts = set(re.findall(r"\bscripts/([\w.]*\w)", text))
    assert [script for script in scripts if not (REPOSITORY / "scripts" / script).exists()] == []


@pytest.mark.parametrize("command", commands())
def test_the_command_line_takes_the_commands_of_the_pages(command: str) -> None:
    arguments = shlex.split(command, comments=True)[1:]
    group = typer.main.get_command(app)
    context = group.make_context("kalm", list(arguments), resilient_parsing=False)
    while hasattr(group, "resolve_command"):
        name, group, rest = group.resolve_command(context, [*getattr(context, "_protected_args", []), *context.args])
        assert group is not None
        context = group.make_context(name, rest, parent=context)


def test_the_files_of_the_readme_tree_exist() -> None:
    (tree,) = blocks(REPOSITORY / "README.md", "text")
    package = [REPOSITORY / "src" / "pykalm" / name for name in re.findall(r"^  (\w+)/", tree, re.MULTILINE)]
    files = [REPOSITORY / "src" / "pykalm" / name for name in re.findall(r"\b(\w+\.py)\b", tree)]
    folders = [REPOSITORY / name for name in re.findall(r"^(\S+/)", tree, re.MULTILINE)]
    assert len(package) == 8
    assert [path for path in [*package, *files, *folders] if not path.exists()] == []


def test_every_public_name_can_be_fetched() -> None:
    assert [name for name in pykalm.__all__ if not hasattr(pykalm, name)] == []
    assert set(pykalm.__all__) <= set(dir(pykalm))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        pykalm.trian  # noqa: B018


@pytest.mark.slow
def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks(REPOSITORY / "README.md", "python")
    model = save_tiny_model(tmp_path / "model")
    settings = {"training.max_steps": 2, "training.batch_size": 8, "training.validation_triples": 5}
    short = example.replace('settings={"training.epochs": 3}', f"model={str(model)!r}, settings={settings!r}")
    assert short != example
    monkeypatch.chdir(tmp_path)
    exec(compile(short, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert 0 < float(printed[0]) < 1
    assert len(printed) == 6


@pytest.mark.parametrize("word", ["/wo" + "rk/", "/ro" + "ot/", "/tm" + "p/"])
def test_no_page_names_a_folder_of_one_machine(word: str) -> None:
    assert [page.name for page in PAGES if word in page.read_text(encoding="utf-8")] == []
