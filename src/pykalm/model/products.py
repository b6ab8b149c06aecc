"""Scores: inner products in float32, on x86 the same numbers however queries and vectors are cut.

There they are oneDNN's. PyTorch's own product of float32 is MKL's, which on AMD's processors takes twice the time or more,
and which adds up in another order where four threads or more share few rows. That oneDNN's order never changes was tried up to
16,384 columns; with AVX-512 it does beyond some 20,000. Other processors and GPUs were not looked at (docs/log.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16
"""The least rows and columns of a product: smaller ones add up in another order, and ties would break."""


def products(query: Tensor, vectors: Tensor) -> Tensor:
    """Return the scores (Q, C) of query (Q, D) with vectors (C, D), all float32 and on one device, without gradients."""
    left, right = _whole_tile(query.detach()), _whole_tile(vectors.detach())
    if left.device.type == "cpu" and has_onednn():
        scores: Tensor = torch.ops.mkldnn._linear_pointwise(left.contiguous(), right.contiguous(), None, "none", [], "")
    else:
        scores = left @ right.T
    return scores[: len(query), : len(vectors)]


def _whole_tile(rows: Tensor) -> Tensor:
    return rows if len(rows) >= TILE else F.pad(rows, (0, 0, 0, TILE - len(rows)))


@cache
def has_onednn() -> bool:
    """Return whether products of float32 can be oneDNN's here."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    # Its orders of adding up were looked at on x86 only.
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return available and is_x86 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let products of float32 be computed in float32, whatever faster format (TF32, bfloat16, autocast) has been allowed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
