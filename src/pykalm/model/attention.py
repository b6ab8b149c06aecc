"""The attention mask of a token trie, in the form that a Hugging Face model takes it."""

from typing import Any

import torch
from torch import Tensor


def visible(ends: Tensor, depths: Tensor, window: int | None = None) -> Tensor:
    """Return (rows, 1, T, T), True where token i sees token j: j ≤ i < ends[j], and depth less than a window apart.

    ends, depths (rows, T) as in RowGroup. METHOD.md §6.
    """
    index = torch.arange(ends.shape[1], device=ends.device)
    sees = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < ends[:, None, :])
    if window is not None:
        sees &= depths[:, :, None] - depths[:, None, :] < window
    return sees[:, None]


def trie_attention(config: Any, ends: Tensor, depths: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Return the `attention_mask` argument for a model: one mask, or one for each type of layer where a model mixes them.

    dtype is that of the computation; attention other than SDPA adds the mask to its scores, so it takes numbers.
    """
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or [])
    if len(types) > 1:
        return {
            kind: _as_argument(config, visible(ends, depths, window if kind == "sliding_attention" else None), dtype)
            for kind in types
        }
    slides = types == {"sliding_attention"} or (not types and window is not None)
    return _as_argument(config, visible(ends, depths, window if slides else None), dtype)


def _as_argument(config: Any, sees: Tensor, dtype: torch.dtype) -> Tensor:
    if getattr(config, "_attn_implementation", None) == "sdpa":
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
