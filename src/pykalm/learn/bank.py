"""The bank of negatives: the last vector of every candidate text that a step has computed, refreshed for free."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykalm.config import ObjectiveSettings
from pykalm.learn.batches import Batch
from pykalm.model.index import distinct_texts
from pykalm.text.texts import IntArray, Texts


class EntityBank(nn.Module):
    """Hold a float32 unit row for each distinct candidate text of a graph, and when it was computed. METHOD.md §2.

    vectors (N, D); computed (N,): the step of a row, counted from 0, or −1 where it is still empty; step: how many
    steps have filled the bank; row_of (E,): the row of an entity. Entities whose texts are equal share a row: nothing in
    a vector could tell them apart, so none may be a negative where another is an answer. A module for its state only:
    nothing in it is trained, and its vectors are constants of a loss.
    """

    vectors: Tensor
    computed: Tensor
    step: Tensor
    row_of: Tensor

    def __init__(self, texts: Texts, width: int, objective: ObjectiveSettings, *, device: torch.device) -> None:
        """Make an empty bank for the candidate texts (E,) of a graph's entities; objective.bank says of which kind."""
        super().__init__()
        distinct, row_of = distinct_texts(texts)
        self.momentum = objective.bank_momentum if objective.bank == "momentum" else 0.0
        self.age = objective.bank_age
        self.register_buffer("vectors", torch.zeros(len(distinct), width, device=device))
        self.register_buffer("computed", torch.full((len(distinct),), -1, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("row_of", torch.from_numpy(row_of).to(device), persistent=False)

    @torch.no_grad()
    def keep(self, batch: Batch, vectors: Tensor) -> None:
        """Take the vectors (C, D) of a step's candidates in, and count the step.

        A row that is filled and not too old becomes normalise(m · old + (1 − m) · new), any other the new vector.
        """
        rows = self._rows(batch.candidate_entities)
        share = self.momentum * self._fresh()[rows, None]
        mixed = F.normalize(share * self.vectors[rows] + (1 - share) * vectors, dim=-1)
        self.vectors[rows] = torch.where(share > 0, mixed, vectors)
        self.computed[rows] = self.step
        self.step += 1

    def negatives(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the bank adds to a batch: vectors (M, D), and the pairs (K, 2) of queries and known answers there.

        The candidates of the batch are left out, since they have newer vectors in it; so are rows that are too old.
        """
        counts = self._fresh()
        counts[self._rows(batch.candidate_entities)] = False
        column = counts.cumsum(0) - 1
        queries = torch.from_numpy(batch.known_answers[:, 0]).to(column.device)
        rows = self._rows(batch.known_answers[:, 1])
        pairs = torch.stack([queries, column[rows]], dim=1)
        return self.vectors[counts], pairs[counts[rows]]

    def _rows(self, entities: IntArray) -> Tensor:
        return self.row_of[torch.from_numpy(entities).to(self.row_of.device)]

    def _fresh(self) -> Tensor:
        """Return (N,) True where a row is filled, and at most `age` steps old where that is set."""
        oldest = 0 if self.age is None else (self.step - self.age).clamp_min(0)
        return self.computed >= oldest
