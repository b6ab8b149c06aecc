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
from pykalm.model.operations import gradient_of, operation, shapes_of
from pykalm.model.unpadded import (
    ARGUMENT,
    by_row,
    end_to_end,
    missing_lanes,
    require_heads,
    summed_end_to_end,
    with_unseen_keys,
)

NAME = "kalm_matmul"

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
    so that nothing is repeated; attention_mask (rows, 1, T, S), added. With the places of rows that stand end to end
    (`unpadded.ARGUMENT`) they are (1, heads, N, d), the mask (1, 1, rows · T, S), and the result (1, N, H, d). Raises
    ValueError for what other families ask of their attention: the check at the start then takes another one.
    """
    if asked := [name for name in UNKNOWN if options.get(name) is not None]:
        raise ValueError(f"{NAME}: {', '.join(asked)} not computed here")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Autocast ends inside an operation, and in its gradient it is off.
    query, key, value = (part.to(computed_dtype(part)) for part in (query, key, value))
    query = query * scale  # here, where a compiler makes it part of another loop
    places: tuple[Tensor | None, ...] = options.get(ARGUMENT) or (None,) * 7
    require_heads(options.get(ARGUMENT), query, key)
    drops = dropout if module.training else 0.0
    if drops or (attention_mask is not None and attention_mask.requires_grad):
        weights, values = _weights(query, key, value, attention_mask, *places[:2])
        mixed = torch.bmm(F.dropout(weights, p=drops), values)
        return _unfolded(mixed, query.shape, places[2]), None
    return _attend(query, key, value, attention_mask, *places)[0], None


# Operations of their own: a compiler fuses a softmax with what pads and transposes it, which here is several times slower.
@operation("attend")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, queries: Tensor | None, keys: Tensor | None,
    from_queries: Tensor | None, asks: Tensor | None, from_keys: Tensor | None, repeats: Tensor | None, into: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what is mixed (rows, T, H, d), and the weights (rows · K, H / K · T, S or more) by which, for the gradient."""
    with torch.autocast("cpu", enabled=False):
        weights, values = _weights(query, key, value, mask, queries, keys)
        return _unfolded(torch.bmm(weights, values), query.shape, from_queries), weights


@shapes_of(_attend)
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, queries: Tensor | None, keys: Tensor | None,
    from_queries: Tensor | None, asks: Tensor | None, from_keys: Tensor | None, repeats: Tensor | None, into: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, heads, length, _ = query.shape
    groups = key.shape[1]
    mixed = value.new_empty(rows, length, heads, value.shape[3])
    if mask is not None and queries is not None:
        return mixed, value.new_empty(queries.shape[0] * groups, queries.shape[1] // groups, mask.shape[3])
    seen = key.shape[2] + (0 if mask is None else missing_lanes(key.shape[2], key.dtype))
    return mixed, value.new_empty(rows * groups, heads // groups * length, seen)


@operation("attend_gradients")
def _gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, queries: Tensor | None,
    keys: Tensor | None, from_queries: Tensor | None, asks: Tensor | None, from_keys: Tensor | None, repeats: Tensor | None,
    into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients at query, key and value."""
    with torch.autocast("cpu", enabled=False):
        groups, seen = key.shape[1], weights.shape[2]
        above, asked = (_folded(part, groups, queries) for part in (gradient.transpose(1, 2), query))
        by, values = (_folded(part, groups, keys, seen=seen) for part in (key, value))
        if asks is not None:
            above.view(*asks.shape[:2], -1).mul_(asks)
        at_weights = torch.bmm(above, values.transpose(1, 2))
        at_scores = torch._softmax_backward_data(at_weights, weights, -1, weights.dtype)
        summed = None if repeats is None or into is None else (repeats, into)
        at_query = _unfolded(torch.bmm(at_scores, by), query.shape, from_queries)
        at_key = _unfolded(torch.bmm(at_scores.transpose(1, 2), asked), key.shape, from_keys, summed)
        at_value = _unfolded(torch.bmm(weights.transpose(1, 2), above), value.shape, from_keys, summed)
        return at_query.transpose(1, 2), at_key.transpose(1, 2), at_value.transpose(1, 2)


@shapes_of(_gradients)
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, queries: Tensor | None,
    keys: Tensor | None, from_queries: Tensor | None, asks: Tensor | None, from_keys: Tensor | None, repeats: Tensor | None,
    into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    at_query, at_key, at_value = (
        part.new_empty(part.transpose(1, 2).shape).transpose(1, 2) for part in (query, key, value)
    )
    return at_query, at_key, at_value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, _, *places = inputs
    ctx.save_for_backward(query, key, value, output[1], *places)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(gradient, *ctx.saved_tensors), *(None,) * 8


gradient_of(_attend, _backward, keep=_keep)


def _weights(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, queries: Tensor | None, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the weights (rows · K, H / K · T, S or more) of the softmax, and folded value with as many rows."""
    groups, heads = key.shape[1], query.shape[1]
    if mask is not None and queries is None and (missing := missing_lanes(key.shape[2], key.dtype)):
        mask = with_unseen_keys(mask, missing)  # so that there are whole vectors of keys
    seen = None if mask is None else mask.shape[3]
    asked = _folded(query, groups, queries)
    by, values = (_folded(part, groups, keys, seen=seen) for part in (key, value))
    scores = torch.bmm(asked, by.transpose(1, 2))
    if mask is not None:
        # A wider mask, as of float32 weights under autocast, makes wider scores: rounded, its least number were -inf, and
        # what sees nothing, as padding at the left, NaN.
        rows = by.shape[0] // groups
        by_head = scores.view(rows, heads, -1, mask.shape[3])
        mask = mask if queries is None else mask.view(rows, 1, -1, mask.shape[3])
        scores = (by_head.add_(mask) if mask.dtype == scores.dtype else by_head + mask).view(scores.shape)
    return torch.softmax(scores, dim=-1).to(value.dtype), values


def _folded(part: Tensor, groups: int, places: Tensor | None, *, seen: int | None = None) -> Tensor:
    """Return (rows, heads, T, d) as (rows · groups, heads / groups · T, d): the heads of a group are one longer head.

    By their places, where rows stand end to end; else with 0 up to so many keys that are seen.
    """
    if places is not None:
        part = by_row(part, places)
    elif seen is not None and seen > part.shape[2]:
        part = F.pad(part, (0, 0, 0, seen - part.shape[2]))
    return part.reshape(part.shape[0] * groups, -1, part.shape[-1])


def _unfolded(
    part: Tensor, shape: torch.Size, places: Tensor | None, summed: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return what is folded as (rows, T, heads, d), where it came from a tensor of `shape` (rows, heads, T, ...).

    summed: where vectors by row are added to those at their places, `repeats` and `into` of Places.
    """
    rows, heads, length = shape[:3]
    if places is not None and summed is not None:
        return summed_end_to_end(part, places, *summed, heads)
    if places is not None:
        return end_to_end(part, places, heads)
    return part.view(rows, heads, -1, part.shape[-1])[:, :, :length].transpose(1, 2).contiguous()


AttentionInterface.register(NAME, matmul_attention)
AttentionMaskInterface.register(NAME, eager_mask)
