"""Damaged and partial files: named with what was wanted, found and to do; the page is written without them."""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pykalm.report import charts
from pykalm.report.commands import command_line, describe_setting
from pykalm.report.drawing import Drawing
from pykalm.report.page import SECTIONS, render_page
from pykalm.report.run_files import read_run_files
from tests.report.sample_run import write_json

DAMAGE = {
    "results/links.json": (b'{"mean": ', "kalm evaluate links {run}"),
    "results/links.baseline.json": (b"[]", "kalm evaluate links {run} --baseline"),
    "results/links.ranks.tsv": (b"head\trealistic\na\t0\n", "kalm evaluate links {run}"),
    "results/qa.descriptions.3-shot.json": (b'{"tasks": 3}', "kalm evaluate qa {run} --descriptions --shots 3"),
    "results/qa.jsonl": (b'{"task": "tail"}\n', "kalm evaluate qa {run}"),
    "results/language.json": (b'{"perplexity": {"wikitext2": {"word": NaN}}}', "kalm evaluate language {run}"),
    "results/geometry.json": (b"\xff\xfe", "Restore the file"),
    "results/rerank.json": (b"[" * 100_000, "kalm evaluate rerank {run}"),
    "metrics.jsonl": (b'{"step": 1}\n{"step"}\n', "Restore or delete the file"),
    "config.yaml": (b"graph: [", "Restore the file"),
    "adapter/alignment.json": (b"3", "Restore the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_with_its_remedy(full: Path, name: str) -> None:
    content, remedy = DAMAGE[name]
    (full / name).write_bytes(content)
    (problem,) = read_run_files(full).problems
    assert problem.startswith(f"{full / name}")
    assert "wanted" in problem
    assert "found" in problem
    assert remedy.format(run=full) in problem


def test_a_line_of_ranks_without_its_columns_is_named_by_its_number(full: Path) -> None:
    (full / "results" / "links.ranks.tsv").write_text("head\trealistic\na\t1.5\nb\n", encoding="utf-8")
    (problem,) = read_run_files(full).problems
    assert "links.ranks.tsv:3: wanted a realistic rank, found: too few columns. Make it again: kalm" in problem


def test_a_line_that_a_kill_cut_off_is_no_damage(full: Path) -> None:
    with (full / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 177, "lo')
    files = read_run_files(full)
    assert files.problems == ()
    assert files.steps[-1].step == 176


def test_results_without_their_raw_material_are_shown(full: Path) -> None:
    for file in [*(full / "results").glob("*.tsv"), *(full / "results").glob("*.jsonl")]:
        file.unlink()
    files = read_run_files(full)
    assert files.problems == ()
    assert (len(files.links), files.ranks, files.answers) == (1, {}, {})


def test_the_plain_measurement_comes_first(full: Path) -> None:
    plain = json.loads((full / "results" / "links.json").read_text(encoding="utf-8"))
    for name in ("links.valid", "links.valid.50-triples", "links.other-0123ab"):
        write_json(full / "results" / f"{name}.json", plain)
    settings = [measured.setting for measured in read_run_files(full).links]
    assert settings == [(), ("other-0123ab",), ("valid",), ("valid", "50-triples")]


@pytest.mark.parametrize(
    ("setting", "command", "words"),
    [
        ((), "kalm evaluate links RUN", ""),
        (("valid", "50-triples"), "kalm evaluate links RUN --split valid --limit 50", "valid, at most 50 triples"),
        (("wn18rr_v1_ind-0123ab",), "kalm evaluate links RUN --graph wn18rr_v1_ind", "on wn18rr_v1_ind"),
        (("descriptions", "3-shot"), "kalm evaluate links RUN --descriptions --shots 3", "with descriptions, 3-shot"),
        (("ranked-5", "constrained"), "kalm evaluate links RUN --ranked 5 --constrained", "ranked-5, constrained"),
    ],
)
def test_the_name_of_a_file_says_the_command_that_wrote_it(setting: tuple[str, ...], command: str, words: str) -> None:
    assert command_line("RUN", "links", setting) == command
    assert command_line("RUN", "links", setting, baseline=True) == f"{command} --baseline"
    assert describe_setting(setting) == words


def test_tokens_are_what_each_command_limits_by_them() -> None:
    assert command_line("RUN", "qa", ("16-tokens",)) == "kalm evaluate qa RUN --max-new-tokens 16"
    assert command_line("RUN", "language", ("500-tokens",)) == "kalm evaluate language RUN --limit-tokens 500"


def test_a_run_with_spaces_in_its_name_is_quoted() -> None:
    assert command_line("my runs/one", "links") == "kalm evaluate links 'my runs/one'"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a JSON value; of long lists, of the first element only."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, content in inner:
        yield from leaves(content, (*path, key))


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a JSON value with another value at a place."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = with_value(tree[path[0]], path[1:], value)
    return copy


def shown(run: Path) -> list[str]:
    """Write the page of a run without its files; return the problems that it names."""
    files = read_run_files(run)
    sections = [section(files) for section in SECTIONS]
    html = render_page(files, sections, written=datetime(2026, 1, 1), version="0")
    assert html.count("<h2>") == len(SECTIONS)
    return list(files.problems)


WRONG: tuple[Any, ...] = (None, "x", -1, 0, 1e9, [], {}, [[]])


def keep_results_only(full: Path) -> None:
    """Remove what need not be read again and again."""
    for file in [*(full / "results").glob("*.jsonl"), *(full / "results").glob("*.tsv"), full / "metrics.jsonl"]:
        file.unlink()
    (full / "config.yaml").write_text("graph: world\n", encoding="utf-8")


def shortened(full: Path, name: str) -> Any:
    """Return the content of a results file with one relation, task and group only."""
    tree = json.loads((full / "results" / f"{name}.json").read_bytes())
    for key in {"relations", "tasks", "groups"} & tree.keys():
        tree[key] = dict(list(tree[key].items())[:1])
    return tree


@pytest.mark.usefixtures("undrawn")
def test_a_wrong_value_anywhere_never_stops_the_page(full: Path) -> None:
    keep_results_only(full)
    for name in ("links", "qa", "language", "geometry", "rerank"):
        tree = shortened(full, name)
        for number, place in enumerate(leaves(tree)):
            write_json(full / "results" / f"{name}.json", with_value(tree, place, WRONG[number % len(WRONG)]))
            assert len(shown(full)) <= 1
        write_json(full / "results" / f"{name}.json", tree)
    assert shown(full) == []


@pytest.mark.slow
def test_a_wrong_value_anywhere_never_stops_a_figure(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def painted(name: str, title: str, paint: Callable[[Any], object], **options: Any) -> Drawing:
        paint(Figure().add_subplot())
        return Drawing(name, "", "", b"")

    monkeypatch.setattr(charts, "draw", painted)
    keep_results_only(full)
    for name in ("links", "geometry", "rerank"):
        tree = shortened(full, name)
        for number, place in enumerate(leaves(tree)):
            write_json(full / "results" / f"{name}.json", with_value(tree, place, WRONG[number % len(WRONG)]))
            shown(full)
        write_json(full / "results" / f"{name}.json", tree)
