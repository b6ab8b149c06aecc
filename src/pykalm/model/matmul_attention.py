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

from pykalm.model.layers import computed_dtype

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
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Autocast ends inside an operation, and in its gradient it is off.
    query, key, value = (part.to(computed_dtype(part)) for part in (query, key, value))
    drops = dropout if module.training else 0.0
    if drops or (attention_mask is not None and attention_mask.requires_grad):
        weights, value = _weights(query, key, value, attention_mask, scale)
        return _mixed(F.dropout(weights, p=drops), value), None
    mixed: Tensor = _attend(query, key, value, attention_mask, scale)[0]
    return mixed, None


# Operations of their own: a compiler fuses a softmax with what pads and transposes it, which here is several times slower.
@torch.library.custom_op("kalm::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return what is mixed (rows, T, H, d), and the weights (rows, H, T, S or more) by which, for the gradient."""
    with torch.autocast("cpu", enabled=False):
        weights, value = _weights(query, key, value, mask, scale)
        return _mixed(weights, value), weights


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = query.shape
    keys = key.shape[2] + (0 if mask is None else _missing(key))
    return value.new_empty(rows, length, heads, value.shape[3]), value.new_empty(rows, heads, length, keys)


@torch.library.custom_op("kalm::attend_gradients", mutates_args=())
def _gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at query, key and value."""
    with torch.autocast("cpu", enabled=False):
        rows, groups, length, _ = key.shape
        key, value = (F.pad(part, (0, 0, 0, weights.shape[3] - length)) for part in (key, value))
        above, asked, by = (_folded(part, groups) for part in (gradient.transpose(1, 2), query, weights))
        keys, values = (_folded(part, groups) for part in (key, value))
        at_weights = torch.bmm(above, values.transpose(1, 2))
        at_scores = torch._softmax_backward_data(at_weights, by, -1, by.dtype)
        at_query = torch.bmm(at_scores, keys).mul_(scale).view(query.shape)
        at_key = torch.bmm(at_scores.transpose(1, 2), asked).mul_(scale)
        at_value = torch.bmm(by.transpose(1, 2), above)
        at_key, at_value = (part.view(rows, groups, *part.shape[1:])[:, :, :length] for part in (at_key, at_value))
        return at_query, at_key.contiguous(), at_value.contiguous()


@_gradients.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, _, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_gradients(gradient, *ctx.saved_tensors, ctx.scale), None, None


_attend.register_autograd(_backward, setup_context=_keep)


def _weights(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the weights (rows, H, T, S or more) of the softmax, and value with as many rows."""
    if mask is not None and (missing := _missing(key)):
        # Keys that nothing sees, so that there are whole vectors of them.
        mask = F.pad(mask, (0, missing), value=torch.finfo(mask.dtype).min)
        key, value = (F.pad(part, (0, 0, 0, missing)) for part in (key, value))
    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    scores = torch.bmm(_folded(query * scale, groups), _folded(key, groups).transpose(1, 2))
    scores = scores.view(rows, heads, length, -1)
    if mask is not None:
        # A wider mask, as of float32 weights under autocast, makes wider scores: rounded, its least number were -inf, and
        # what sees nothing, as padding at the left, NaN.
        scores = scores.add_(mask) if mask.dtype == scores.dtype else scores + mask
    return torch.softmax(scores, dim=-1).to(value.dtype), value


def _mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Return weights (rows, H, T, S) · value (rows, K, S, d) as (rows, T, H, d)."""
    rows, heads, length, _ = weights.shape
    groups = value.shape[1]
    mixed = torch.bmm(_folded(weights, groups), _folded(value, groups))
    return mixed.view(rows, heads, length, -1).transpose(1, 2).contiguous()


def _folded(part: Tensor, groups: int) -> Tensor:
    """Return (rows, H, T, x) as (rows · groups, H / groups · T, x): the heads of a group are one longer head."""
    rows, heads, length, width = part.shape
    return part.reshape(rows * groups, heads // groups * length, width)


def _missing(key: Tensor) -> int:
    """Return how many keys in bfloat16 (rows, K, S, d) are missing to whole vectors of LANES, where they fill one at least."""
    return -key.shape[2] % LANES if key.dtype == torch.bfloat16 and key.shape[2] >= LANES else 0


AttentionInterface.register(NAME, matmul_attention)
AttentionMaskInterface.register(NAME, eager_mask)
