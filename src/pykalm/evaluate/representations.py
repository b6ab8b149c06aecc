"""The representations of a run's graph and of plain sentences: which vectors are measured, and the report of it.

docs/measures.md. Queries and entities are populations of one size, so that Theorem 1 means the same N in both views.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pykalm.errors import GraphError, UsageError
from pykalm.evaluate.asymptotics import Asymptotics, measure_asymptotics
from pykalm.evaluate.geometry import Geometry, Step, alignment, measure_geometry
from pykalm.evaluate.links import GraphTexts
from pykalm.evaluate.similarity import FloatMatrix, sample_triples, similarity_matrix, triple_labels
from pykalm.files import replace_file
from pykalm.graph.graph import IntArray, KnowledgeGraph, both_directions
from pykalm.model.encoder import Progress
from pykalm.model.index import TextEncoder, entity_scores
from pykalm.text.texts import Texts

SHOWN = 24
"""Triples, and sentences, of the similarity matrices."""
MAX_SENTENCE_TOKENS = 256


class RepresentationTexts(GraphTexts, Protocol):
    """Give the token sequences of queries, entities and plain sentences (text.verbalize.Verbalizer does)."""

    def plain(self, texts: Sequence[str], *, limit: int | None = None) -> Texts: ...


@dataclass(frozen=True, eq=False)
class Populations:
    """Hold Q queries (Q, 2) (head, relation), C entities (C,), and the pairs (P, 2) of their places that are triples.

    `sampling` says in words which these are.
    """

    queries: IntArray
    entities: IntArray
    pairs: IntArray
    sampling: str


@dataclass(frozen=True, eq=False)
class GeometryReport:
    """Hold the geometry of a model's queries, candidates and sentences, Theorem 1's curve, and similarity matrices.

    similarity: "triples" has query and tail labels and a matrix, "sentences" labels and a matrix, as plain data.
    """

    graph: str
    split: str
    protocol: str
    groups: Mapping[str, Geometry]
    theorem_1: Asymptotics
    similarity: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "graph": self.graph,
            "split": self.split,
            "protocol": self.protocol,
            **self.about,
            "groups": {name: group.to_dict() for name, group in self.groups.items()},
            "theorem_1": self.theorem_1.to_dict(),
            "similarity": dict(self.similarity),
        }

    def save(self, folder: Path, name: str = "geometry") -> Path:
        """Write `name`.json; returns its path."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        replace_file(folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
        return folder / f"{name}.json"


def choose_populations(graph: KnowledgeGraph, split: str, *, limit: int | None = None, seed: int = 0) -> Populations:
    """Choose as many queries as entities: all entities or `limit` of them, those of the split's triples first.

    A pair is a triple of the split in one of its directions, as long as its query and its entity still fit in. What is
    then lacking is filled up by seed: with other entities, and with queries of all splits. Raises GraphError for a
    split that is missing or empty, UsageError for a limit below 2.
    """
    if limit is not None and limit < 2:
        raise UsageError(f"wanted a limit of at least two, found {limit}. Leave it out to take all entities.")
    if not len(graph.triples(split)):
        raise GraphError(f"graph '{graph.name}': split '{split}' is empty. Take another one.")
    random = np.random.default_rng(seed)
    size = min(graph.num_entities, limit or graph.num_entities)
    rows = random.permutation(both_directions(graph.triples(split), graph.num_relations))
    keys = rows[:, 0] * (2 * graph.num_relations) + rows[:, 1]
    rows, keys = (part[(_arrival(keys) < size) & (_arrival(rows[:, 2]) < size)] for part in (rows, keys))
    asked = np.concatenate([graph.both_directions(name) for name in graph.splits])
    queries = _filled(keys, asked[:, 0] * (2 * graph.num_relations) + asked[:, 1], size, random)
    entities = _filled(rows[:, 2], np.arange(graph.num_entities), size, random)
    pairs = np.unique(np.stack([np.searchsorted(queries, keys), np.searchsorted(entities, rows[:, 2])], axis=1), axis=0)
    sampling = (
        f"{len(entities)} of {graph.num_entities} entities; {len(queries)} queries, those of {split} first; "
        f"{len(pairs)} pairs of {split} in both directions; seed {seed}"
    )
    return Populations(np.stack(np.divmod(queries, 2 * graph.num_relations), axis=1), entities, pairs, sampling)


def _arrival(values: IntArray) -> IntArray:
    """Return for every value how many other values came before its first occurrence."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _filled(chosen: IntArray, everything: IntArray, size: int, random: np.random.Generator) -> IntArray:
    """Return the distinct chosen values and others, drawn, up to `size` of them, ascending."""
    kept = np.unique(chosen)
    others = random.permutation(np.setdiff1d(everything, kept))[: size - len(kept)]
    return np.sort(np.concatenate([kept, others]))


def measure_representations(
    graph: KnowledgeGraph,
    encoder: TextEncoder,
    texts: RepresentationTexts,
    *,
    temperature: float,
    split: str = "test",
    sentences: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    about: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> GeometryReport:
    """Measure the geometry of a graph's queries and entities and of plain sentences, none of which may be given.

    The texts are embedded in one pass. Raises what `choose_populations` raises, ModelError where a vector is no number.
    """
    chosen = choose_populations(graph, split, limit=limit, seed=seed)
    parts = [Texts.of(texts.queries(*chosen.queries.T)), Texts.of(texts.candidates(chosen.entities))]
    parts += [texts.plain(sentences, limit=MAX_SENTENCE_TOKENS)] if sentences else []
    vectors = torch.split(encoder.embed(Texts.chain(parts), progress=progress), [len(part) for part in parts])
    query, candidates = vectors[:2]
    left, right = (torch.from_numpy(side) for side in chosen.pairs.T)
    step = _counted(progress, sum(map(len, vectors)) + 2 * len(chosen.pairs))
    groups = {
        "queries": measure_geometry(query, alignment=alignment(query[left], candidates[right]), step=step),
        "candidates": measure_geometry(candidates, step=step),
    }
    groups |= {"sentences": measure_geometry(vectors[2], step=step)} if sentences else {}
    curve = measure_asymptotics(query, candidates, chosen.pairs, temperature=temperature, seed=seed, step=step)
    shown = {"triples": _similar_triples(graph, encoder, texts, sample_triples(graph, split, count=SHOWN, seed=seed))}
    shown |= {"sentences": _similar_sentences(sentences, vectors[2], seed)} if sentences else {}
    said = f"{len(sentences)} plain sentences, pooled as the other texts" if sentences else "no plain sentences"
    protocol = (
        f"{chosen.sampling}; {said}; negatives of Theorem 1 are drawn from all others, known answers too, margin 0"
    )
    return GeometryReport(graph.name, split, protocol, groups, curve, shown, about or {})


def _counted(progress: Progress | None, total: int) -> Step:
    """Return a function that is told of so many more vectors or pairs, and tells how many are done."""
    done = 0

    def step(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    return step


def _similar_triples(
    graph: KnowledgeGraph, encoder: TextEncoder, texts: GraphTexts, triples: IntArray
) -> dict[str, Any]:
    """Return the cosines of the queries and tails of triples, with their labels."""
    queries, tails = triple_labels(graph, triples)
    return {"queries": queries, "tails": tails, "matrix": _plain(similarity_matrix(encoder, texts, triples))}


def _similar_sentences(sentences: Sequence[str], vectors: Tensor, seed: int) -> dict[str, Any]:
    """Return the cosines of some sentences, drawn by seed, with these as labels."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(sentences))[:SHOWN])
    some = vectors[torch.from_numpy(chosen)]
    matrix: FloatMatrix = entity_scores(some, some, torch.arange(len(some))).numpy()
    return {"labels": [sentences[number] for number in chosen.tolist()], "matrix": _plain(matrix)}


def _plain(matrix: FloatMatrix) -> list[list[float]]:
    """Return a matrix as plain data, to six digits: more than float32 vectors of bfloat16 passes hold."""
    return [[round(float(value), 6) for value in row] for row in matrix]
