"""What can be answered without a model: the most frequent answer, a copy from the description, the majority."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from pykalm.evaluate.answers import Mentions, Words, split_words
from pykalm.graph.graph import IntArray, KnowledgeGraph
from pykalm.text.questions import NO, YES, Question


class Baselines:
    """Answer questions from the training triples and the descriptions alone.

    - most-frequent: the entity that most often stands in train where the answer stands in triples of this relation;
      for classification what most often holds among the valid triples of the relation and the false ones shipped there.
    - copy-description: of the entities that the given entity's description mentions, that which is the most frequent
      answer of this relation, then that which is mentioned first; nothing where none is mentioned.
    - whole-description: the description as it stands. It "contains" the answer wherever one could copy it.
    - majority: the most frequent answer whatever the relation; for classification, the same answer to all.
    """

    def __init__(self, graph: KnowledgeGraph) -> None:
        self.graph = graph
        train = graph.both_directions("train")
        self._of_relation: dict[int, Counter[int]] = {}
        for relation, answer in train[:, 1:].tolist():
            self._of_relation.setdefault(relation, Counter())[answer] += 1
        forward = train[:, 1] < graph.num_relations
        self._everywhere = {"tail": _most_frequent(train[forward, 2]), "head": _most_frequent(train[~forward, 2])}
        self._relation = _most_frequent(train[forward, 1])
        self._holds = _share_that_holds(graph)
        self._mentions = Mentions(graph.entity_names)
        self._bearers: dict[Words, list[int]] = {}
        for entity, name in enumerate(graph.entity_names):
            self._bearers.setdefault(split_words(name), []).append(entity)

    def answers(self, question: Question) -> dict[str, str]:
        """Return the answer of every baseline that the task has."""
        graph = self.graph
        if question.task == "relation":
            return {"majority": graph.relation_texts[self._relation]}
        if question.task == "classification":
            is_likely = self._holds.get(question.relation, 0.5) >= 0.5
            return {"most-frequent": YES if is_likely else NO, "majority": YES}
        is_tail = question.task == "tail"
        counts = self._of_relation.get(question.relation + (0 if is_tail else graph.num_relations), Counter())
        frequent = min(counts, key=lambda e: (-counts[e], e)) if counts else self._everywhere[question.task]
        given = question.head if is_tail else question.tail
        return {
            "most-frequent": graph.entity_names[frequent],
            "copy-description": self._copied(given, counts),
            "whole-description": graph.entity_descriptions[given],
            "majority": graph.entity_names[self._everywhere[question.task]],
        }

    def _copied(self, given: int, counts: Mapping[int, int]) -> str:
        """Return the likeliest name that an entity's description mentions beside its own, or nothing."""
        own = split_words(self.graph.entity_names[given])
        mentioned = [name for name in self._mentions.find(self.graph.entity_descriptions[given]) if name != own]
        if not mentioned:
            return ""
        chances = [max(counts.get(entity, 0) for entity in self._bearers[name]) for name in mentioned]
        return self.graph.entity_names[self._bearers[mentioned[int(np.argmax(chances))]][0]]


def _most_frequent(numbers: IntArray) -> int:
    """Return the number that occurs most often, the lowest of several; 0 for none."""
    return int(np.argmax(np.bincount(numbers, minlength=1)))


def _share_that_holds(graph: KnowledgeGraph) -> dict[int, float]:
    """Return for every relation the share of true triples among those of valid, true and shipped as false."""
    if not len(graph.negatives.get("valid", ())) or "valid" not in graph.splits:
        return {}
    true, false = (
        np.bincount(rows[:, 1], minlength=graph.num_relations)
        for rows in (graph.triples("valid"), graph.negatives["valid"])
    )
    return {int(r): float(true[r] / (true[r] + false[r])) for r in np.flatnonzero(true + false)}
