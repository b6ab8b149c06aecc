"""Compare measurements of link prediction from their rank files, triple by triple. docs/compare.md."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pykalm.errors import RunError
from pykalm.evaluate.bootstrap import (
    LEVEL,
    SAMPLES,
    difference_intervals,
    metric_intervals,
    plain_intervals,
    triple_scores,
)
from pykalm.evaluate.links import RANKS_HEADER
from pykalm.evaluate.ranking import FloatArray, RankTable, join_rank_tables, rank_metrics

COLUMNS = tuple(RANKS_HEADER.split("\t"))
ABOUT = ("model", "aligned", "template", "descriptions", "max_entity_tokens", "seed")
"""What a results file says of a model beside its figures."""
SHOWN = 3
Triple = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Hold what `kalm evaluate links` left of one model: N triples by ids, sorted, and their ranks in both directions."""

    label: str
    file: Path
    about: Mapping[str, Any]
    triples: list[Triple]
    tail: RankTable
    head: RankTable


def read_measurement(results: Path, name: str, *, label: str, remedy: str) -> Measurement:
    """Read `name`.ranks.tsv and `name`.json of a results folder; the order of the triples does not count.

    Raises RunError where one of them is missing (with the remedy) or damaged.
    """
    file = results / f"{name}.ranks.tsv"
    if not file.is_file():
        others = sorted(path.name for path in results.glob("links*.ranks.tsv"))
        raise RunError(f"{file}: wanted saved ranks, found {', '.join(others) or 'none in this folder'}. {remedy}")
    try:
        about = dict(json.loads((results / f"{name}.json").read_text(encoding="utf-8")))
        str(about["graph"]), str(about["split"]), str(about["protocol"])
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"columns {reader.fieldnames}")
            sides = _sides(list(reader))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: damaged, or not with {name}.json beside it ({error}). {remedy}") from error
    (triples, tail), (_, head) = sides["tail"], sides["head"]
    return Measurement(label, file, about, triples, tail, head)


def _sides(rows: Sequence[Mapping[str, str]]) -> dict[str, tuple[list[Triple], RankTable]]:
    """Return the triples of both directions, sorted, with their ranks; raises ValueError where they are not the same."""
    sides = {}
    for side in ("tail", "head"):
        chosen = sorted((row for row in rows if row["direction"] == side), key=_triple)
        numbers = np.array([[float(row[column]) for column in COLUMNS[4:]] for row in chosen]).reshape(-1, 4)
        if (numbers[:, :3] < 1).any() or not np.isfinite(numbers).all():
            raise ValueError("a rank below 1 or no number")
        whole = numbers.astype(np.int64)
        sides[side] = [_triple(row) for row in chosen], RankTable(whole[:, 0], numbers[:, 1], whole[:, 2], whole[:, 3])
    if not sides["tail"][0] or sides["tail"][0] != sides["head"][0] or len(rows) != 2 * len(sides["tail"][0]):
        raise ValueError("not every triple in both directions")
    return sides


def _triple(row: Mapping[str, str]) -> Triple:
    return row["head"], row["relation"], row["tail"]


def require_comparable(first: Measurement, other: Measurement) -> None:
    """Raise RunError, with all that differs, unless two measurements ranked the same triples among the same candidates."""
    differences = [
        f"{what}: {first.about[what]!r} and {other.about[what]!r}"
        for what in ("graph", "split")
        if first.about[what] != other.about[what]
    ]
    missing, added = Counter(first.triples) - Counter(other.triples), Counter(other.triples) - Counter(first.triples)
    for count, where in ((missing, first), (added, other)):
        if count:
            differences.append(f"triples of {where.file} only: {count.total()}, such as {_shown(count)}")
    if not (missing or added):
        sides = ((first.tail, other.tail), (first.head, other.head))
        apart = np.any([one.num_candidates != two.num_candidates for one, two in sides], axis=0)
        if apart.any():
            triples = Counter(first.triples[row] for row in np.flatnonzero(apart).tolist())
            differences.append(
                f"number of candidates, so other entities or other known answers: {len(triples)} triples, such as "
                f"{_shown(triples)}"
            )
    if differences:
        raise RunError(
            f"wanted two measurements of the same triples of the same graph, found {first.file} and {other.file}, which "
            "differ:\n  " + "\n  ".join(differences) + "\nMeasure both alike: kalm evaluate links RUN --split ... "
            "--limit ... (a limit draws by the seed of the run)."
        )


def _shown(triples: Counter[Triple]) -> str:
    return ", ".join(f"({', '.join(triple)})" for triple in list(triples)[:SHOWN])


def compare(measurements: Sequence[Measurement], *, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """Return the metrics of several models with their intervals, and the differences to the first, as plain data.

    Raises RunError where two of them did not rank the same triples among the same candidates.
    """
    first = measurements[0]
    for other in measurements[1:]:
        require_comparable(first, other)
    reference = triple_scores(first.tail, first.head)
    return {
        **{key: first.about[key] for key in ("graph", "split", "protocol")},
        "num_triples": len(first.triples),
        "bootstrap": {"unit": "triple, both directions", "samples": samples, "seed": seed, "level": LEVEL},
        "runs": [
            _row(measured, None if measured is first else reference, samples=samples, seed=seed)
            for measured in measurements
        ],
    }


def _row(measured: Measurement, reference: FloatArray | None, *, samples: int, seed: int) -> dict[str, Any]:
    """Return the figures of one model, with the difference to the scores (N, 4) of a reference where there is one."""
    scores = triple_scores(measured.tail, measured.head)
    difference = None
    if reference is not None:
        found = difference_intervals(scores, reference, samples=samples, seed=seed)
        difference = {
            name: {**interval.to_dict(), "excludes_zero": interval.excludes_zero} for name, interval in found.items()
        }
    return {
        "label": measured.label,
        "file": str(measured.file),
        **{key: measured.about[key] for key in ABOUT if key in measured.about},
        "metrics": rank_metrics(join_rank_tables([measured.head, measured.tail])).to_dict(),
        "intervals": plain_intervals(metric_intervals(scores, samples=samples, seed=seed)),
        "difference": difference,
    }
