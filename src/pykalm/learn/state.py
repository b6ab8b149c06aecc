"""The state of a training: what a resumed run needs to go on bit for bit, saved whole or not at all."""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykalm.errors import RunError
from pykalm.files import explain_write_errors, remove_drafts, replace_file
from pykalm.model.sharding import part_like, whole
from pykalm.processes import on_main

STATE_FILE = Path("state") / "latest.pt"
METRICS_FILE = "metrics.jsonl"

# What torch.load and taking its result apart raise on a file that is cut off, or holds something else.
DAMAGE = (RuntimeError, LookupError, TypeError, AttributeError, EOFError, OSError, ValueError, pickle.UnpicklingError)


@dataclass
class Progress:
    """Count what has been done: steps, evaluations without a better valid MRR, and the best MRR so far."""

    step: int = 0
    best_mrr: float | None = None
    best_step: int | None = None
    waited: int = 0
    finished: bool = False


def save_state(
    run_folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: Any,
    progress: Progress,
    fingerprints: dict[str, str],
) -> None:
    """Save learned weights (by name), optimiser and progress. Raises TrainingError where writing fails.

    No random state: batches and dropout are functions of seed and step. All processes call it, the main one writes;
    tensors are saved whole, so that another number of processes can go on with them.
    """
    state = {
        "parameters": {name: whole(parameter.detach()).cpu() for name, parameter in parameters.items()},
        "optimizer": _each_tensor(optimizer.state_dict(), lambda _, tensor: whole(tensor)),
        "progress": asdict(progress),
        "fingerprints": fingerprints,
    }
    on_main(lambda: replace_file(run_folder / STATE_FILE, lambda file: _write(state, file)))


def _each_tensor(state: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """Return the state of an optimiser with every tensor changed, given the number of its parameter."""
    entries = {
        number: {key: change(number, value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _write(state: dict[str, Any], file: Path) -> None:
    with file.open("wb") as handle:  # given a path, torch would not say why it cannot write
        torch.save(state, handle)


def has_finished(run_folder: Path) -> bool:
    """Return whether the last save of a run says that no step is left; False where that cannot be read."""
    try:
        state = torch.load(run_folder / STATE_FILE, map_location="cpu", mmap=True, weights_only=True)
        return bool(state["progress"]["finished"])
    except DAMAGE:  # load_state says what is wrong
        return False


def load_state(
    run_folder: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: Any,
    fingerprints: dict[str, str],
) -> Progress:
    """Fill weights and optimiser from the last save; return its progress, or that of a new run where none was saved.

    Raises RunError where the file is damaged, or graph, model or texts are not those that it was saved with.
    """
    file = run_folder / STATE_FILE
    remove_drafts(file.parent)
    if not file.is_file():
        return Progress()
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        saved = state["parameters"]
        for what, found in fingerprints.items():
            if state["fingerprints"][what] != found:
                raise RunError(
                    f"{file}: the {what} has changed since: wanted fingerprint {state['fingerprints'][what][:12]}, found "
                    f"{found[:12]}. Bring back what the run began with, or start a new run."
                )
        if _shapes(saved) != _shapes(parameters):
            raise RunError(
                f"{file}: wanted the state of {len(parameters)} learned tensors, found {len(saved)} of other names or "
                "shapes. The settings of the run have changed since; restore config.yaml."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(part_like(saved[name], parameter))
        for group, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
            group["fused"] = own["fused"]  # as this device computes, not that of the save
        numbered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.load_state_dict(
            _each_tensor(state["optimizer"], lambda number, tensor: part_like(tensor, numbered[number]))
        )
        return Progress(**state["progress"])
    except DAMAGE as error:
        raise RunError(
            f"{file}: wanted the state of a training, found a damaged file ({type(error).__name__}). Restore it from a "
            "copy, or delete the run folder and train again."
        ) from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


class MetricsLog:
    """Write one JSON object a line to metrics.jsonl; on resume forget the lines after the step that was saved."""

    def __init__(self, run_folder: Path, *, step: int) -> None:
        self.file = run_folder / METRICS_FILE
        kept = [line for line in read_metrics(run_folder) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace_file(self.file, lambda file: file.write_text(text, encoding="utf-8"))

    def write(self, **values: float | int | None) -> None:
        """Append a line. Raises TrainingError where writing fails."""
        with explain_write_errors(self.file), self.file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; one cut off by a kill is left out. Raises RunError on any other damage."""
    file = run_folder / METRICS_FILE
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    *complete, _cut_off = lines or [b""]
    try:
        records = [dict(json.loads(line)) for line in complete]
        for record in records:
            int(record["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{file}: wanted a JSON object with its step on every line, found others ({type(error).__name__}: {error}). "
            "Restore or delete the file; training does not need it."
        ) from error
    return records
