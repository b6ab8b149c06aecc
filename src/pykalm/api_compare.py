"""Compare runs from what they have saved, and re-rank the answers of one: functions for a notebook and the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pykalm.api import about_run, open_index, results_name, save_report
from pykalm.errors import UsageError
from pykalm.evaluate.bootstrap import SAMPLES
from pykalm.evaluate.compare import Measurement, compare, read_measurement
from pykalm.evaluate.rerank import K
from pykalm.evaluate.rerank_report import RerankReport, rerank_links
from pykalm.model.encoder import Progress
from pykalm.model.run import Run

__all__ = ["compare_runs", "evaluate_rerank"]

VALID_TRIPLES = 500


def compare_runs(
    paths: Sequence[str | Path],
    *,
    split: str = "test",
    limit: int | None = None,
    baseline: bool = False,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Set the saved link prediction of several runs side by side, with intervals and their differences to the first.

    split, limit: which measurement of each is read; baseline: add the unaligned model of the first. No model is loaded.
    Returns plain data (evaluate.compare.compare). Raises UsageError for fewer than two models, RunError where a
    measurement is missing or two of them are not of the same triples.
    """
    folders = [Path(path) for path in paths]
    if len(folders) + baseline < 2 or not folders:
        raise UsageError(f"wanted two runs or more to compare, found {len(folders)}. Name another, or add --baseline.")
    labels = _labels(folders)
    measured = [
        _read(folder, label, split, limit, is_baseline=False) for folder, label in zip(folders, labels, strict=True)
    ]
    if baseline:
        measured.append(_read(folders[0], f"{labels[0]}, unaligned", split, limit, is_baseline=True))
    return compare(measured, samples=samples, seed=seed)


def _read(folder: Path, label: str, split: str, limit: int | None, *, is_baseline: bool) -> Measurement:
    options = f"{' --baseline' * is_baseline} --split {split}{f' --limit {limit}' if limit else ''}"
    return read_measurement(
        folder / "results",
        results_name("links", split=split, limit=limit, baseline=is_baseline),
        label=label,
        remedy=f"Measure it: kalm evaluate links {folder}{options}",
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as much of the path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len({folder.resolve() for folder in folders}):
            return labels
    return [str(folder) for folder in folders]


def evaluate_rerank(
    run: Run,
    *,
    k: int = K,
    split: str | None = None,
    limit: int | None = None,
    valid_limit: int | None = VALID_TRIPLES,
    progress: Progress | None = None,
) -> RerankReport:
    """Re-rank link prediction's best k answers by the language model's likelihood, and save what it brings.

    How much the language model counts is chosen on valid, or on `valid_limit` of its triples. split: evaluation.split of
    the run by default; limit: so many of its triples only, drawn by seed. Raises UnsavedReport, which holds the report,
    where RUN/results cannot be written; UsageError for k, a limit or a split that cannot be. In a launch of several
    processes all call it alike and share the work; the main one writes.
    """
    split = run.config.evaluation.split if split is None else split
    report = rerank_links(
        run.graph,
        run.encoder,
        run.verbalizer,
        open_index(run),
        split=split,
        k=k,
        limit=limit,
        valid_limit=valid_limit,
        seed=run.config.seed,
        chunk_queries=run.config.evaluation.chunk_queries,
        device=run.encoder.device,
        about=about_run(run, baseline=False),
        progress=progress,
    )
    save_report(run, report, results_name("rerank", split=split, limit=limit))
    return report
