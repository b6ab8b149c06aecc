"""Questions put to a run as text: measure its answers over a split, or rank the answers to one."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from pykalm.api import about_run, graph_label, results_name, save_report
from pykalm.errors import UsageError
from pykalm.evaluate.qa import MAX_NEW_TOKENS, QaReport, QaSettings
from pykalm.evaluate.qa import evaluate_qa as measure_qa
from pykalm.graph.catalogue import load_graph
from pykalm.graph.graph import KnowledgeGraph
from pykalm.model.encoder import Progress
from pykalm.model.generate import Speaker
from pykalm.model.name_trie import NameTrie
from pykalm.model.run import Run, load_baseline
from pykalm.text.questions import TASKS, Question, QuestionWriter, Task, Wording

__all__ = ["QaReport", "QaSettings", "RankedAnswer", "evaluate_qa", "rank_answers"]


def evaluate_qa(
    run: Run,
    *,
    tasks: Sequence[str] = TASKS,
    shots: int = 0,
    descriptions: bool = False,
    constrained: bool = False,
    ranked: int = 0,
    wording: str = "published",
    max_new_tokens: int = MAX_NEW_TOKENS,
    split: str | None = None,
    baseline: bool = False,
    graph: KnowledgeGraph | str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> QaReport:
    """Let a run answer questions in words, judge the answers, and save all under RUN/results. EVALUATION.md §2.

    tasks: of tail, head, relation, classification; shots: solved examples from train before each question; descriptions:
    whether entities stand with theirs; constrained: answers are forced onto the choices; ranked: so many of the likeliest
    choices are found as well; wording: "run" asks for tails and heads in the words that the run was trained with. split,
    baseline, graph, limit as in `evaluate_links`. An interrupted call goes on where it stopped when it is made again.
    Raises UsageError for wrong values, UnsavedReport, which holds the report, where RUN/results cannot be written.
    """
    settings = QaSettings(
        tuple(cast(Sequence[Task], tasks)),
        shots,
        descriptions,
        constrained,
        ranked,
        max_new_tokens,
        cast(Wording, wording),
    )
    split = run.config.evaluation.split if split is None else split
    if graph is not None:
        other = graph if isinstance(graph, KnowledgeGraph) else load_graph(graph)
        run = dataclasses.replace(run, graph=other, verbalizer=run.verbalizer.for_graph(other))
    label = graph_label(run.graph) if graph is not None else ""
    name = results_name("qa", *settings.label(), label, split=split, limit=limit, baseline=baseline)
    measured = load_baseline(run) if baseline else run
    report = measure_qa(
        run.graph,
        measured.encoder,
        run.verbalizer,
        settings,
        split=split,
        limit=limit,
        seed=run.config.seed,
        keep_in=run.path / "results" / f"{name}.jsonl",
        about=about_run(run, baseline=baseline),
        progress=progress,
    )
    save_report(run, report, name)
    return report


@dataclass(frozen=True)
class RankedAnswer:
    """Hold one of the likeliest answers: its place, its text, the ids of the entities of this name, its log-likelihood."""

    rank: int
    name: str
    entities: tuple[str, ...]
    log_likelihood: float

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain data, for JSON."""
        return asdict(self)


def rank_answers(
    run: Run,
    *,
    relation: str,
    head: str | None = None,
    tail: str | None = None,
    k: int = 5,
    descriptions: bool = False,
    wording: Wording = "published",
) -> list[RankedAnswer]:
    """Return the k entities that a run is likeliest to write in answer to (head, relation, ?) or (?, relation, tail).

    Unlike `predict`, which compares vectors, this takes the likelihood of every token of a name, by a beam search over the
    names. Raises UsageError unless one of head and tail is given and k ≥ 1; GraphError for what the graph lacks.
    """
    if (head is None) == (tail is None) or k < 1:
        raise UsageError(f"wanted one of head and tail, and k of 1 or more; found head={head!r}, tail={tail!r}, k={k}.")
    graph, asked = run.graph, run.graph.find_relation(relation)
    given = graph.find_entity(head if head is not None else str(tail)).entity
    is_inverse = (asked >= graph.num_relations) != (tail is not None)
    task: Task = "head" if is_inverse else "tail"
    question = Question(task, given, asked % graph.num_relations, given)
    writer = QuestionWriter(run.verbalizer, descriptions=descriptions, wording=wording)
    names = NameTrie(writer.answer_tokens(task))
    speaker = Speaker(
        run.encoder, writer.prompts([question]), end_id=writer.end_id(), stop_ids=writer.stop_ids(),
        max_new_tokens=MAX_NEW_TOKENS, names=names,
    )  # fmt: skip
    (ranked,) = speaker.rank(np.zeros(1, dtype=np.int64), k)
    choices, bearers = writer.choices(task), _bearers(graph)
    return [
        RankedAnswer(place, choices[number], bearers[choices[number]], score)
        for place, (number, score) in enumerate(ranked, start=1)
    ]


def _bearers(graph: KnowledgeGraph) -> dict[str, tuple[str, ...]]:
    """Return the ids of the entities of every name."""
    found: dict[str, tuple[str, ...]] = {}
    for entity, name in zip(graph.entity_ids, graph.entity_names, strict=True):
        found[name] = (*found.get(name, ()), entity)
    return found
