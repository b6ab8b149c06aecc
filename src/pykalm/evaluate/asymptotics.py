"""Theorem 1 as a measurement: the contrastive loss with N negatives, less log N, against N and against its limit.

docs/measures.md. For positives (q, k) and populations of queries and candidates,

    L(N) − log N,  where  L(N) = mean of −log( e^{q·k/τ} / (e^{q·k/τ} + Σ over N negatives e^{s/τ}) )  in both views, halved,

tends to −E[q·k]/τ + ½ E_q log E_k e^{q·k/τ} + ½ E_k log E_q e^{q·k/τ}. The negatives of a positive are drawn from the others
of its population without replacement, whether they are true or not, as in the theorem. With all others, N = M − 1 of M, the
sum under the logarithm runs over the population, each member once; so does the limit's inner mean, and the two differ by
log(M / (M − 1)).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykalm.errors import ModelError, UsageError
from pykalm.evaluate.geometry import FloatArray, Step
from pykalm.graph.graph import IntArray

SCORES_AT_ONCE = 1 << 21
"""Scores, float64, of which a few copies are held at the same time: 16 MB each."""


@dataclass(frozen=True, eq=False)
class Asymptotics:
    """Hold the normalised loss (n,) for n numbers of negatives and its limit, in each view and in their mean.

    `tails`: queries against entities; `heads`: entities against queries; each as (losses, limit).
    """

    num_negatives: tuple[int, ...]
    tails: tuple[FloatArray, float]
    heads: tuple[FloatArray, float]
    temperature: float
    num_pairs: int

    @property
    def normalised_loss(self) -> FloatArray:
        """Return L_exp − log N for every number of negatives."""
        return (self.tails[0] + self.heads[0]) / 2

    @property
    def limit(self) -> float:
        """Return what the normalised loss tends to."""
        return (self.tails[1] + self.heads[1]) / 2

    def to_dict(self) -> dict[str, Any]:
        """Return the curve, its limit and the two views as plain data."""
        views = {
            name: {"normalised_loss": losses.tolist(), "limit": limit}
            for name, (losses, limit) in (("tails", self.tails), ("heads", self.heads))
        }
        return {
            "num_negatives": list(self.num_negatives),
            "normalised_loss": self.normalised_loss.tolist(),
            "limit": self.limit,
            "temperature": self.temperature,
            "num_pairs": self.num_pairs,
            "views": views,
        }


def measure_asymptotics(
    query: Tensor,
    candidates: Tensor,
    pairs: IntArray,
    *,
    temperature: float,
    num_negatives: Sequence[int] | None = None,
    seed: int = 0,
    step: Step | None = None,
) -> Asymptotics:
    """Measure L_exp − log N of pairs (P, 2) of rows of query (Q, D) and candidates (C, D), both populations, unit rows.

    num_negatives: powers of 2 up to all others of the smaller population by default. Margin 0; all in float64, in chunks.
    `step` is told how many more pairs are done, of 2 P. Raises UsageError for a number of negatives that the populations lack.
    """
    most = min(len(query), len(candidates)) - 1
    numbers = tuple(ladder(most) if num_negatives is None else num_negatives)
    if not numbers or min(numbers) < 1 or max(numbers) > most:
        raise UsageError(f"wanted 1 to {most} negatives, found {list(numbers)}.")
    generator = torch.Generator().manual_seed(seed)
    views = [
        contrast_view(
            anchors[torch.from_numpy(pairs[:, near])], pairs[:, far], others,
            num_negatives=numbers, temperature=temperature, generator=generator, step=step,
        )
        for near, far, anchors, others in ((0, 1, query, candidates), (1, 0, candidates, query))
    ]  # fmt: skip
    return Asymptotics(numbers, views[0], views[1], temperature, len(pairs))


def ladder(most: int) -> list[int]:
    """Return 1, 2, 4, ... and at last `most`, without a power of 2 that comes too close to it."""
    powers = [1 << power for power in range(most.bit_length()) if 1.4 * (1 << power) < most]
    return [*powers, most]


def contrast_view(
    anchors: Tensor,
    targets: IntArray,
    others: Tensor,
    *,
    num_negatives: Sequence[int],
    temperature: float,
    generator: torch.Generator,
    step: Step | None = None,
) -> tuple[FloatArray, float]:
    """Return the normalised loss (n,) of one view for n numbers of negatives, and its limit.

    anchors (P, D) with their targets (P,), rows of others (M, D). Each anchor draws an order of the others; its first N
    are its negatives. Raises ModelError where a score is no number.
    """
    population = others.double()
    losses, limit = torch.zeros(len(num_negatives), dtype=torch.float64), 0.0
    size = max(1, SCORES_AT_ONCE // len(others))
    for rows in (slice(start, start + size) for start in range(0, len(anchors), size)):
        scores = anchors[rows].double() @ population.T / temperature
        target = torch.from_numpy(targets)[rows, None]
        own = scores.gather(1, target)
        order = torch.rand(scores.shape, generator=generator).argsort(dim=1)
        totals = _log_sums(scores.gather(1, order), own, (order == target).int().argmax(dim=1), num_negatives)
        losses += (totals - own).sum(dim=0)
        limit += float((scores.logsumexp(dim=1, keepdim=True) - own).sum())
        if step is not None:
            step(len(scores))
    if not bool(losses.isfinite().all()):
        raise ModelError("wanted finite scores, found NaN or infinity in the vectors. The weights are damaged.")
    numbers = np.array(num_negatives, dtype=np.float64)
    return losses.numpy() / len(anchors) - np.log(numbers), limit / len(anchors) - float(np.log(len(others)))


def _log_sums(shuffled: Tensor, own: Tensor, place: Tensor, num_negatives: Sequence[int]) -> Tensor:
    """Return (B, n) log of the sum over the target and its first N others, of scores (B, M) in the order of their draw.

    own (B, 1) the target's score, place (B,) where it stands: among the first N + 1 it is one of them, else it is added.
    """
    sums = shuffled.logcumsumexp(dim=1)
    numbers = torch.tensor(list(num_negatives))
    return torch.where(place[:, None] <= numbers, sums[:, numbers], torch.logaddexp(sums[:, numbers - 1], own))
