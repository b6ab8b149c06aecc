"""The attention mask of a token trie, in the form that a Hugging Face model takes it: a tensor, or blocks for a GPU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FLEX = "flex_attention"
"""The name that transformers has for it."""
Mask = Tensor | BlockMask

BLOCK = 128
"""Side of FlexAttention's blocks; its rows are a multiple of it."""


def rule(ends: Tensor, depths: Tensor, window: int | None = None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the function of (row, head, i, j) that says whether token i sees token j: the whole mask. METHOD.md §6.

    j ≤ i < ends[j], and depth less than a window apart; ends, depths (rows, T) as in RowGroup.
    """

    def sees(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = (j <= i) & (i < ends[row, j])
        return inside if window is None else inside & (depths[row, i] - depths[row, j] < window)

    return sees


def visible(ends: Tensor, depths: Tensor, window: int | None = None) -> Tensor:
    """Return (rows, 1, T, T), True where token i sees token j by the rule."""
    rows, index = (torch.arange(size, device=ends.device) for size in ends.shape)
    sees = rule(ends, depths, window)(rows[:, None, None], rows[:1], index[None, :, None], index[None, None, :])
    return sees[:, None]


def visible_blocks(ends: Tensor, depths: Tensor, window: int | None = None) -> BlockMask:
    """Return the same mask as FlexAttention takes it, from the bounds of every block alone: no T x T tensor is made.

    T is a multiple of BLOCK. A block is left out where no token of it can see one, and taken without the rule where all
    of its tokens see all.
    """
    rows, tokens = ends.shape
    by_block = (rows, tokens // BLOCK, BLOCK)
    number = torch.arange(tokens // BLOCK, device=ends.device)
    first, last = number * BLOCK, number * BLOCK + BLOCK - 1
    end, depth = ends.reshape(by_block), depths.reshape(by_block)
    before = (number[None, :] < number[:, None])[None]
    some = before & (end.amax(-1)[:, None, :] > first[None, :, None])
    every = before & (end.amin(-1)[:, None, :] > last[None, :, None])
    if window is not None:
        some = some & (depth.amin(-1)[:, :, None] - depth.amax(-1)[:, None, :] < window)
        every = every & (depth.amax(-1)[:, :, None] - depth.amin(-1)[:, None, :] < window)
    partly = (some & ~every) | torch.eye(len(number), dtype=torch.bool, device=ends.device)
    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=rule(ends, depths, window),
        seq_lengths=(tokens, tokens),
    )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return of (rows, N, N) how many blocks each block of queries has, and their numbers in front, one head for all."""
    count = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[:, None].contiguous(), order[:, None].contiguous()


def padded_to_blocks(token_ids: Tensor, depths: Tensor, ends: Tensor, *, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Widen (rows, T) to (rows, width) with tokens that see themselves only and that no other sees."""
    missing = width - ends.shape[1]
    own = torch.arange(ends.shape[1] + 1, width + 1, device=ends.device).expand(len(ends), -1)
    return F.pad(token_ids, (0, missing)), F.pad(depths, (0, missing)), torch.cat([ends, own], dim=1)


def trie_attention(config: Any, ends: Tensor, depths: Tensor, dtype: torch.dtype) -> Mask | dict[str, Mask]:
    """Return the `attention_mask` argument for a model: one mask, or one for each type of layer where a model mixes them.

    dtype is that of the computation; attention other than SDPA and FlexAttention adds the mask to its scores, so it
    takes numbers.
    """
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or [])
    if len(types) > 1:
        return {
            kind: _as_argument(config, ends, depths, window if kind == "sliding_attention" else None, dtype)
            for kind in types
        }
    slides = types == {"sliding_attention"} or (not types and window is not None)
    return _as_argument(config, ends, depths, window if slides else None, dtype)


def _as_argument(config: Any, ends: Tensor, depths: Tensor, window: int | None, dtype: torch.dtype) -> Mask:
    name = getattr(config, "_attn_implementation", None)
    if name == FLEX:
        return visible_blocks(ends, depths, window)
    sees = visible(ends, depths, window)
    if name == "sdpa":
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
