"""Scores: inner products in float32, the same numbers however queries and vectors are cut.

On x86 they are oneDNN's. PyTorch's own product of float32 is MKL's, which on AMD's processors takes twice the time or more,
and which adds up in another order where more threads share few rows (docs/log.md).
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
    if min(len(query), len(vectors)) < TILE:
        padded = (F.pad(side, (0, 0, 0, max(0, TILE - len(side)))) for side in (query, vectors))
        return products(*padded)[: len(query), : len(vectors)]
    if query.device.type == "cpu" and has_onednn():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            query.detach().contiguous(), vectors.detach().contiguous(), None, "none", [], ""
        )
        return found
    return query @ vectors.T


@cache
def has_onednn() -> bool:
    """Return whether products of float32 can be oneDNN's here."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return (
        available
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith(
            "AVX"
        )  # its orders of adding up were looked at there only
    )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Let products of float32 be computed in float32, whatever faster format (TF32, bfloat16) has been allowed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
