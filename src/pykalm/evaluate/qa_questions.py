"""Which questions are asked about a split, which examples stand before them, and which answers are right."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pykalm.errors import UsageError
from pykalm.evaluate.corruptions import corrupt_triples, hard_negatives
from pykalm.evaluate.links import choose_triples
from pykalm.graph.graph import IntArray, KnowledgeGraph
from pykalm.graph.known import KnownAnswers, known_answers
from pykalm.text.questions import TASKS, Question, Task


def build_questions(
    graph: KnowledgeGraph, tasks: Sequence[Task], *, split: str, limit: int | None, seed: int
) -> tuple[dict[Task, list[Question]], str]:
    """Return the questions of every task about a split's triples, or about `limit` of them drawn by seed; and which.

    Classification asks about every triple and about one corruption of each, and about the false triples that the graph
    ships for the split. Raises GraphError for a split that is missing or empty, UsageError for a limit below 1.
    """
    triples, sampling = choose_triples(graph, split, limit, seed)
    questions: dict[Task, list[Question]] = {}
    for task in tasks:
        if task == "classification":
            hard = hard_negatives(graph, split, limit=limit, seed=seed)
            questions[task] = truth_questions(triples, corrupt_triples(graph, triples, seed=seed), hard)
        else:
            questions[task] = [Question(task, *triple) for triple in triples.tolist()]
    return questions, sampling


def truth_questions(true: IntArray, corrupted: IntArray, hard: IntArray) -> list[Question]:
    """Return the questions whether triples hold: true ones, corrupted ones, and false ones that a graph ships."""
    kinds: tuple[tuple[IntArray, bool, Literal["random", "hard"]], ...]
    kinds = ((true, True, "random"), (corrupted, False, "random"), (hard, False, "hard"))
    return [
        Question("classification", head, relation, tail, is_true, source)
        for triples, is_true, source in kinds
        for head, relation, tail in triples.tolist()
    ]


def hard_set(questions: Sequence[Question]) -> list[int]:
    """Return the places of the classifications against shipped negatives: these, and all true triples; maybe none."""
    has_hard = any(question.source == "hard" for question in questions)
    return [place for place, q in enumerate(questions) if has_hard and (q.is_true or q.source == "hard")]


def choose_examples(graph: KnowledgeGraph, task: Task, *, count: int, split: str, seed: int) -> list[Question]:
    """Draw examples for a task from train, the same for every question; of different relations while there are some.

    None asks what a triple of the split asks, so that none gives an answer away. Of the classifications every other one is
    a corruption. Raises UsageError where train has too few triples for it.
    """
    generator = np.random.default_rng([seed, TASKS.index(task)])
    shuffled = generator.permutation(graph.triples("train"))
    asked = {tuple(row) for row in graph.both_directions(split)[:, :2].tolist()} if split != "train" else set()
    free = [
        (head, relation, tail)
        for head, relation, tail in shuffled.tolist()
        if (head, relation) not in asked and (tail, relation + graph.num_relations) not in asked
    ]
    times_before: Counter[int] = Counter()
    turns = []
    for _, relation, _ in free:
        turns.append(times_before[relation])
        times_before[relation] += 1
    chosen = [free[place] for place in np.argsort(turns, kind="stable")[:count]]
    if len(chosen) < count:
        raise UsageError(
            f"wanted {count} examples from train that ask nothing of the {split} split, found {len(chosen)}. Lower --shots."
        )
    if task != "classification":
        return [Question(task, *triple) for triple in chosen]
    triples = np.array(chosen, dtype=np.int64).reshape(-1, 3)
    false = corrupt_triples(graph, triples, seed=seed)
    flips = generator.permutation(np.arange(count) % 2 == 1)
    rows = np.where(flips[:, None], false, triples)
    truths = zip(rows.tolist(), flips.tolist(), strict=True)
    return [Question(task, head, relation, tail, not flip) for (head, relation, tail), flip in truths]


class RightAnswers:
    """Know every right answer to a question: all that a split of the graph knows, by name, the triple's own first."""

    def __init__(self, graph: KnowledgeGraph) -> None:
        self._graph, self._known = graph, known_answers(graph)
        self._relations = _relations_between(graph)

    def find(self, question: Question, gold: str) -> list[str]:
        """Return the right answers, each once."""
        graph, known = self._graph, self._known
        names: list[str] = []
        if question.task == "relation":
            names = [graph.relation_texts[r] for r in self._relations.get((question.head, question.tail), ())]
        elif question.task != "classification":
            names = [graph.entity_names[entity] for entity in right_entities(question, known, graph.num_relations)]
        return list(dict.fromkeys([gold, *names]))


def right_entities(question: Question, known: KnownAnswers, num_relations: int) -> list[int]:
    """Return the entities that are known to answer a question for a tail or a head."""
    head, relation = question.head, question.relation
    if question.task == "head":
        head, relation = question.tail, question.relation + num_relations
    found: list[int] = known.answers(head, relation).tolist()
    return found


def _relations_between(graph: KnowledgeGraph) -> Mapping[tuple[int, int], list[int]]:
    relations: dict[tuple[int, int], list[int]] = {}
    for triples in graph.splits.values():
        for head, relation, tail in triples.tolist():
            relations.setdefault((head, tail), []).append(relation)
    return relations
