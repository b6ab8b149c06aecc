"""Answers to (h, r, ?) and (t, r⁻¹, ?), with what is known of each and how the question was understood."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from pykalm.errors import GraphError, UsageError
from pykalm.evaluate.links import GraphTexts
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.known import known_answers
from pykalm.graph.names import EntityMatch
from pykalm.model.index import EntityIndex, TextEncoder
from pykalm.text.texts import TokenIds

FREE_TEXT_HINT = (
    " For an entity that the graph lacks, say that it is free text (--free-text, free_text=True), "
    'best as "name: description".'
)


class QueryTexts(GraphTexts, Protocol):
    """Give the token sequences of queries, of any entity (text.verbalize.Verbalizer does)."""

    def query(self, head: int, relation: int) -> TokenIds: ...

    def free_query(self, name: str, description: str, relation: int) -> TokenIds: ...


@dataclass(frozen=True)
class NamedEntity:
    """Name an entity for a reader; the id is None where the graph lacks it."""

    id: str | None
    name: str
    description: str


@dataclass(frozen=True)
class Answer:
    """Hold one answer: its place, its cosine with the query, and the splits that know it ('' for none)."""

    rank: int
    entity: str
    name: str
    description: str
    score: float
    known_in: str


@dataclass(frozen=True)
class Prediction:
    """Hold the best answers to a question, and what the question was taken to mean.

    `given` says on which side `entity` stands, `how` what it was found by: "id", "name", "case-insensitive name"
    or "free text"; `others` bear the same name and were not taken. `relation_text` leads from the entity to
    the answers.
    """

    given: Literal["head", "tail"]
    entity: NamedEntity
    how: str
    others: tuple[NamedEntity, ...]
    relation: str
    relation_text: str
    answers: tuple[Answer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Subject:
    """Hold what the given text was taken to mean; the number is None for free text."""

    number: int | None
    entity: NamedEntity
    how: str
    others: tuple[NamedEntity, ...] = ()


class Predictor:
    """Answer questions about a graph with an encoder and the vectors of the graph's entities.

    Raises RunError when the index was made by other weights or from other texts.
    """

    def __init__(self, graph: KnowledgeGraph, encoder: TextEncoder, texts: QueryTexts, index: EntityIndex) -> None:
        index.require_fresh(encoder, texts)
        self.graph, self.encoder, self.texts, self.index = graph, encoder, texts, index
        self._known = {split: known_answers(graph, [split]) for split in graph.splits}

    def predict(
        self,
        *,
        relation: str,
        head: str | None = None,
        tail: str | None = None,
        k: int = 5,
        free_text: bool = False,
        description: str | None = None,
        hide_known: Sequence[str] = (),
    ) -> Prediction:
        """Find the k entities that best answer (head, relation, ?) or (?, relation, tail).

        Entities and relations are found by id, name, or name in any case. With free_text or a description the
        entity is not looked up but read as it stands; without a description, its text is cut at the first ": "
        into name and description. Answers known in a split of hide_known are left out. Raises UsageError unless
        one of head and tail is given and k ≥ 1; GraphError, with the nearest names, for what the graph lacks.
        """
        given, text = _given_side(head, tail)
        if k < 1:
            raise UsageError(f"wanted at least one answer, found k = {k}. Ask for k ≥ 1.")
        is_free = free_text or description is not None
        subject = _free_subject(text, description) if is_free else self._find_subject(text)
        asked = self._asked_relation(relation, given)
        known = self._known_splits(subject.number, asked)
        hidden = {entity for split in hide_known for entity in self._hidden(known, split)}
        scores = self.index.scores(self.encoder.embed([self._query(subject, asked)]))[0].numpy()
        best = np.argsort(-scores, kind="stable")[: k + len(hidden)].tolist()
        shown = [entity for entity in best if entity not in hidden][:k]
        return Prediction(
            given=given,
            entity=subject.entity,
            how=subject.how,
            others=subject.others,
            relation=self.graph.relation_ids[asked % self.graph.num_relations],
            relation_text=self.graph.relation_text(asked),
            answers=tuple(self._answers(shown, scores[shown].tolist(), known)),
        )

    def _find_subject(self, text: str) -> _Subject:
        match = find_entity(self.graph, text)
        others = tuple(self._named(other) for other in match.others)
        return _Subject(match.entity, self._named(match.entity), match.how, others)

    def _asked_relation(self, text: str, given: str) -> int:
        """Return the relation in [0, 2R) that leads from the given entity to the answers."""
        relation, count = self.graph.find_relation(text), self.graph.num_relations
        return relation if given == "head" else (relation + count) % (2 * count)

    def _query(self, subject: _Subject, relation: int) -> TokenIds:
        if subject.number is not None:
            return self.texts.query(subject.number, relation)
        return self.texts.free_query(subject.entity.name, subject.entity.description, relation)

    def _known_splits(self, entity: int | None, relation: int) -> dict[str, set[int]]:
        """Return the answers that each split knows; nothing is known of free text."""
        if entity is None:
            return {split: set() for split in self._known}
        return {split: set(known.answers(entity, relation).tolist()) for split, known in self._known.items()}

    def _hidden(self, known: dict[str, set[int]], split: str) -> set[int]:
        self.graph.triples(split)  # raises GraphError for a split that the graph lacks
        return known[split]

    def _answers(self, entities: list[int], scores: list[float], known: dict[str, set[int]]) -> Iterator[Answer]:
        for rank, (entity, score) in enumerate(zip(entities, scores, strict=True), start=1):
            known_in = ", ".join(split for split, answers in known.items() if entity in answers)
            named = self._named(entity)
            yield Answer(rank, self.graph.entity_ids[entity], named.name, named.description, score, known_in)

    def _named(self, entity: int) -> NamedEntity:
        graph = self.graph
        return NamedEntity(graph.entity_ids[entity], graph.entity_names[entity], graph.entity_descriptions[entity])


def find_entity(graph: KnowledgeGraph, text: str) -> EntityMatch:
    """Find what a question is about. Raises GraphError, which names free text as a way, for what the graph lacks."""
    try:
        return graph.find_entity(text)
    except GraphError as error:
        raise GraphError(f"{error}{FREE_TEXT_HINT}") from error


def _given_side(head: str | None, tail: str | None) -> tuple[Literal["head", "tail"], str]:
    if head is not None and tail is None:
        return "head", head
    if tail is not None and head is None:
        return "tail", tail
    found = "neither" if head is None else "both"
    raise UsageError(
        f"wanted the head or the tail of the question, found {found}. Give the one that is known: "
        "--head asks for tails, --tail for heads."
    )


def _free_subject(text: str, description: str | None) -> _Subject:
    """Read an entity that the graph lacks; without a description, "name: description" is cut in two."""
    name, _, rest = text.partition(": ") if description is None else (text, "", description)
    if not name.strip():
        raise UsageError(f"wanted the name of an entity, found {text!r}. Write at least a name.")
    return _Subject(None, NamedEntity(None, name.strip(), rest.strip()), "free text")
