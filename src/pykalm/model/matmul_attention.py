"""Attention as plain matrix products: on a CPU, over short packed rows, several times as fast as the fused kernel.

A fused kernel saves the memory of the scores, which for rows of a few hundred tokens is small, and pays for it in the
backward pass by computing them again in small blocks. Here the scores are kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "kalm_matmul"

LANES = 32
"""Numbers in bfloat16 that softmax reads at once; those beyond whole vectors it reads one by one, which can double its time."""

# What some families hand to their attention that changes its result, and that is not computed here.
UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask", "sinks")


def matmul_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return softmax(query · keyᵀ · scaling + mask) · value as (rows, T, H, d), in the form transformers asks for.

    query (rows, H, T, d); key, value (rows, K, S, d), each for H / K heads of queries, which are read as one longer head
    so that nothing is repeated; attention_mask (rows, 1, T, S), added. Raises ValueError for what other families ask of
    their attention: the check at the start then takes another one.
    """
    if asked := [name for name in UNKNOWN if options.get(name) is not None]:
        raise ValueError(f"{NAME}: {', '.join(asked)} not computed here")
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    longer = heads // groups * length
    scale = width**-0.5 if scaling is None else scaling
    if attention_mask is not None and key.dtype == torch.bfloat16:
        key, value, attention_mask = _whole_vectors(key, value, attention_mask)
    keys, values = (part.reshape(rows * groups, part.shape[2], part.shape[3]) for part in (key, value))
    scores = torch.bmm((query * scale).reshape(rows * groups, longer, width), keys.transpose(1, 2))
    scores = scores.view(rows, heads, length, -1)
    if attention_mask is not None:
        # A wider mask, as of float32 weights under autocast, makes wider scores: rounded, its least number were -inf, and
        # what sees nothing, as padding at the left, NaN.
        fits = attention_mask.dtype == scores.dtype
        scores = scores.add_(attention_mask) if fits else scores + attention_mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    mixed = torch.bmm(weights.view(rows * groups, longer, -1), values)
    return mixed.view(rows, heads, length, -1).transpose(1, 2).contiguous(), None


def _whole_vectors(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add keys that nothing sees, up to whole vectors of LANES, to rows of a vector at least with more than a quarter over."""
    over = key.shape[2] % LANES
    if key.shape[2] < LANES or over <= LANES // 4:
        return key, value, mask
    more = LANES - over
    hidden = F.pad(mask, (0, more), value=torch.finfo(mask.dtype).min)
    return F.pad(key, (0, 0, 0, more)), F.pad(value, (0, 0, 0, more)), hidden


AttentionInterface.register(NAME, matmul_attention)
AttentionMaskInterface.register(NAME, eager_mask)
