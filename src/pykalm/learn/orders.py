"""In which order an epoch goes through the training triples: at random, or from neighbour to neighbour."""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count

import numpy as np

from pykalm.graph.graph import IntArray

TRIPLES_PER_VISIT = 8
"""Triples taken from an entity before other entities have their turn."""
TRIPLES_PER_ENTITY = 16
"""Triples of a batch that may hold the same entity, or twice its share of the graph where that is more: a hub is spread
over many batches, and a batch of B triples holds B / 8 entities or more, which are its candidates."""
CLOSED_AT_ONCE = 64
"""Triples of a new entity that are looked through for others of the batch: a bound for hubs."""

Order = Callable[[IntArray, np.random.Generator, int], Iterator[IntArray]]


def random_order(triples: IntArray, generator: np.random.Generator, batch_size: int) -> Iterator[IntArray]:
    """Yield the rows of triples (N, 3) that make up each batch, drawn at random."""
    order: IntArray = generator.permutation(len(triples)).astype(np.int64)
    yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def neighbourhood_order(triples: IntArray, generator: np.random.Generator, batch_size: int) -> Iterator[IntArray]:
    """Yield the rows of triples (N, 3) that make up each batch: a few connected pieces of the graph, every row once.

    A piece grows from a random triple, next from the entity of the batch that has the fewest triples left, so that most
    entities are read once and done with; a new entity brings its triples with entities of the batch, which cost no further
    entity text (neighbourhood expansion: Zhang et al., Graph Edge Partitioning via Neighborhood Heuristic, KDD 2017).
    Triples of an entity with the same relation and direction follow each other, so that they share a query. Such batches
    hold entities near the answer as negatives, so the mask of known triples matters more. METHOD.md §6.
    """
    pieces = _Pieces(triples, generator, batch_size)
    for start in range(0, len(triples), batch_size):
        yield np.array(pieces.next_batch(min(batch_size, len(triples) - start)), dtype=np.int64)


ORDERS: dict[str, Order] = {"random": random_order, "neighbourhood": neighbourhood_order}


class _Pieces:
    """Hold what an epoch has not taken yet, and grow batches from it. Plain lists: one look at a time, they are fastest."""

    def __init__(self, triples: IntArray, generator: np.random.Generator, batch_size: int) -> None:
        incident, others, offsets = _incidence(triples, generator)
        self._starts = iter(generator.permutation(len(triples)).tolist())
        self._triples = triples
        self._incident, self._others = incident.tolist(), others.tolist()
        # An entity gives its triples from its cursor on, up to its limit; some there may be taken already, from the other end.
        self._cursor, self._limit = offsets[:-1].tolist(), offsets[1:].tolist()
        degrees = np.diff(offsets)
        self._left = degrees.tolist()
        share = 2 * degrees * batch_size / max(1, len(triples))
        self._most = np.maximum(TRIPLES_PER_ENTITY, np.ceil(share)).astype(np.int64).tolist()
        self._taken = bytearray(len(triples))

    def next_batch(self, size: int) -> list[int]:
        """Return the rows of a batch of so many triples, which must be left."""
        self._batch: list[int] = []
        self._size = size
        self._held: dict[int, int] = {}  # entities of the batch, and the triples of it that hold them
        self._heap: list[tuple[int, int, int]] = []
        self._ticks = count()
        while len(self._batch) < size:
            if self._heap:
                self._visit(heappop(self._heap)[2])
            else:
                self._start()
        return self._batch

    def _start(self) -> None:
        triple = next(start for start in self._starts if not self._taken[start])
        head, _, tail = self._triples[triple].tolist()
        new = [entity for entity in dict.fromkeys((head, tail)) if entity not in self._held]
        self._held |= dict.fromkeys(new, 0)
        self._take(triple, head, tail)
        for entity in new:
            self._close(entity)

    def _visit(self, entity: int) -> None:
        """Take some triples of an entity of the batch, and let it wait for another turn if it has more."""
        taken, held, most, others, incident = self._taken, self._held, self._most, self._others, self._incident
        place, limit = self._cursor[entity], self._limit[entity]
        stop = min(self._size, len(self._batch) + TRIPLES_PER_VISIT)
        while place < limit and len(self._batch) < stop and held[entity] < most[entity]:
            triple, other = incident[place], others[place]
            place += 1
            if taken[triple]:
                continue
            if other not in held:
                held[other] = 0
                self._take(triple, entity, other)
                self._close(other)
            elif held[other] < most[other]:
                self._take(triple, entity, other)
        self._cursor[entity] = place
        if place < limit:
            self._wait(entity)

    def _close(self, entity: int) -> None:
        """Take the triples between an entity that is new to the batch and those already there; let it wait for its turn."""
        taken, held, most, incident = self._taken, self._held, self._most, self._incident
        place, limit = self._cursor[entity], self._limit[entity]
        while place < limit and taken[incident[place]]:
            place += 1
        self._cursor[entity] = place
        near = slice(place, min(limit, place + CLOSED_AT_ONCE))
        for triple, other in zip(incident[near], self._others[near], strict=True):
            if other in held and not taken[triple] and held[other] < most[other]:
                if held[entity] >= most[entity] or len(self._batch) == self._size:
                    break
                self._take(triple, entity, other)
        self._wait(entity)

    def _take(self, triple: int, entity: int, other: int) -> None:
        self._taken[triple] = 1
        self._batch.append(triple)
        self._held[entity] += 1
        self._held[other] += 1
        self._left[entity] -= 1
        self._left[other] -= 1

    def _wait(self, entity: int) -> None:
        """Let an entity that can give more triples to the batch wait; those with few left, then those that came first."""
        if self._left[entity] and self._held[entity] < self._most[entity]:
            heappush(self._heap, (self._left[entity], next(self._ticks), entity))


def _incidence(triples: IntArray, generator: np.random.Generator) -> tuple[IntArray, IntArray, IntArray]:
    """Return the triples of each entity (2N,), their other ends (2N,), and where each entity's begin (E + 1,): CSR.

    Those with the same relation and direction stand together; these groups, and what is in them, in random order.
    """
    count = len(triples)
    entities, others = triples[:, [0, 2]].T.ravel(), triples[:, [2, 0]].T.ravel()
    kinds = np.concatenate([2 * triples[:, 1], 2 * triples[:, 1] + 1])
    _, group_of = np.unique(entities * (kinds.max(initial=0) + 1) + kinds, return_inverse=True)
    place_of_group = generator.permutation(group_of.max(initial=0) + 1)
    shuffled = generator.permutation(2 * count)
    order = shuffled[np.argsort(place_of_group[group_of[shuffled]], kind="stable")]
    order = order[np.argsort(entities[order], kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(entities))]).astype(np.int64)
    return order % max(1, count), others[order], offsets
