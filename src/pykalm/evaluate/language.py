"""Does the model still speak? Perplexity on plain texts and the tasks of lm-eval, in one report. docs/measures.md."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pykalm.errors import UsageError
from pykalm.evaluate.corpora import read_corpus
from pykalm.evaluate.harness import TaskResult, run_tasks
from pykalm.evaluate.perplexity import Perplexity, measure_perplexity
from pykalm.files import replace_file
from pykalm.model.attention import FLEX
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.model.packing import require_own_logits
from pykalm.text.verbalize import Verbalizer

PARTS = ("perplexity", "lm_eval", "lm_eval_other")
"""What a results file keeps of earlier measurements of the same weights."""


@dataclass(frozen=True)
class LanguageSettings:
    """Say what is measured and how. None takes a default: of the window, see perplexity.py; of shots, that of each task."""

    texts: Sequence[str | Path] = ()
    tasks: Sequence[str] = ()
    window: int | None = None
    stride: int | None = None
    limit_tokens: int | None = None
    limit: int | None = None
    shots: int | None = None
    batch_size: int = 4


@dataclass(frozen=True, eq=False)
class LanguageReport:
    """Hold the perplexity of texts, by name, and the results of lm-eval's tasks, by name."""

    graph: str
    protocol: str
    perplexity: Mapping[str, Perplexity]
    tasks: Mapping[str, TaskResult]
    about: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; "lm_eval" has the tasks that count right answers, "lm_eval_other" the others."""
        tasks = {name: task.to_dict() for name, task in self.tasks.items()}
        return {
            "graph": self.graph,
            "protocol": self.protocol,
            **self.about,
            "perplexity": {name: perplexity.to_dict() for name, perplexity in self.perplexity.items()},
            "lm_eval": {name: task for name, task in tasks.items() if "acc" in task},
            "lm_eval_other": {name: task for name, task in tasks.items() if "acc" not in task},
        }

    def save(self, folder: Path, name: str = "language") -> Path:
        """Write `name`.json; returns its path. What the file holds of other texts and tasks, of the same weights, stays."""
        path = folder / f"{name}.json"
        content = _joined(path, self.to_dict())
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))
        return path


def _joined(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Return new results beside those that a file has of the same weights."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        parts = {key: {**old[key], **new[key]} for key in PARTS}
        return new | parts if old["weights"] == new["weights"] else new
    except (OSError, ValueError, KeyError, TypeError):  # none there, or none of ours: replaced
        return new


def measure_language(
    graph: str,
    encoder: Encoder,
    verbalizer: Verbalizer,
    settings: LanguageSettings,
    *,
    about: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> LanguageReport:
    """Measure perplexity on texts and run lm-eval's tasks, with the model's own attention, in the run's precision.

    Raises UsageError where nothing is asked or a text or task is not there, ModelError where kalm does not compute the
    logits that the model gives, KalmError where lm-eval is missing.
    """
    if not settings.texts and not settings.tasks:
        raise UsageError("wanted texts or tasks to measure, found neither. Name some, such as wikitext2 or mmlu.")
    corpora = [read_corpus(text) for text in settings.texts]
    with own_attention(encoder):
        if corpora:
            require_own_logits(encoder, verbalizer)
        perplexity = {
            corpus.name: measure_perplexity(
                encoder, verbalizer.tokenizer, corpus, window=settings.window, stride=settings.stride,
                limit_tokens=settings.limit_tokens, progress=progress,
            )
            for corpus in corpora
        }  # fmt: skip
        tasks = run_tasks(
            encoder, verbalizer.tokenizer, settings.tasks, shots=settings.shots, limit=settings.limit,
            batch_size=settings.batch_size,
        ) if settings.tasks else {}  # fmt: skip
    facts = {"precision": _precision(encoder), "weights": encoder.fingerprint()}
    return LanguageReport(graph, _protocol(settings, encoder), perplexity, tasks, {**(about or {}), **facts})


@contextlib.contextmanager
def own_attention(encoder: Encoder) -> Iterator[None]:
    """Let a model compute attention as it does elsewhere, not in the way that suits packed rows, for a while."""
    kept = encoder.attention
    encoder.use_attention("sdpa" if kept in (FLEX, MATMUL_ATTENTION) else kept)
    try:
        yield
    finally:
        encoder.use_attention(kept)


def _precision(encoder: Encoder) -> str:
    return "bfloat16" if encoder.compute_dtype == torch.bfloat16 else "float32"


def _protocol(settings: LanguageSettings, encoder: Encoder) -> str:
    """Say how figures with these limits are made, whichever texts and tasks they are of."""
    some = f"the first {settings.limit_tokens} tokens of each" if settings.limit_tokens else "whole texts"
    asked = f"the first {settings.limit} questions of each task" if settings.limit else "all questions"
    return (
        f"{_precision(encoder)}; perplexity: {some}, every document from its own beginning, sliding windows, likelihoods "
        f"added in float64; lm-eval: {asked}"
    )
