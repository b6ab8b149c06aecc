"""Find triples that can be answered without knowledge, since train has them the other way round."""

import numpy as np

from pykalm.graph.graph import IntArray, KnowledgeGraph

INVERSE_SHARE = 0.8  # from this share of reversed triples on, one relation gives the other away


def inverse_relations(graph: KnowledgeGraph) -> dict[int, list[int]]:
    """Find for each relation r the others whose train triples, reversed, hold for r in 80 % of cases.

    From such an (t, s, h) the triple (h, r, t) can be guessed without understanding anything.
    """
    train = distinct_triples(graph, "train")
    rows, reverse = _reversed_relations(graph, train)
    pairs, counts = np.unique(train[rows, 1] * graph.num_relations + reverse, return_counts=True)
    sizes = np.bincount(train[:, 1], minlength=graph.num_relations)
    found: dict[int, list[int]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        relation, other = divmod(pair, graph.num_relations)
        if relation != other and count >= INVERSE_SHARE * sizes[other]:
            found.setdefault(relation, []).append(other)
    return found


def inverse_leaks(graph: KnowledgeGraph, split: str) -> IntArray:
    """Return the distinct (h, r, t) of a split whose (t, r, h), or (t, inverse of r, h), is in train."""
    triples = distinct_triples(graph, split)
    rows, reverse = _reversed_relations(graph, triples)
    inverses = inverse_relations(graph)
    pairs = [relation * graph.num_relations + other for relation, others in inverses.items() for other in others]
    relations = triples[rows, 1]
    leaks = (relations == reverse) | np.isin(relations * graph.num_relations + reverse, pairs)
    found: IntArray = triples[np.unique(rows[leaks])]
    return found


def _reversed_relations(graph: KnowledgeGraph, triples: IntArray) -> tuple[IntArray, IntArray]:
    """Return (row, s) for every row (h, r, t) and every train triple (t, s, h)."""
    train = distinct_triples(graph, "train")
    keys = train[:, 0] * graph.num_entities + train[:, 2]
    order = np.argsort(keys, kind="stable")
    wanted = triples[:, 2] * graph.num_entities + triples[:, 0]
    first = np.searchsorted(keys[order], wanted, side="left")
    counts = np.searchsorted(keys[order], wanted, side="right") - first
    rows = np.repeat(np.arange(len(triples)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, train[order[np.repeat(first, counts) + within], 1]


def distinct_triples(graph: KnowledgeGraph, split: str) -> IntArray:
    """Return the distinct triples of a split, in order of first appearance."""
    rows = graph.triples(split)
    first = np.unique(triple_keys(graph, rows), return_index=True)[1]
    distinct: IntArray = rows[np.sort(first)]
    return distinct


def triple_keys(graph: KnowledgeGraph, rows: IntArray) -> IntArray:
    """Return one integer for each triple (N,), the same for equal triples only."""
    keys: IntArray = (rows[:, 0] * graph.num_relations + rows[:, 1]) * graph.num_entities + rows[:, 2]
    return keys
