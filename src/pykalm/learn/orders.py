"""In which order an epoch goes through the training triples: at random, or from neighbour to neighbour."""

from collections import deque

import numpy as np

from pykalm.graph.graph import IntArray

TRIPLES_PER_VISIT = 8
"""Triples taken from an entity before its neighbours have their turn: a hub is spread over many batches."""


def random_order(triples: IntArray, generator: np.random.Generator, batch_size: int) -> IntArray:
    """Return a permutation (N,) of the rows of triples (N, 3)."""
    order: IntArray = generator.permutation(len(triples)).astype(np.int64)
    return order


def neighbourhood_order(triples: IntArray, generator: np.random.Generator, batch_size: int) -> IntArray:
    """Return a permutation (N,) in which the triples of a batch are a few connected pieces of the graph.

    Breadth first from a random triple, a few triples of an entity at a visit; a new start after every batch and where
    a piece ends. Such a batch holds each entity in more triples, so its texts cost less, and entities near the answer as
    negatives, so the mask of known triples matters more. METHOD.md §6.
    """
    incident, offsets = _incidence(triples)
    starts = generator.permutation(len(triples)).tolist()
    # Shuffled once; each entity then gives its triples from its own cursor on.
    cursor = offsets[:-1].tolist()
    limits, incident_list, rows = (
        offsets[1:].tolist(),
        incident[_shuffled(offsets, generator)].tolist(),
        triples.tolist(),
    )
    taken = bytearray(len(triples))
    order: list[int] = []
    queue: deque[int] = deque()
    next_start = 0
    while len(order) < len(triples):
        if not queue or len(order) % batch_size == 0:
            queue.clear()
            while taken[starts[next_start]]:
                next_start += 1
            queue.extend(rows[starts[next_start]][::2])
        entity = queue.popleft()
        visited = 0
        while cursor[entity] < limits[entity] and visited < TRIPLES_PER_VISIT:
            triple = incident_list[cursor[entity]]
            cursor[entity] += 1
            if taken[triple]:
                continue
            taken[triple] = 1
            order.append(triple)
            visited += 1
            head, _, tail = rows[triple]
            queue.append(tail if head == entity else head)
            if len(order) % batch_size == 0:
                break
        else:
            if cursor[entity] < limits[entity]:
                queue.append(entity)
    return np.array(order, dtype=np.int64)


ORDERS = {"random": random_order, "neighbourhood": neighbourhood_order}


def _incidence(triples: IntArray) -> tuple[IntArray, IntArray]:
    """Return the rows of triples by the entity that they touch, and where each entity's rows begin: CSR."""
    entities = np.concatenate([triples[:, 0], triples[:, 2]])
    order = np.argsort(entities, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(entities))]).astype(np.int64)
    return order % len(triples), offsets


def _shuffled(offsets: IntArray, generator: np.random.Generator) -> IntArray:
    """Return a permutation that shuffles within each entity's rows."""
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.lexsort((generator.random(len(owner)), owner))
