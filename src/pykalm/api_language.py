"""Measuring the language of a run, as people call it: perplexity and lm-eval's tasks, aligned or unaligned."""

from collections.abc import Sequence
from pathlib import Path

from pykalm.api import about_run, results_name, save_report
from pykalm.evaluate.language import LanguageReport, LanguageSettings, measure_language
from pykalm.model.encoder import Progress
from pykalm.model.run import Run, load_baseline

__all__ = ["LanguageReport", "evaluate_language"]


def evaluate_language(
    run: Run,
    *,
    texts: Sequence[str | Path] | str | Path = (),
    tasks: Sequence[str] | str = (),
    window: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 4,
    baseline: bool = False,
    progress: Progress | None = None,
) -> LanguageReport:
    """Measure perplexity on texts and lm-eval's tasks, and save them under RUN/results. docs/measures.md.

    texts: one or several of wikitext2, wikitext103 and text files, wikitext2 where neither texts nor tasks are named;
    window and stride in tokens; limit_tokens: the beginning of each text only; limit: the first so many questions of each
    task; baseline: measure the unaligned model instead. Raises UsageError for what is not there, KalmError where lm-eval
    is missing, UnsavedReport, which holds the report, where RUN/results cannot be written. Several processes each do all
    of it.
    """
    measured = load_baseline(run) if baseline else run
    names = (tasks,) if isinstance(tasks, str) else tasks
    sources = (texts,) if isinstance(texts, str | Path) else texts
    settings = LanguageSettings(
        texts=sources or (() if names else ("wikitext2",)), tasks=names, window=window, stride=stride,
        limit_tokens=limit_tokens, limit=limit, shots=shots, batch_size=batch_size,
    )  # fmt: skip
    report = measure_language(
        run.graph.name,
        measured.encoder,
        run.verbalizer,
        settings,
        about=about_run(run, baseline=baseline),
        progress=progress,
    )
    tokens = f"{limit_tokens}-tokens" if limit_tokens else ""
    save_report(run, report, results_name("language", tokens, limit=limit, unit="questions", baseline=baseline))
    return report
