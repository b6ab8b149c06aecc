"""A part of a graph, for measurements that must stay cheap however large the graph is."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from pykalm.graph.graph import IntArray, KnowledgeGraph


def restrict_entities(graph: KnowledgeGraph, entities: IntArray) -> KnowledgeGraph:
    """Return the graph of some entities (distinct) and the triples among them; relations stay as they are."""
    entities = np.sort(entities)
    place = np.full(graph.num_entities, -1, dtype=np.int64)
    place[entities] = np.arange(len(entities))
    return dataclasses.replace(
        graph,
        entity_ids=tuple(graph.entity_ids[e] for e in entities),
        entity_names=tuple(graph.entity_names[e] for e in entities),
        entity_descriptions=tuple(graph.entity_descriptions[e] for e in entities),
        splits=_renumbered(graph.splits, place),
        negatives={},
    )


def sample_for_validation(
    graph: KnowledgeGraph, *, triples: int | None, entities: int | None, seed: int, split: str = "valid"
) -> KnowledgeGraph:
    """Draw triples of a split, and entities up to a number beside those that they hold; return the graph of these.

    None takes all. The split holds the drawn triples only; the other splits, which give the filter, what lies among the
    drawn entities.
    """
    generator = np.random.default_rng(seed)
    rows = graph.triples(split)
    if triples is not None and triples < len(rows):
        rows = rows[np.sort(generator.choice(len(rows), size=triples, replace=False))]
    hidden = {f"{split} (not drawn)": graph.triples(split)}
    drawn = dataclasses.replace(graph, splits={**graph.splits, **hidden, split: rows})
    if entities is None or entities >= graph.num_entities:
        return drawn
    needed = np.unique(rows[:, [0, 2]])
    others = np.setdiff1d(np.arange(graph.num_entities), needed)
    extra = generator.choice(others, size=max(0, min(len(others), entities - len(needed))), replace=False)
    return restrict_entities(drawn, np.concatenate([needed, extra]))


def _renumbered(splits: Mapping[str, IntArray], place: IntArray) -> dict[str, IntArray]:
    """Keep the triples whose head and tail have a new number, under it."""
    kept = {}
    for split, triples in splits.items():
        heads, tails = place[triples[:, 0]], place[triples[:, 2]]
        inside = (heads >= 0) & (tails >= 0)
        kept[split] = np.stack([heads[inside], triples[inside, 1], tails[inside]], axis=1)
    return kept
