"""Two and four processes train, go on, measure and fail as one does, on a CPU and a tiny model; some by a launcher."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pykalm import api, cli
from pykalm.learn.train import StepReport
from pykalm.model import run as run_module
from pykalm.processes import rank
from tests.learn.workshop import SETTINGS, as_options, timeless_metrics, write_graph
from tests.ranks import run_ranks
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

STEPS = {**SETTINGS, "adapter.dropout": 0, "training.max_steps": 6, "training.epochs": 9, "training.evaluate_every": 3}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True)
class Launch:
    """Say how many processes there are, and what their launcher sets beside the number of each."""

    count: int
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Name it in a test's name."""
        return f"{self.count}{', sharded' * bool(self.environment)}"


ONE, TWO, FOUR, SHARDED, FOUR_SHARDED = Launch(1), Launch(2), Launch(4), Launch(2, FSDP), Launch(4, FSDP)
# On a machine without a GPU --multi_gpu only means that there are many processes.
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
          "--mixed_precision=no", "--dynamo_backend=no"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a graph, a model whose output head is its embedding, and runs of one process."""
    folder = tmp_path_factory.mktemp("launched")
    write_graph(folder / "graph")
    save_tiny_model(folder / "model", tie_word_embeddings=True)
    for kind in ("lora", "full"):
        train(folder, folder / kind, kind=kind)
    return folder


def train(folder: Path, out: Path, *, kind: str = "lora", resume: bool = False, stop_after: int | None = None) -> None:
    """Train on the graph of a folder; with stop_after, as if Ctrl-C came in the main process after that step."""

    def watch(report: StepReport) -> None:
        if report.step == stop_after:
            signal.raise_signal(signal.SIGINT)

    if resume:
        api.train(out=out, resume=True, watch=watch)
        return
    with contextlib.suppress(KeyboardInterrupt):
        api.train(
            folder / "graph", out=out, model=folder / "model", settings={**STEPS, "adapter.kind": kind}, watch=watch
        )


def train_in(launch: Launch, *given: Any, **options: Any) -> None:
    """Train in this process, or in those of a launch."""
    if launch == ONE:
        train(*given, **options)
    else:
        run_ranks(launch.count, _train, given, options, environment=launch.environment)


def _train(given: tuple[Any, ...], options: dict[str, Any]) -> None:
    train(*given, **options)


def kalm(arguments: list[str]) -> tuple[int, str, str]:
    """Return exit code, output and messages of a command in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as messages:
        code = cli.main(arguments)
    return code, out.getvalue(), messages.getvalue()


def require_close(found: Path, wanted: Path) -> None:
    """Rounding of six steps at a high learning rate; AdamW divides small gradients by their own size."""
    lines, expected = timeless_metrics(found), timeless_metrics(wanted)
    assert len(lines) == len(expected) == 6
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        assert (line.pop("valid_mrr") is None) == (other.pop("valid_mrr") is None)
        assert line == pytest.approx(other, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("launch", "kind"),
    [(TWO, "lora"), (TWO, "full"), (SHARDED, "lora"), (SHARDED, "full"), (FOUR, "lora"), (FOUR_SHARDED, "full")],
    ids=str,
)
def test_processes_train_as_one(made: Path, launch: Launch, kind: str, tmp_path: Path) -> None:
    train_in(launch, made, tmp_path / "run", kind=kind)
    require_close(tmp_path / "run", made / kind)
    names = {file.name: file.stat().st_size for file in (made / kind / "adapter").iterdir()}
    assert {file.name: file.stat().st_size for file in (tmp_path / "run" / "adapter").iterdir()}.keys() == names.keys()
    api.load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("first", "then"),
    [(TWO, ONE), (ONE, TWO), (SHARDED, ONE), (ONE, SHARDED), (FOUR, TWO), (TWO, FOUR_SHARDED)],
    ids=str,
)
def test_a_run_goes_on_with_another_number_of_processes(
    made: Path, first: Launch, then: Launch, tmp_path: Path
) -> None:
    train_in(first, made, tmp_path / "run", stop_after=3)
    assert 3 <= len(timeless_metrics(tmp_path / "run")) < 6
    train_in(then, made, tmp_path / "run", resume=True)
    require_close(tmp_path / "run", made / "lora")


@pytest.mark.parametrize("launch", [TWO, SHARDED, FOUR], ids=str)
def test_processes_find_the_ranks_of_one(made: Path, launch: Launch, tmp_path: Path) -> None:
    found = []
    for count in (1, launch.count):
        for old in ("index", "results"):
            for file in (made / "lora" / old).glob("*"):
                file.unlink()
        arguments = ["evaluate", "links", str(made / "lora"), "--json"]
        (code, out, _), *others = (
            [kalm(arguments)] if count == 1 else run_ranks(count, kalm, arguments, environment=launch.environment)
        )
        assert code == 0
        assert all(other == (0, "", "") for other in others)
        found.append((out, (made / "lora" / "results" / "links.ranks.tsv").read_bytes()))
    assert found[0] == found[1]


def _opened_while_it_is_replaced(run: Path) -> tuple[int, str]:
    """Open a run that a training seems to replace once, under the eyes of the second process alone."""
    right, looks = run_module.read_alignment, []

    def changing(path: Path) -> dict[str, Any]:
        looks.append(path)
        return right(path) | ({"step": -1} if rank() == 1 and len(looks) == 3 else {})

    with mock.patch.object(run_module, "read_alignment", changing):
        fingerprint = api.load_run(run).encoder.fingerprint()
    return len(looks), fingerprint


def test_processes_look_again_together_where_one_finds_a_run_replaced(made: Path) -> None:
    assert len(set(run_ranks(2, _opened_while_it_is_replaced, made / "lora"))) == 1


def test_a_folder_that_holds_a_run_is_refused_once(made: Path) -> None:
    arguments = ["train", "--graph", str(made / "graph"), "--model", str(made / "model"), "--out", str(made / "lora")]
    ended = run_ranks(2, kalm, [*arguments, *as_options(STEPS)])
    assert [code for code, _, _ in ended] == [1, 1]
    assert sorted(messages.count("wanted a new folder for the run") for _, _, messages in ended) == [0, 1]
    assert "Traceback" not in "".join(messages for _, _, messages in ended)


def test_a_launcher_starts_two_that_train_as_one(made: Path, tmp_path: Path) -> None:
    ended = launched(["-m", "pykalm"], made, tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("The run is in") == 1
    require_close(tmp_path / "run", made / "lora")


def test_an_error_of_one_process_ends_all_with_its_message(made: Path, tmp_path: Path) -> None:
    """Let the second process run out of memory in its third step; the first waits for it, and must not for ever."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from pykalm import cli\n"
        "from pykalm.learn import train\n"
        "from pykalm.processes import rank\n"
        "right, steps = train.joint_gradient, []\n"
        "def wrong(*given, **more):\n"
        "    steps.append(1)\n"
        "    if rank() == 1 and len(steps) == 3:\n"
        "        raise MemoryError\n"
        "    return right(*given, **more)\n"
        "train.joint_gradient = wrong\n"
        "sys.exit(cli.main())\n",
        encoding="utf-8",
    )
    ended = launched([str(script)], made, tmp_path / "broken", {"objective.kl_weight": 0})  # which is said at the start
    assert ended.returncode == 1
    assert ended.stderr.count("kalm: ") == 1
    assert "kalm: out of memory" in ended.stderr


def launched(
    program: list[str], made: Path, out: Path, settings: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Let accelerate start two processes of a training."""
    port = f"--main_process_port={20000 + os.getpid() % 20000}"
    arguments = ["train", "--graph", str(made / "graph"), "--model", str(made / "model"), "--out", str(out)]
    return subprocess.run(
        [sys.executable, *LAUNCH, port, *program, *arguments, *as_options({**STEPS, **(settings or {})})],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
