"""The bench: all measurements of a plan, one after the other, as plain data for programs."""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pykalm.bench.embedding import measure_embedding
from pykalm.bench.machine import describe_machine, keep_freed_memory
from pykalm.bench.own_process import in_own_process
from pykalm.bench.plan import QUICK, Plan, Workshop, with_changes
from pykalm.bench.published import BATCH_SIZE, COMPLETIONS
from pykalm.bench.ranking import measure_ranking
from pykalm.bench.scaling import Part, scaling_parts
from pykalm.bench.timing import Spread
from pykalm.bench.training import GraphTraining, TrainingSpeed, measure_training
from pykalm.bench.utilisation import Utilisation, measure_utilisation
from pykalm.files import replace_file

FORMAT = 1
Watch = Callable[[int, int, str], None]
Results = dict[str, Any]
Measure = Callable[[Workshop], Results]
MINUTES = {"train": 4, "utilisation": 3.5, "embed": 2, "rank": 0.7, "scaling": 0.5}
"""What a measurement of each kind took in five rounds on two cores, for the time left."""


def run_bench(
    *, out: str | Path | None = None, quick: bool = False, watch: Watch | None = None, **changes: Any
) -> Results:
    """Measure, and write the results to a JSON file after every measurement; return them as plain data.

    Every measurement has a process of its own: none inherits what another has left of the memory, and all together took more
    than 24 GiB. quick: the short form for CI, in this process; watch: is told how many hundredths of the time are over, 100,
    and what is measured next; changes: fields of the plan (pykalm.bench.plan.Plan) by name, None leaving one as it is. Raises
    UsageError for a plan that cannot be measured, GraphError and ModelError where something is not here, OutOfMemoryError.
    """
    plan = with_changes(QUICK if quick else Plan(), **changes)
    jobs, results = _jobs(plan), Results()
    workshop = _opened(plan) if quick else None
    done, total = 0.0, sum(MINUTES[job.kind] for job in jobs)
    for number, job in enumerate(jobs):
        if watch is not None:
            watch(int(100 * done / total), 100, f"{job.note} ({number + 1} of {len(jobs)})")
        done += MINUTES[job.kind]
        header, measured = (
            _measured(plan, job.measure, workshop) if quick else in_own_process(partial(_measured, plan, job.measure))
        )
        _join(results, measured if results else header | measured)
        if out is not None:
            _write(Path(out), results)
    return results


def _opened(plan: Plan) -> Workshop:
    if plan.threads:
        torch.set_num_threads(plan.threads)
    keep_freed_memory()
    return Workshop.open(plan)


def _measured(plan: Plan, measure: Measure, workshop: Workshop | None = None) -> tuple[Results, Results]:
    """Return what the figures belong to, and what is measured; with a workshop of its own unless one is given."""
    workshop = workshop or _opened(plan)
    return _header(workshop), measure(workshop)


@dataclass(frozen=True)
class _Job:
    """A measurement: its kind as in `Plan.only`, what people are told of it, and how it is done."""

    kind: str
    note: str
    measure: Measure


def _jobs(plan: Plan) -> list[_Job]:
    """Return what is to be measured; all but training and scaling take the first graph."""
    first = plan.graphs[0]
    jobs: dict[str, list[tuple[str, Measure]]] = {
        "train": [(f"training on {graph}", partial(_train, graph=graph)) for graph in plan.graphs],
        "utilisation": [("utilisation", partial(_utilise, graph=first))],
        "embed": [("embedding", partial(_embed, graph=first))],
        "rank": [("ranking", partial(_rank, graph=first))],
    }
    if "scaling" in plan.only:
        jobs["scaling"] = [(f"scaling: {note}", partial(_scale, part=part)) for note, part in scaling_parts(plan)]
    return [_Job(kind, *job) for kind in plan.only for job in jobs[kind]]


# Functions of the module, which other processes can be told to call.
def _train(workshop: Workshop, graph: str) -> Results:
    return {"train": {workshop.graph(graph).name: _training(measure_training(workshop, graph))}}


def _utilise(workshop: Workshop, graph: str) -> Results:
    return {"train": _utilisation(measure_utilisation(workshop, graph))}


def _embed(workshop: Workshop, graph: str) -> Results:
    return {"embed": plain(measure_embedding(workshop, graph))}


def _rank(workshop: Workshop, graph: str) -> Results:
    return {"rank": plain(measure_ranking(workshop, graph))}


def _scale(workshop: Workshop, part: Part) -> Results:
    return {"scaling": [plain(found) for found in part(workshop)]}


def _training(measured: GraphTraining) -> Results:
    """Return `<batching>.examples_per_second` and the like, with the baselines beside them."""
    batchings = {}
    for name, speed in measured.batchings.items():
        compiled = measured.compiled.get(name)
        batchings[name] = _with_ratios(speed) | {
            "compiled": compiled and _with_ratios(compiled),
            "separate_unpadded": plain(speed.separate_unpadded),
        }
    baselines = ("published", "published_without_unused")
    return {**batchings, **{name: plain(getattr(measured, name)) for name in baselines}}


def _with_ratios(speed: TrainingSpeed) -> Results:
    ratios = {field: value for field, value in vars(speed).items() if field.startswith("ratio")}
    found: Results = plain({**vars(speed.kalm), **ratios})
    return found


def _utilisation(measured: Utilisation) -> Results:
    """Return the lower share of the two ways of batching, by default and compiled, and the rest beside it."""
    figures = {"utilisation": measured.lowest(compiled=False), "utilisation_compiled": measured.lowest(compiled=True)}
    return {**figures, "utilisation_details": plain(measured)}


def plain(value: Any) -> Any:
    """Turn measurements into plain data: a spread is its median, with [smallest, largest] under `spread` beside it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if not isinstance(value, dict):
        return value
    data = {name: part.median if isinstance(part, Spread) else plain(part) for name, part in value.items()}
    spread = {name: [part.smallest, part.largest] for name, part in value.items() if isinstance(part, Spread)}
    return {**data, "spread": spread} if spread else data


def _header(workshop: Workshop) -> Results:
    """Say what the figures belong to."""
    plan = dataclasses.asdict(workshop.plan) | {
        "batch_size": workshop.batch_size,
        "graphs": [workshop.graph(name).name for name in workshop.plan.graphs],
        "threads": torch.get_num_threads(),
        "device": str(workshop.device),
        "published_batch_directed": BATCH_SIZE,
        "published_completions": COMPLETIONS,
    }
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).date().isoformat(),
        "settings": plan | {"run": workshop.config_summary()},
        "machine": dataclasses.asdict(describe_machine(workshop.device)) | {"load_average": _load_average()},
    }


def _load_average() -> float | None:
    """Return how many processes wanted to run in the last minute, where the system tells: a busy machine is a bad clock."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _join(results: Results, new: Results) -> None:
    """Put a measurement's data among those that are there, `train` and `scaling` being filled by several."""
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(results.get(name), dict):
            _join(results[name], value)
        elif name == "scaling":
            results[name] = [*results.get(name, []), *value]
        else:
            results[name] = value


def _write(path: Path, results: Results) -> None:
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))
