"""A graph worked out by hand, texts as made-up tokens and an encoder that looks vectors up."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from pykalm.graph.graph import IntArray, KnowledgeGraph
from pykalm.text.trie import TokenIds

NAMES = ("France", "Paris", "Spain", "Madrid", "Georgia", "Georgia", "Tbilisi")
FRANCE, PARIS, SPAIN, MADRID, GEORGIA, STATE, TBILISI = range(7)
CAPITAL, BORDERS = 0, 1
NUM_RELATIONS = 2


def geography(**splits: Sequence[tuple[int, int, int]]) -> KnowledgeGraph:
    """Return seven entities, two of the same name, and two relations; the splits can be replaced."""
    given = {
        "train": [(FRANCE, CAPITAL, PARIS), (FRANCE, BORDERS, SPAIN), (GEORGIA, CAPITAL, TBILISI)],
        "valid": [(SPAIN, BORDERS, FRANCE)],
        "test": [(SPAIN, CAPITAL, MADRID), (FRANCE, BORDERS, GEORGIA)],
        **splits,
    }
    return KnowledgeGraph(
        name="geography",
        entity_ids=("fr", "paris", "es", "madrid", "ge", "us-ga", "tbilisi"),
        entity_names=NAMES,
        entity_descriptions=("", "A city.", "", "", "A country.", "A state.", ""),
        relation_ids=("cap", "bor"),
        relation_texts=("has capital", "borders"),
        inverse_texts=("is capital of", "is bordered by"),
        splits={name: np.array(rows, dtype=np.int64).reshape(-1, 3) for name, rows in given.items()},
    )


class FakeTexts:
    """Write a query as (1, head, relation), a candidate as (2, first bearer of its name), free text as (3, ...)."""

    def query(self, head: int, relation: int) -> TokenIds:
        return np.array([1, head, relation])

    def queries(self, heads: IntArray, relations: IntArray) -> list[TokenIds]:
        return [self.query(int(head), int(relation)) for head, relation in zip(heads, relations, strict=True)]

    def candidates(self, entities: IntArray) -> list[TokenIds]:
        return [np.array([2, NAMES.index(NAMES[entity])]) for entity in entities]

    def free_query(self, name: str, description: str, relation: int) -> TokenIds:
        return np.array([3, len(name), len(description), relation])

    def fingerprint(self) -> str:
        return "texts"


class FakeEncoder:
    """Give each text the unit vector of `vectors`, or one drawn from a hash of the text; count the calls."""

    def __init__(
        self, vectors: Mapping[tuple[int, ...], Sequence[float]] | None = None, *, name: str = "encoder"
    ) -> None:
        self.vectors = vectors or {}
        self.name = name
        self.calls: list[list[tuple[int, ...]]] = []

    def embed(self, texts: Sequence[TokenIds], *, progress: Callable[[int, int], None] | None = None) -> torch.Tensor:
        keys = [tuple(text.tolist()) for text in texts]
        self.calls.append(keys)
        if progress:
            progress(len(keys), len(keys))
        return torch.stack([self._vector(key) for key in keys])

    def fingerprint(self) -> str:
        return self.name

    def _vector(self, key: tuple[int, ...]) -> torch.Tensor:
        if key in self.vectors:
            return torch.tensor(self.vectors[key], dtype=torch.float32)
        seed = int.from_bytes(hashlib.sha256(f"{self.name} {key}".encode()).digest()[:6], "big")
        return torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(seed)), dim=0)
