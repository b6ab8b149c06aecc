"""Measuring the geometry of a run's representations, as people call it."""

import logging
from pathlib import Path

from pykalm.api import about_run, results_name, save_report
from pykalm.errors import UsageError
from pykalm.evaluate.corpora import read_sentences
from pykalm.evaluate.representations import GeometryReport, measure_representations
from pykalm.model.encoder import Progress
from pykalm.model.run import Run, load_baseline

__all__ = ["GeometryReport", "evaluate_geometry"]

log = logging.getLogger(__name__)

SENTENCES = 1000
"""Plain sentences that are measured: 30,000 tokens."""


def evaluate_geometry(
    run: Run,
    *,
    split: str | None = None,
    sentences: str | Path = "wikitext103",
    limit: int | None = None,
    baseline: bool = False,
    progress: Progress | None = None,
) -> GeometryReport:
    """Measure how queries, candidates and plain sentences lie, and Theorem 1, and save it under RUN/results. docs/measures.md.

    split: evaluation.split of the run by default; sentences: wikitext103, wikitext2 or a text file to draw them from;
    where WikiText is not on this machine they are left out, and a warning says so. limit: so many entities, queries and
    sentences at most; baseline: measure the unaligned model, at the temperature of the aligned one. Raises UsageError for
    a limit below 2, UnsavedReport, which holds the report, where RUN/results cannot be written. In a launch of several
    processes all call it alike and share the texts; the main one writes.
    """
    split = run.config.evaluation.split if split is None else split
    measured = load_baseline(run) if baseline else run
    report = measure_representations(
        run.graph,
        measured.encoder,
        run.verbalizer,
        temperature=run.encoder.temperature(),
        split=split,
        sentences=_sentences(sentences, count=min(SENTENCES, limit or SENTENCES), seed=run.config.seed),
        limit=limit,
        seed=run.config.seed,
        about=about_run(run, baseline=baseline),
        progress=progress,
    )
    save_report(run, report, results_name("geometry", split=split, limit=limit, unit="entities", baseline=baseline))
    return report


def _sentences(source: str | Path, *, count: int, seed: int) -> list[str]:
    """Draw plain sentences, or say why there are none; a file that was named must be there."""
    try:
        return read_sentences(source, count=count, seed=seed)
    except UsageError as error:
        if source != "wikitext103":
            raise
        log.warning("kalm: no plain sentences are measured. %s", error)
        return []
