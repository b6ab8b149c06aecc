"""Know for every (head, relation) its true tails: the filter of evaluation and the mask of training."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pykalm.graph.graph import IntArray, KnowledgeGraph


@dataclass(frozen=True, eq=False)
class KnownAnswers:
    """Hold the true tails of each (head, relation) that occurs, in compressed rows (CSR).

    `keys` (K,) are the sorted distinct head * 2R + relation; the tails of key k are
    `entities[offsets[k]:offsets[k + 1]]`, ascending and distinct. Relations are in [0, 2R).
    """

    num_relations: int
    keys: IntArray
    offsets: IntArray
    entities: IntArray

    @staticmethod
    def build(triples: IntArray, num_relations: int) -> "KnownAnswers":
        """Build from (N, 3) rows head, relation in [0, 2R), tail, in any order and with repetitions.

        Rows are taken as given: pass both directions where inverse queries are to be answered.
        """
        keys = triples[:, 0] * (2 * num_relations) + triples[:, 1]
        order = np.lexsort((triples[:, 2], keys))
        keys, entities = keys[order], triples[order, 2]
        distinct = np.ones(len(keys), dtype=np.bool_)
        distinct[1:] = (keys[1:] != keys[:-1]) | (entities[1:] != entities[:-1])
        keys, entities = keys[distinct], entities[distinct]
        row_keys, starts = np.unique(keys, return_index=True)
        offsets = np.append(starts, len(keys)).astype(np.int64)
        return KnownAnswers(num_relations, row_keys, offsets, entities)

    def answers(self, head: int, relation: int) -> IntArray:
        """Return the known tails of one query, ascending; none gives an empty array."""
        return self.lookup(np.array([head]), np.array([relation]))[1]

    def lookup(self, heads: IntArray, relations: IntArray) -> tuple[IntArray, IntArray]:
        """Return offsets (B+1,) and entities (nnz,) for B queries.

        The known tails of query b are entities[offsets[b]:offsets[b+1]], ascending.
        """
        starts, lengths = self._rows(heads, relations)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Positions in self.entities: for each query its start, counted on by one within the row.
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return offsets, self.entities[positions]

    def pairs(self, heads: IntArray, relations: IntArray, candidates: IntArray) -> tuple[IntArray, IntArray]:
        """Return (n,) rows b and (n,) columns c where candidates[c] is a known tail of query b; candidates ascend."""
        offsets, entities = self.lookup(heads, relations)
        queries = np.repeat(np.arange(len(heads)), np.diff(offsets))
        if not len(candidates):
            return queries[:0], entities[:0]
        places = np.minimum(np.searchsorted(candidates, entities), len(candidates) - 1)
        present = candidates[places] == entities
        return queries[present], places[present]

    def _rows(self, heads: IntArray, relations: IntArray) -> tuple[IntArray, IntArray]:
        """Return for each query (B,) where its row starts and how long it is; 0 where it never occurs."""
        wanted = np.asarray(heads, dtype=np.int64) * (2 * self.num_relations) + relations
        if not len(self.keys):
            return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.int64)
        rows = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        lengths = np.where(self.keys[rows] == wanted, self.offsets[rows + 1] - self.offsets[rows], 0)
        return self.offsets[rows], lengths


def known_answers(graph: KnowledgeGraph, splits: Iterable[str] | None = None) -> KnownAnswers:
    """Build the known answers of a graph in both directions, from some splits or, by default, from all."""
    names = graph.splits if splits is None else splits
    rows = np.concatenate([graph.both_directions(split) for split in names])
    return KnownAnswers.build(rows, graph.num_relations)
