"""Question answering by generation: four tasks over the triples of a split. EVALUATION.md §2."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pykalm.errors import UsageError
from pykalm.evaluate.generations import GenerationLog, Line
from pykalm.evaluate.qa_by_score import classify_by_score
from pykalm.evaluate.qa_questions import build_questions, choose_examples
from pykalm.evaluate.qa_results import Judge
from pykalm.evaluate.qa_session import Exam, Session
from pykalm.files import replace_file
from pykalm.graph.graph import KnowledgeGraph
from pykalm.model.encoder import Encoder, Progress
from pykalm.processes import on_main
from pykalm.text.questions import TASKS, QuestionWriter, Task, Wording
from pykalm.text.verbalize import Verbalizer

FORMAT = 1
MAX_NEW_TOKENS = 32
EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class QaSettings:
    """Say how questions are asked: which tasks, with how many examples, with descriptions or without, and how answered.

    constrained: answers are forced onto the choices of a task; ranked: so many of the likeliest choices are found too;
    wording: of the questions for tails and heads (text.questions). Raises UsageError for what cannot be.
    """

    tasks: tuple[Task, ...] = TASKS
    shots: int = 0
    descriptions: bool = False
    constrained: bool = False
    ranked: int = 0
    max_new_tokens: int = MAX_NEW_TOKENS
    wording: Wording = "published"

    def __post_init__(self) -> None:
        """Check the values."""
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise UsageError(f"wanted tasks among {', '.join(TASKS)}, found {', '.join(map(repr, unknown))}.")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UsageError(f"wanted one task or more, each once, found {list(self.tasks)}.")
        if self.wording not in ("published", "run"):
            raise UsageError(f"wanted the wording published or run, found {self.wording!r}.")
        if self.shots < 0 or self.ranked < 0 or self.max_new_tokens < 1:
            found = f"{self.shots}, {self.ranked} and {self.max_new_tokens}"
            raise UsageError(f"wanted shots and ranked of 0 or more and a limit of 1 token or more, found {found}.")

    def label(self) -> list[str]:
        """Return the parts of a file's name that tell these settings from the plain ones."""
        parts = {
            "descriptions": self.descriptions,
            f"{self.shots}-shot": self.shots > 0,
            "run-wording": self.wording == "run",
            "constrained": self.constrained,
            f"ranked-{self.ranked}": self.ranked > 0,
            f"{self.max_new_tokens}-tokens": self.max_new_tokens != MAX_NEW_TOKENS,
        }
        return [part for part, is_set in parts.items() if is_set]

    def to_dict(self) -> dict[str, Any]:
        """Return all but the tasks, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "tasks"}


@dataclass(frozen=True, eq=False)
class QaReport:
    """Hold the results of every task, and a line for every question with what was asked, written and right.

    `about` names model, seed and settings; `fingerprint` stands for all that the answers depend on.
    """

    graph: KnowledgeGraph
    split: str
    protocol: str
    fingerprint: str
    tasks: Mapping[str, Mapping[str, Any]]
    lines: Sequence[Line]
    about: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the results for JSON, with the first few lines of every task as examples."""
        names = {"graph": self.graph.name, "split": self.split, "protocol": self.protocol}
        shown = [[line for line in self.lines if line["task"] == task][:EXAMPLES_SHOWN] for task in self.tasks]
        examples = [line for lines in shown for line in lines]
        return {**names, **self.about, "fingerprint": self.fingerprint, "tasks": dict(self.tasks), "examples": examples}

    def save(self, folder: Path, name: str = "qa") -> Path:
        """Write `name`.jsonl, a line a question, and `name`.json; return its path.

        Tasks that were measured before under the same fingerprint, and are not in this report, are kept.
        """
        log, path = GenerationLog(folder / f"{name}.jsonl", self.fingerprint), folder / f"{name}.json"
        others = {task: saved for task, saved in _saved_tasks(path, self.fingerprint).items() if task not in self.tasks}
        log.replace([*self.lines, *(line for line in log.kept if line["task"] in others)])
        result = self.to_dict()
        text = json.dumps({**result, "tasks": {**result["tasks"], **others}}, indent=2, ensure_ascii=False) + "\n"
        replace_file(path, partial(_write_text, text=text))
        return path


def evaluate_qa(
    graph: KnowledgeGraph,
    encoder: Encoder,
    texts: Verbalizer,
    settings: QaSettings,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    keep_in: Path | None = None,
    about: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> QaReport:
    """Ask a model about the triples of a split, or about `limit` of them drawn by seed, and judge its answers.

    keep_in: the file (.jsonl) where answers are kept as they come; those that it holds of the same model, texts and
    settings are not asked again. progress is called with (prompts answered, prompts in all). In a launch of several
    processes all call it alike and share the prompts. Raises GraphError for a split that is missing or empty,
    UsageError for a wrong limit, ModelError for a prompt that is too long.
    """
    asked, sampling = build_questions(graph, settings.tasks, split=split, limit=limit, seed=seed)
    writer = QuestionWriter(texts, descriptions=settings.descriptions, wording=settings.wording)
    fingerprint = _fingerprint(graph, encoder, writer, [settings.to_dict(), split, seed])
    log = on_main(lambda: GenerationLog(keep_in, fingerprint)) if keep_in else None
    session = Session(encoder, writer, settings.constrained, settings.ranked, settings.max_new_tokens, log=log)
    judge = Judge(graph, writer)
    exams = []
    for task, questions in asked.items():
        examples = choose_examples(graph, task, count=settings.shots, split=split, seed=seed)
        exams.append(Exam(task, questions, writer.prompts(questions, examples)))
    lines: list[Line] = []
    results: dict[str, dict[str, Any]] = {}
    counted = _counted(progress, [exam.num_prompts for exam in exams])
    for exam, report in zip(exams, counted, strict=True):
        answered = session.take(exam, judge.line, report)
        lines += answered
        results[exam.task] = judge.results(exam.questions, answered)
    if "classification" in asked and split != "valid" and len(graph.splits.get("valid", ())):
        results["classification"]["by_score"] = classify_by_score(
            graph, encoder, texts, asked["classification"], seed=seed
        )
    protocol = _protocol(settings, graph, sampling)
    return QaReport(graph, split, protocol, fingerprint, results, lines, {**(about or {}), **settings.to_dict()})


def _counted(progress: Progress | None, sizes: Sequence[int]) -> list[Callable[[int], None]]:
    """Return for each of some tasks what is told how much of it is done, and tells how much of all."""
    total = sum(sizes)

    def tell(before: int, done: int) -> None:
        if progress is not None:
            progress(before + done, total)

    return [partial(tell, sum(sizes[:place])) for place in range(len(sizes))]


def _protocol(settings: QaSettings, graph: KnowledgeGraph, sampling: str) -> str:
    """Say in a sentence how was asked and judged."""
    how = "forced onto the choices" if settings.constrained else f"at most {settings.max_new_tokens} tokens"
    return (
        f"greedy, {how}, up to the end token or a line end; {settings.shots} examples from train; "
        f"{'with' if settings.descriptions else 'without'} descriptions; any-valid by {', '.join(graph.splits)}; {sampling}"
    )


def _fingerprint(graph: KnowledgeGraph, encoder: Encoder, writer: QuestionWriter, settings: object) -> str:
    """Name what the answers depend on: weights, texts and tokenizer, triples, and how is asked."""
    content = [FORMAT, encoder.fingerprint(), writer.fingerprint(), graph.fingerprint(), settings]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _saved_tasks(path: Path, fingerprint: str) -> dict[str, Any]:
    """Return the results of a fingerprint that a file holds; none where there is no such file."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_same = isinstance(saved, dict) and saved.get("fingerprint") == fingerprint
    return dict(saved["tasks"]) if is_same else {}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
