"""A bank of entity vectors as further negatives, for scripts/quality.py: what it brings is in docs/results.md.

It is no part of the package, since at equal training time it took more than it gave.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm.graph.graph import both_directions
from pykalm.learn import losses, step
from pykalm.learn.batches import Batch, BatchBuilder, _distinct_pairs
from pykalm.model.index import distinct_texts
from pykalm.text.texts import IntArray


@dataclass(eq=False)
class EntityBank:
    """Hold the last vector of every candidate text of a graph, as far as one was computed, for the loss L(hr→t).

    builder: of the batches; age: steps after which a vector no longer counts, None for never; momentum: weight of the old
    vector where there is one. Vectors are constants; those of the batch itself and known answers are no negatives.
    """

    builder: BatchBuilder
    width: int
    age: int | None = None
    momentum: float = 0.0
    steps: int = 0
    vectors: Tensor = field(init=False)
    computed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin empty. Entities of one text share a row."""
        texts, self.row_of = distinct_texts(
            self.builder.verbalizer.candidates(np.arange(self.builder.graph.num_entities))
        )
        self.vectors = torch.zeros(len(texts), self.width)
        self.computed = torch.full((len(texts),), -1)

    @contextmanager
    def beside(self, batch: Batch, triples: IntArray) -> Iterator[None]:
        """Let the step of a batch of these triples count the bank's vectors, and take in its own."""
        own_rows, known = self._places(batch, triples)
        fresh = self.computed >= (0 if self.age is None else max(0, self.steps - self.age))
        counts = fresh.clone()
        counts[own_rows] = False
        column = torch.cumsum(counts, 0) - 1
        known = known[counts[known[:, 1]]]
        bank, scaled = self.vectors[counts], list[Tensor]()
        found_loss, found_sum = step.dual_view_loss, losses._log_sum_exp

        def with_bank(query: Tensor, candidates: Tensor, **others: Tensor) -> Tensor:
            scaled[:] = [query * others["log_scale"].float().exp()]
            self._keep(own_rows, candidates.detach(), fresh)
            return found_loss(query, candidates, **others)

        def summed(scores: Tensor, *others: Tensor, dim: int) -> Tensor:
            found = found_sum(scores, *others, dim=dim)
            if dim == 0 or not len(bank):
                return found
            more = (scaled[0] @ bank.T).index_put((known[:, 0], column[known[:, 1]]), torch.tensor(losses.MASKED))
            return torch.logaddexp(found, more.logsumexp(1))

        with patch.object(step, "dual_view_loss", with_bank), patch.object(losses, "_log_sum_exp", summed):
            yield
        self.steps += 1

    def _keep(self, rows: Tensor, vectors: Tensor, fresh: Tensor) -> None:
        share = self.momentum * fresh[rows, None]
        self.vectors[rows] = F.normalize(share * self.vectors[rows] + (1 - share) * vectors, dim=-1)
        self.computed[rows] = self.steps

    def _places(self, batch: Batch, triples: IntArray) -> tuple[Tensor, Tensor]:
        """Return the row (C,) of each candidate, and the pairs (K, 2) of queries and rows that are known answers."""
        directed = both_directions(triples, self.builder.graph.num_relations)
        heads, relations, _ = _distinct_pairs(directed[:, :2])
        entities, last = np.unique(directed[:, [0, 2]]), batch.trie.last_nodes()
        query_of = np.searchsorted(batch.query_nodes, last[: len(heads)])
        candidate_of = np.searchsorted(batch.candidate_nodes, last[len(heads) : len(heads) + len(entities)])
        own_rows = np.empty(len(batch.candidate_nodes), dtype=np.int64)
        own_rows[candidate_of] = self.row_of[entities]
        offsets, answers = self.builder.known.lookup(heads, relations)
        known = np.stack([np.repeat(query_of, np.diff(offsets)), self.row_of[answers]], axis=1)
        return torch.from_numpy(own_rows), torch.from_numpy(known)
