"""How vectors lie: alignment, uniformity, mean cosine and the spectrum of a set of them. docs/measures.md."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pykalm.errors import ModelError, UsageError

FloatArray = npt.NDArray[np.float64]
Step = Callable[[int], None]

PRODUCTS_AT_ONCE = 1 << 22
"""Products of vectors, float64, that are held at the same time: 32 MB."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """Hold what describes a set of unit vectors (n, D); alignment is that of the pairs they stand in, where they do.

    spectrum: shares of the eigenvalues of their second-moment matrix, largest first, min(n, D) of them, sum 1.
    """

    num_vectors: int
    alignment: float | None
    uniformity: float
    mean_cosine: float
    spectrum: FloatArray

    @property
    def top_eigenvalue_share(self) -> float:
        """Return the share of the largest eigenvalue: 1 where all vectors lie on one line."""
        return float(self.spectrum[0])

    @property
    def effective_rank(self) -> float:
        """Return e to the entropy of the spectrum: k where k directions count alike."""
        shares = self.spectrum[self.spectrum > 0]
        return math.exp(-float((shares * np.log(shares)).sum()))

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as plain data."""
        return {
            "num_vectors": self.num_vectors,
            "alignment": self.alignment,
            "uniformity": self.uniformity,
            "mean_cosine": self.mean_cosine,
            "top_eigenvalue_share": self.top_eigenvalue_share,
            "effective_rank": self.effective_rank,
            "spectrum": self.spectrum.tolist(),
        }


def measure_geometry(vectors: Tensor, *, alignment: float | None = None, step: Step | None = None) -> Geometry:
    """Measure a set of unit vectors (n, D), n at least 2, in float64; `step` is told how many more of them are done.

    Raises UsageError for fewer, ModelError for a NaN.
    """
    if len(vectors) < 2:
        raise UsageError(f"wanted at least two vectors to compare, found {len(vectors)}. Raise the limit.")
    if not bool(vectors.isfinite().all()):
        raise ModelError("wanted finite vectors, found NaN or infinity. The weights are damaged.")
    return Geometry(len(vectors), alignment, uniformity(vectors, step=step), mean_cosine(vectors), spectrum(vectors))


def alignment(query: Tensor, answers: Tensor) -> float:
    """Return E‖q − k⁺‖² of P queries (P, D) and their answers (P, D): 0 where they meet, 4 where they are opposed."""
    return float((query.double() - answers.double()).square().sum(dim=1).mean())


def uniformity(vectors: Tensor, *, step: Step | None = None) -> float:
    """Return log E e^{−2‖x − y‖²} over pairs of different vectors of (n, D): 0 where all are equal, lower when spread."""
    rows = vectors.double()
    squares, total = rows.square().sum(dim=1), 0.0
    size = max(1, PRODUCTS_AT_ONCE // len(rows))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        distances = squares[part, None] + squares - 2 * rows[part] @ rows.T
        weights = torch.exp(-2 * distances)
        weights.diagonal(start).zero_()  # a vector and itself are no pair
        total += float(weights.sum())
        if step is not None:
            step(len(weights))
    return math.log(total / (len(rows) * (len(rows) - 1)))


def mean_cosine(vectors: Tensor) -> float:
    """Return the mean cosine over pairs of different unit vectors of (n, D)."""
    rows = vectors.double()
    everything, with_itself = rows.sum(dim=0).square().sum(), rows.square().sum()
    return float((everything - with_itself) / (len(rows) * (len(rows) - 1)))


def spectrum(vectors: Tensor) -> FloatArray:
    """Return the shares of the eigenvalues of the second-moment matrix of (n, D), largest first, min(n, D) of them.

    They are those of the Gram matrix of Theorem 2, which has the same eigenvalues and zeros besides; not centred.
    """
    rows = vectors.double()
    small = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(small).flip(0).clamp_min(0)
    shares: FloatArray = (values / values.sum()).numpy()
    return shares
