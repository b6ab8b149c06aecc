"""Claims about the command line: exit codes, what goes to which stream, quick help, clean messages."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pykalm
from pykalm import cli, terminal
from pykalm.errors import GraphError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "pykalm.cli", *arguments], capture_output=True, text=True, check=False)


def replace(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Put functions in the place of the package's public ones."""
    for name, function in functions.items():
        # Not setattr, which would first fetch the real one, and PyTorch with it.
        monkeypatch.setitem(pykalm.__dict__, name, function)


def raising(error: BaseException) -> object:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def test_help_and_import_load_no_torch() -> None:
    script = (
        "import sys, pykalm.cli\n"
        "assert pykalm.cli.main(['train', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'accelerate'} & sys.modules.keys()\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_version_is_the_package_version() -> None:
    assert run("--version").stdout == f"kalm {pykalm.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train"],
        ["train", "--out", "x", "--colour", "red"],
        ["predict", "x", "--relation", "r"],
        ["predict", "x", "--relation", "r", "--head", "a", "--tail", "b"],
        ["evaluate", "links", "x", "--limit", "0"],
        ["train", "--out", "x", "--graph", "world", "--set", "training.epochs=0"],
    ],
)
def test_wrong_usage_ends_with_two_and_a_message_on_stderr(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.strip() != ""


def test_a_kalm_error_is_one_message_and_ends_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(monkeypatch, list_data=raising(GraphError("train.tsv:7: wanted three columns, found two.")))
    assert cli.main(["data", "list"]) == 1
    assert capsys.readouterr() == ("", "kalm: train.tsv:7: wanted three columns, found two.\n")


@pytest.mark.parametrize("by_variable", [False, True])
def test_an_unexpected_error_shows_its_traceback_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by_variable: bool
) -> None:
    replace(monkeypatch, list_data=raising(ZeroDivisionError("division by zero")))
    monkeypatch.delenv("KALM_TRACEBACK", raising=False)
    assert cli.main(["data", "list"]) == 1
    short = capsys.readouterr().err
    assert short.startswith("kalm: ZeroDivisionError: division by zero\n")
    assert "Traceback" not in short
    if by_variable:
        monkeypatch.setenv("KALM_TRACEBACK", "1")
    assert cli.main(["data", "list"] if by_variable else ["--traceback", "data", "list"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace(monkeypatch, list_data=raising(KeyboardInterrupt()))
    assert cli.main(["data", "list"]) == 130
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_list_of_graphs_is_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {"world", "wn18rr", "fb15k-237", "codex-s", "umls"} <= entries.keys()
    assert cli.main(["data", "list"]) == 0
    assert "world" in capsys.readouterr().out


def test_a_graph_that_is_not_here_says_how_it_is_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KALM_DATA", raising=False)
    monkeypatch.setenv("KALM_CACHE", str(tmp_path))
    assert cli.main(["data", "list"]) == 0
    assert "not here: kalm data fetch wn18rr" in capsys.readouterr().out


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Record what `kalm train` passes on, in place of training."""
    recorded: dict[str, object] = {}

    def train(**settings: object) -> object:
        recorded.update(settings)
        return SimpleNamespace(path=settings["out"])

    replace(monkeypatch, train=train)
    return recorded


def test_options_win_over_the_file_and_over_set(seen: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("graph: umls\nmodel: a\ntraining: {epochs: 2}\n", encoding="utf-8")
    options = ["--out", str(tmp_path / "run"), "--config", str(file), "--graph", "no", "--set", "training.epochs=3"]
    assert cli.main(["train", *options]) == 0
    config = seen["config"]
    assert isinstance(config, pykalm.Config)
    # "no" would be false if it were read as YAML.
    assert (config.graph, config.model, config.training.epochs) == ("no", "a", 3)
    assert seen["resume"] is False


def test_resume_takes_the_settings_of_the_run(
    seen: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = pykalm.load_config(None, ["training.epochs=7"], graph="world")
    (tmp_path / "config.yaml").write_text(kept.to_yaml(), encoding="utf-8")
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--json"]) == 0
    assert (seen["config"], seen["resume"]) == (kept, True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["run"] == str(tmp_path)
    assert "kalm evaluate links" in printed.err


def test_resume_without_a_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--out", str(tmp_path / "nothing"), "--resume"]) == 1
    assert "wanted a run to go on with" in capsys.readouterr().err


@pytest.mark.parametrize(("saved", "words"), [(True, "saved. Go on"), (False, "Nothing is saved yet. Begin again")])
def test_ctrl_c_in_training_says_how_to_go_on(
    saved: bool, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if saved:
        (tmp_path / "state").mkdir()
    replace(monkeypatch, train=raising(KeyboardInterrupt()))
    (tmp_path / "config.yaml").touch()  # a training had begun: before that, nothing is saved and nothing is promised
    assert cli.main(["train", "--out", str(tmp_path), "--graph", "world"]) == 130
    assert f"{words} with: kalm train --out {tmp_path} --resume" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_says_that_nothing_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(monkeypatch, train=raising(KeyboardInterrupt()))
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--graph", "world"]) == 130
    assert "Nothing is saved yet: begin again with the same command." in capsys.readouterr().err


def test_a_file_in_place_of_a_graph_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.tsv").write_text("a\tr\tb\n", encoding="utf-8")
    assert cli.main(["data", "check", "train.tsv"]) == 1
    assert "train.tsv: this is a file. Give a folder" in capsys.readouterr().err


def test_checking_a_graph_with_problems_ends_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.tsv").write_text("a\tr\tb\nb\tr\tc\na\tr\tb\n", encoding="utf-8")
    assert cli.main(["data", "check", str(tmp_path), "--json"]) == 1
    check = json.loads(capsys.readouterr().out)
    assert (check["num_entities"], check["num_relations"], check["duplicates"]["train"]) == (3, 1, 1)
    assert cli.main(["data", "check", "world"]) == 0
    assert "nothing must be mended" in capsys.readouterr().out


def test_an_evaluation_shows_how_it_went_while_training(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int, str]] = []
    watch = cli.watch_training(lambda done, total, note="": seen.append((done, total, note)))
    numbers = dict.fromkeys(("epoch", "loss", "explicit", "implicit", "kl", "examples_per_second"), 1.0)
    numbers |= {"temperature": 0.05, "tokens_per_second": 900.0}
    watch(SimpleNamespace(step=1, num_steps=4, valid_mrr=None, **numbers))  # type: ignore[arg-type]
    watch(SimpleNamespace(step=2, num_steps=4, valid_mrr=0.25, **numbers))  # type: ignore[arg-type]
    assert [(done, total) for done, total, _ in seen] == [(1, 4), (2, 4)]
    assert "implicit 1.000, KL 1.000), τ 0.0500" in seen[0][2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("step 2/4: valid MRR 0.250, epoch 1.00, loss 1.000")


def test_lines_of_progress_come_now_and_then_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 0.0, 10.0, 20.0, 21.0, 40.0])
    watch = terminal.lines_now_and_then("training", clock=lambda: next(seconds))
    for done in (100, 110, 120, 121, 150):  # resumed at step 100 of 200
        watch(done, 200, "loss 1.0")
    # After 20 s, 20 steps are done and 80 are left: 80 s. After 40 s, 50 are done and 50 left: 40 s.
    assert capsys.readouterr().err.splitlines() == [
        "training 120/200, 1:20 left, loss 1.0",
        "training 150/200, 0:40 left, loss 1.0",
    ]


def test_the_time_left_of_the_next_task_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 0.0, 1000.0, 1010.0, 1030.0])
    watch = terminal.lines_now_and_then("training", clock=lambda: next(seconds))
    for done in (1, 16, 1, 3):  # 16 steps of a run, then those of the next
        watch(done, 16)
    assert capsys.readouterr().err.splitlines()[-1] == "training 3/16, 2:10 left"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.show_progress("training") as watch:
        watch(3, 4, "loss 1.0")
    printed = capsys.readouterr()
    assert "training" in printed.err
    assert "3/4" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (7384, "2:03:04")])
def test_seconds_are_written_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert terminal.format_seconds(seconds) == text


def test_json_refuses_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        terminal.print_json({"mrr": float("nan")})
