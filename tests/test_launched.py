"""Two processes of a launcher train, go on, measure and fail as one does; on the CPU, on a tiny graph and model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.learn.workshop import SETTINGS, as_options, timeless_metrics, write_graph
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

STEPS = {**SETTINGS, "adapter.dropout": 0, "training.max_steps": 6, "training.epochs": 9, "training.evaluate_every": 3}
LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines=1", "--mixed_precision=no",
          "--dynamo_backend=no", "--num_processes=2"]  # fmt: skip
# On a machine without a GPU --multi_gpu only means that there are many processes.
PLAIN, SHARDED = ["--multi_gpu"], ["--use_fsdp", "--fsdp_version=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a graph, a model, and a run of one process."""
    folder = tmp_path_factory.mktemp("launched")
    write_graph(folder / "graph")
    save_tiny_model(folder / "model", tie_word_embeddings=True)
    ended = kalm(None, *train_into(folder, "one"))
    assert ended.returncode == 0, ended.stderr
    return folder


def train_into(folder: Path, name: str, **changes: Any) -> list[str]:
    settings = STEPS | {key.replace("__", "."): value for key, value in changes.items()}
    return ["train", "--graph", str(folder / "graph"), "--model", str(folder / "model"), "--out", str(folder / name),
            *as_options(settings)]  # fmt: skip


def command(launch: list[str] | None, *arguments: str) -> list[str]:
    port = f"--main_process_port={20000 + os.getpid() % 20000}"
    return [sys.executable, *([*LAUNCH, port, *launch] if launch else []), "-m", "pykalm", *arguments]


def kalm(launch: list[str] | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kalm` in one process, or in two of a launcher."""
    return subprocess.run(command(launch, *arguments), capture_output=True, text=True, check=False, timeout=300)


def require_close(found: Path, wanted: Path) -> None:
    """Rounding of six steps at a high learning rate; AdamW divides small gradients by their own size."""
    lines, expected = timeless_metrics(found), timeless_metrics(wanted)
    assert len(lines) == len(expected) == 6
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "launch", "kind"),
    [("two", PLAIN, "lora"), ("sharded", SHARDED, "lora"), ("full", None, "full"), ("sharded-full", SHARDED, "full")],
)
def test_two_processes_train_as_one(made: Path, name: str, launch: list[str] | None, kind: str) -> None:
    ended = kalm(launch, *train_into(made, name, adapter__kind=kind))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("The run is in") == 1
    require_close(made / name, made / ("full" if kind == "full" else "one"))


@pytest.mark.parametrize(("first", "then"), [(PLAIN, None), (None, PLAIN), (SHARDED, None), (None, SHARDED)])
def test_a_run_goes_on_with_another_number_of_processes(
    made: Path, first: list[str] | None, then: list[str] | None, tmp_path: Path
) -> None:
    """Stopped by a kill after three of its six steps, where it has saved."""
    name = str(tmp_path / "run")
    process = subprocess.Popen(
        command(first, *train_into(made, name)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (Path(name) / "metrics.jsonl").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    ended = kalm(then, "train", "--out", name, "--resume")
    assert ended.returncode == 0, ended.stderr
    require_close(Path(name), made / "one")


@pytest.mark.parametrize("launch", [PLAIN, SHARDED])
def test_two_processes_find_the_ranks_of_one(made: Path, launch: list[str], tmp_path: Path) -> None:
    """Chunks of queries smaller than the questions, so that both processes rank; same bits, so same file."""
    printed = []
    for how in (None, launch):
        for old in ("index", "results"):
            for file in (made / "one" / old).glob("*"):
                file.unlink()
        ended = kalm(how, "evaluate", "links", str(made / "one"), "--json")
        assert ended.returncode == 0, ended.stderr
        printed.append((json.loads(ended.stdout), (made / "one" / "results" / "links.ranks.tsv").read_bytes()))
    assert printed[0] == printed[1]


def test_a_folder_that_holds_a_run_is_refused_once(made: Path) -> None:
    ended = kalm(PLAIN, *train_into(made, "one"))
    assert ended.returncode == 1
    assert ended.stderr.count("wanted a new folder for the run") == 1
    assert "pykalm/" not in ended.stderr  # no traceback of ours; the launcher adds its own report


def test_wrong_settings_are_refused_once(made: Path) -> None:
    ended = kalm(PLAIN, *train_into(made, "never", training__epochs=0))
    assert ended.returncode == 1  # the launcher's; kalm's is 2
    assert ended.stderr.count("training.epochs") == 1


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
    line = command(PLAIN, *train_into(made, "broken"))
    at = line.index("pykalm")
    ended = subprocess.run(
        [*line[: at - 1], str(script), *line[at + 1 :]], capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 1
    assert ended.stderr.count("kalm: ") == 1
    assert "kalm: out of memory" in ended.stderr
