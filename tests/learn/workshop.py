"""A small graph on disk, the command line that trains on it in a process of its own, and what it leaves behind."""

import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykalm import cli
from pykalm.learn.state import read_metrics

SETTINGS: dict[str, Any] = {
    "training.device": "cpu", "training.precision": "fp32", "training.batch_size": 6, "training.save_every": 1,
    "training.directions": "together",
    "training.learning_rate": 0.01, "training.row_tokens": 128, "adapter.rank": 4, "adapter.dropout": 0.1,
}  # fmt: skip

# Children fork from a server that has imported everything, so that a process costs a tenth of a second, not four.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.learn.workshop", "pykalm.api", "accelerate", "peft"])


def write_graph(folder: Path, *, num_triples: int = 50, valid: int = 10, test: int = 5) -> Path:
    """Write a random graph of 20 entities with descriptions and 2 relations; the same one at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    entities = [f"e{i}" for i in range(20)]
    descriptions = "".join(f"{entity}\tname {i}\tthing {i}\n" for i, entity in enumerate(entities))
    (folder / "entities.tsv").write_text(descriptions, encoding="utf-8")
    (folder / "relations.tsv").write_text("likes\tlikes\tis liked by\nknows\tknows\tis known by\n", encoding="utf-8")
    every = [(head, relation, tail) for head in entities for relation in ("likes", "knows") for tail in entities]
    rows = ["\t".join(triple) + "\n" for triple in generator.sample(every, num_triples)]
    train = num_triples - valid - test
    for split, lines in (("train", rows[:train]), ("valid", rows[train : train + valid]), ("test", rows[-test:])):
        if lines:
            (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def as_options(settings: dict[str, Any]) -> list[str]:
    """Write settings as options of the command line."""
    return [
        part for key, value in settings.items() for part in ("--set", f"{key}={'null' if value is None else value}")
    ]


def start(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> BaseProcess:
    """Start `kalm` with some arguments in a process of its own; what it prints goes to a file."""
    process = PROCESSES.Process(target=_work, args=(arguments, str(log), before))
    process.start()
    return process


def _work(arguments: list[str], log: str, before: Callable[[], None] | None) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.exit(cli.main(arguments))


def learned(run: Path) -> dict[str, Tensor]:
    """Return the last weights and optimiser moments of a run."""
    state = torch.load(run / "state" / "latest.pt", weights_only=True)
    moments = {f"{i}.{key}": value for i, entry in state["optimizer"]["state"].items() for key, value in entry.items()}
    return {**state["parameters"], **moments}


def require_same_training(run: Path, whole: Path) -> None:
    """Assert that two runs ended with the same bits: weights, moments, best weights, every number that is no time."""
    found, wanted = learned(run), learned(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    names = sorted(file.name for file in (whole / "adapter").iterdir())
    assert sorted(file.name for file in (run / "adapter").iterdir()) == names
    for name in names:
        assert (run / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes(), name
    assert timeless_metrics(run) == timeless_metrics(whole)


def timeless_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the speeds."""
    timed = {"examples_per_second", "tokens_per_second", "seconds_left"}
    return [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(run)]


def leftovers(run: Path) -> list[str]:
    """Return the drafts that lie in a run folder: hidden files and folders."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))
