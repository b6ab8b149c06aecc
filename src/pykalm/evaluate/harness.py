"""The tasks of lm-eval on a model in memory; lm-eval is an optional extra, loaded only when a task is asked for.

MMLU is taken from the folders of $KALM_DATA where it lies there: lm-eval's own tasks, whose data are read from these files.
"""

import contextlib
import copy
import csv
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pykalm.errors import KalmError, UsageError
from pykalm.graph.catalogue import search_path
from pykalm.graph.names import nearest, suggestion
from pykalm.launch import num_launched
from pykalm.memory import explained_memory
from pykalm.model.encoder import Encoder

MMLU = "mmlu"
MMLU_SHOTS = 5
LETTERS = "ABCD"
BOOTSTRAP_SAMPLES = 1000
"""Samples behind the standard errors of metrics that have none in closed form; accuracy has one."""


@dataclass(frozen=True)
class TaskResult:
    """Hold the metrics of a task by name, as lm-eval gives them, what they are of, and those of its parts, by name."""

    metrics: Mapping[str, float]
    num_questions: int
    shots: int
    source: str
    parts: Mapping[str, "TaskResult"] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data; acc and stderr, where right answers are counted, also stand on their own."""
        facts = {"num_questions": self.num_questions, "shots": self.shots, "source": self.source}
        accuracy = (
            {"acc": self.metrics["acc"], "stderr": self.metrics.get("acc_stderr")} if "acc" in self.metrics else {}
        )
        parts = {"parts": {name: part.to_dict() for name, part in self.parts.items()}} if self.parts else {}
        return {**accuracy, **facts, "metrics": dict(self.metrics), **parts}


def run_tasks(
    encoder: Encoder,
    tokenizer: Any,
    names: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 4,
) -> dict[str, TaskResult]:
    """Run tasks of lm-eval by name on the model of an encoder, in its precision; log-softmax in float32.

    shots: examples before each question, as the task says by default (5 for MMLU); limit: the first questions of each
    task only. Raises KalmError where lm-eval is missing or cannot load a task's data, UsageError for an unknown task or
    several processes.
    """
    _require_lm_eval()
    if num_launched() > 1:
        raise UsageError("lm-eval's tasks run in one process here. Launch one, or leave --tasks out.")
    import lm_eval  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    was_training, mmlu = encoder.training, local_mmlu()
    with _only_what_concerns_users(), explained_memory("Lower --batch-size."):
        manager = _task_manager(names, mmlu)
        model = HFLM(
            pretrained=encoder.eval().causal_lm,
            tokenizer=copy.deepcopy(tokenizer),  # it may be given another pad token
            batch_size=batch_size,
            softmax_dtype="float32",
            mixed_precision_dtype="bfloat16" if encoder.compute_dtype == torch.bfloat16 else None,
        )
        results = {}
        try:
            for name in names:  # one by one, since lm-eval refuses names that overlap, as mmlu and mmlu_anatomy do
                group = _local_mmlu_group(manager, mmlu, name)
                found = lm_eval.simple_evaluate(
                    model, tasks=[group] if group else _loaded(manager, name), num_fewshot=shots, limit=limit,
                    task_manager=manager, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False,
                    random_seed=None, numpy_random_seed=None, torch_random_seed=None,
                )  # fmt: skip
                results[name] = read_result(found, name, "local files" if group else "lm-eval")
        finally:
            encoder.train(was_training)
    return results


def read_result(found: Mapping[str, Any], name: str, source: str) -> TaskResult:
    """Read the result of a task, or of a group of tasks with its parts, from what lm-eval returns."""
    values = found["results"].get(name, {})  # a tag is a list of tasks only
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    below = found.get("group_subtasks", {}).get(name, [] if values else list(found["results"]))
    parts = {part: read_result(found, part, source) for part in below if part in found["results"]}
    count = int(values.get("sample_len") or sum(part.num_questions for part in parts.values()))
    shots = found["n-shot"].get(name, next((part.shots for part in parts.values()), 0))
    return TaskResult(metrics, count, int(shots), source, parts)


def local_mmlu() -> Path | None:
    """Return the folder of MMLU, with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv, in those of $KALM_DATA, if any."""
    folders = (root / "MMLU" for root in search_path())
    return next((folder for folder in folders if any(folder.glob("test/*_test.csv"))), None)


def read_mmlu(folder: Path, subject: str, **_: Any) -> dict[str, Any]:
    """Read the dev and test questions of a subject: csv without header, columns question, A, B, C, D, letter.

    Returns {split: datasets.Dataset}, as lm-eval takes it. Raises KalmError for a missing file or a wrong line.
    """
    from datasets import Dataset  # noqa: PLC0415

    rows = {split: _mmlu_rows(folder / split / f"{subject}_{split}.csv", subject) for split in ("dev", "test")}
    return {split: Dataset.from_list(questions) for split, questions in rows.items()}


def _mmlu_rows(path: Path, subject: str) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if len(row) != 6 or row[5] not in tuple(LETTERS):
                    raise KalmError(
                        f"{path}, question {number}: wanted a question, four answers and a letter of {LETTERS}, found "
                        f"{len(row)} columns that end in {row[-1:]!r}. Restore the file."
                    )
                rows.append(
                    {"question": row[0], "subject": subject, "choices": row[1:5], "answer": LETTERS.index(row[5])}
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise KalmError(f"{path}: cannot be read: {error}. Restore the file.") from error
    return rows


def _task_manager(names: Sequence[str], mmlu: Path | None) -> Any:
    """Return what knows the tasks: of MMLU alone where that will do, since lm-eval has 14,000. Raises UsageError."""
    from lm_eval import tasks  # noqa: PLC0415

    if mmlu is not None:
        folder = Path(str(tasks.__file__)).parent / MMLU / "default"
        manager = tasks.TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = tasks.TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            hint = suggestion(nearest(name, manager.all_tasks))
            raise UsageError(f"lm-eval has no task {name!r}.{hint} See: lm-eval ls tasks.")
    return manager


def _local_mmlu_group(manager: Any, folder: Path | None, name: str) -> Any:
    """Return MMLU, one of its fields or one of its subjects as a group of lm-eval's own tasks that read local files.

    None for any other task, and where there are no local files.
    """
    from lm_eval.config.group import AggMetricConfig  # noqa: PLC0415

    if folder is None or name.split("_")[0] != MMLU:
        return None
    files = {f"{MMLU}_{file.stem.removesuffix('_test')}" for file in folder.glob("test/*_test.csv")}
    subjects = files & set(manager.all_tasks)
    in_field = getattr(manager.task_index.get(f"{name}_tasks"), "tags", None) or {name}
    chosen = sorted(subjects if name == MMLU else subjects & set(in_field))
    if not chosen:
        return None  # another kind of MMLU, such as mmlu_pro
    members = [
        {
            "task": task,
            "num_fewshot": MMLU_SHOTS,
            "custom_dataset": partial(read_mmlu, folder, task.removeprefix(f"{MMLU}_")),
        }
        for task in chosen
    ]
    label = f"{name}, alone" if chosen == [name] else name  # a group must not bear the name of a task in it
    group = manager.load({"group": label, "task": members})["groups"][label]
    group.aggregate_metric_list = [AggMetricConfig(metric="acc", weight_by_size=True)]
    return group


def _loaded(manager: Any, name: str) -> list[Any]:
    """Return a task, or the tasks of a group or tag, with their data, or say why these cannot be had."""
    try:
        found = manager.load([name])
    except Exception as error:  # whatever data sets, the hub and the network raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise KalmError(
            f"lm-eval cannot load the data of {name}: {reason.rstrip('.')}. Connect to the Hugging Face hub; MMLU may also "
            "lie in a folder MMLU of $KALM_DATA."
        ) from error
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise KalmError("wanted lm-eval for --tasks, found that it is not installed. Run: pip install -e '.[language]'")


@contextlib.contextmanager
def _only_what_concerns_users() -> Iterator[None]:
    """Keep lm-eval from logging to its own programmers, and from drawing a bar for every task beside that of the whole."""
    import lm_eval.api.task as tasks  # noqa: PLC0415

    logger, bar = logging.getLogger("lm_eval"), tasks.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    tasks.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        logger.setLevel(level)
        tasks.tqdm = bar
