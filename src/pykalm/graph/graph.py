"""Hold a knowledge graph: entities and relations with their texts, and each split's triples as integers."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pykalm.errors import GraphError
from pykalm.graph.names import EntityMatch, NameIndex, build_name_index, nearest, suggestion

IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class KnowledgeGraph:
    """Hold E entities, R relations and the triples of each split; inverse relations are the ids R..2R-1.

    `splits` has an entry for each split that exists ("train" always); each is (N, 3) int64 with rows head,
    relation, tail and relation < R. `negatives` holds false triples for "valid" and "test" where shipped.
    `inverse_texts` is never empty: "inverse of X" stands where the files have none. METHOD.md §1.
    Raises GraphError when the parts do not fit together.
    """

    name: str
    entity_ids: tuple[str, ...]
    entity_names: tuple[str, ...]
    entity_descriptions: tuple[str, ...]
    relation_ids: tuple[str, ...]
    relation_texts: tuple[str, ...]
    inverse_texts: tuple[str, ...]
    splits: Mapping[str, IntArray]
    negatives: Mapping[str, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that ids are distinct, texts are complete and every triple is in range."""
        entities, relations = len(self.entity_ids), len(self.relation_ids)
        _check_length("entity_names", self.entity_names, entities)
        _check_length("entity_descriptions", self.entity_descriptions, entities)
        _check_length("relation_texts", self.relation_texts, relations)
        _check_length("inverse_texts", self.inverse_texts, relations)
        _check_distinct("entity id", self.entity_ids)
        _check_distinct("relation id", self.relation_ids)
        if "train" not in self.splits:
            found = sorted(self.splits)
            raise GraphError(f"graph '{self.name}': wanted a split 'train', found {found}. Add what is to be learned.")
        for split, triples in [*self.splits.items(), *self.negatives.items()]:
            _check_range(f"graph '{self.name}', split '{split}'", triples, entities, relations)

    @property
    def num_entities(self) -> int:
        """Return E."""
        return len(self.entity_ids)

    @property
    def num_relations(self) -> int:
        """Return R, inverse relations not counted."""
        return len(self.relation_ids)

    def triples(self, split: str) -> IntArray:
        """Return the (N, 3) rows head, relation, tail of a split; raises GraphError for an unknown split."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise GraphError(f"graph '{self.name}' has no split '{split}'. Take one of: {known}.")
        return self.splits[split]

    def both_directions(self, split: str) -> IntArray:
        """Return (2N, 3): the N rows of a split, then the same N rows as (tail, relation + R, head)."""
        return both_directions(self.triples(split), self.num_relations)

    def relation_text(self, relation: int) -> str:
        """Return the text of a relation in [0, 2R); from R on it is an inverse. Raises GraphError."""
        if not 0 <= relation < 2 * self.num_relations:
            wanted = f"[0, {2 * self.num_relations})"
            raise GraphError(
                f"graph '{self.name}': wanted a relation in {wanted}, found {relation}. Take one of these."
            )
        forward = relation < self.num_relations
        return self.relation_texts[relation] if forward else self.inverse_texts[relation - self.num_relations]

    def find_entity(self, text: str) -> EntityMatch:
        """Find an entity by id, exact name, then name in any case; of several, the one in most train triples.

        `others` lists the remaining bearers of the name, most train triples first (the lower id on a tie).
        Raises GraphError with the nearest names when nothing fits.
        """
        found = self._entity_index.find(text.strip())
        if found is None:
            hint = suggestion(self._entity_index.nearest(text))
            raise GraphError(f"graph '{self.name}' has no entity '{text}' ({self.num_entities} known).{hint}")
        how, entities = found
        ordered = sorted(entities, key=lambda entity: (-int(self.train_degrees[entity]), entity))
        return EntityMatch(ordered[0], how, tuple(ordered[1:]))

    def find_relation(self, text: str) -> int:
        """Find a relation in [0, 2R) by id, exact text, then in any case; inverse texts find inverses.

        Where a text and an inverse text are equal, the forward relation is meant. Raises GraphError with the
        nearest texts when nothing fits, and with all ids when the text names several relations.
        """
        found = self._relation_index.find(text.strip()) or self._inverse_index.find(text.strip())
        if found is None:
            hint = suggestion(nearest(text, [*self.relation_texts, *self.inverse_texts, *self.relation_ids]))
            known = f"{self.num_relations} known"
            raise GraphError(f"graph '{self.name}' has no relation '{text}' ({known}).{hint}")
        if len(found[1]) > 1:
            ids = ", ".join(f"'{self.relation_ids[relation]}'" for relation in found[1])
            raise GraphError(f"relation '{text}' is ambiguous, {len(found[1])} bear this text. Give an id: {ids}.")
        inverse = self._relation_index.find(text.strip()) is None
        return found[1][0] + self.num_relations * inverse

    def require_trainable(self) -> None:
        """Raise GraphError unless train holds 2 distinct triples over 2 entities: less has no contrast."""
        train = self.triples("train")
        triples, entities = len(np.unique(train, axis=0)), len(np.unique(train[:, [0, 2]]))
        if triples < 2 or entities < 2:
            raise GraphError(
                f"graph '{self.name}': training wants 2 or more distinct triples over 2 entities, "
                f"found {triples} over {entities}. Add triples to train."
            )

    def fingerprint(self) -> str:
        """Return a sha256 over ids, texts and splits: the same on every machine and for every file format.

        The graph's name does not count; the order of entities, relations and triples does: ids are positions.
        """
        return self._fingerprint

    @cached_property
    def train_degrees(self) -> IntArray:
        """Count for each entity the train triples that it is head or tail of (E,); a loop counts once."""
        train = self.triples("train")
        heads, tails = train[:, 0], train[train[:, 0] != train[:, 2], 2]
        return np.bincount(np.concatenate([heads, tails]), minlength=self.num_entities).astype(np.int64)

    @cached_property
    def _entity_index(self) -> NameIndex:
        return build_name_index(self.entity_ids, self.entity_names)

    @cached_property
    def _relation_index(self) -> NameIndex:
        return build_name_index(self.relation_ids, self.relation_texts)

    @cached_property
    def _inverse_index(self) -> NameIndex:
        return build_name_index((), self.inverse_texts)

    @cached_property
    def _fingerprint(self) -> str:
        texts = [self.entity_ids, self.entity_names, self.entity_descriptions]
        texts += [self.relation_ids, self.relation_texts, self.inverse_texts]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for split in sorted(self.splits):
            digest.update(json.dumps([split, len(self.splits[split])]).encode())
            digest.update(np.ascontiguousarray(self.splits[split], dtype="<i8").tobytes())
        return digest.hexdigest()


def both_directions(triples: IntArray, num_relations: int) -> IntArray:
    """Return (2N, 3): the N forward rows (h, r, t), r < R, then the N inverse rows (t, r + R, h)."""
    inverse = triples[:, ::-1] + np.array([0, num_relations, 0], dtype=np.int64)
    return np.concatenate([triples, inverse])


def _check_length(what: str, values: Sequence[str], wanted: int) -> None:
    if len(values) != wanted:
        raise GraphError(f"{what}: wanted one for each of the {wanted} ids, found {len(values)}.")


def _check_distinct(what: str, values: Sequence[str]) -> None:
    if len(set(values)) != len(values):
        value, count = Counter(values).most_common(1)[0]
        raise GraphError(f"{what} '{value}' is given {count} times. Every id may stand once.")


def _check_range(where: str, triples: IntArray, entities: int, relations: int) -> None:
    if triples.ndim != 2 or triples.shape[1] != 3 or triples.dtype != np.int64:
        raise GraphError(f"{where}: wanted int64 rows of 3, found {triples.dtype} of shape {triples.shape}.")
    wrong = (triples < 0) | (triples >= np.array([entities, relations, entities]))
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        limits = f"ids below {entities}, {relations}, {entities}"
        raise GraphError(f"{where}, row {row}: wanted {limits}, found {triples[row].tolist()}. Mend the triple.")
