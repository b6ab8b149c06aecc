"""Rows without padding: the tokens of a pass stand end to end, and attention alone, which goes by row, pads them for itself."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm.model.attention import trie_attention
from pykalm.text.trie import RowGroup

ARGUMENT = "kalm_rows"
"""The name under which a model hands our attention the places below; those that do not hand it on take padded rows."""

LANES = 32
"""Numbers in bfloat16 that softmax reads at once; those beyond whole vectors it reads one by one, which can double its time."""


class Places(NamedTuple):
    """Hold where the vectors of N tokens in H heads of queries and K of keys are, end to end (N, heads) and by row.

    queries (rows, H · T), keys (rows, K · S): the place end to end of every vector by row, head and column; any, in padding.
    from_queries (N · H,), from_keys (N · K,): the place by row of every vector end to end.
    """

    queries: Tensor
    keys: Tensor
    from_queries: Tensor
    from_keys: Tensor


def missing_lanes(keys: int, dtype: torch.dtype) -> int:
    """Return how many keys in bfloat16 are missing to whole vectors of LANES, where they fill one at least."""
    return -keys % LANES if dtype == torch.bfloat16 and keys >= LANES else 0


def with_unseen_keys(mask: Tensor, missing: int) -> Tensor:
    """Return a mask of numbers (..., S) with so many more keys, which nothing sees."""
    return F.pad(mask, (0, missing), value=torch.finfo(mask.dtype).min)


def arguments(config: Any, group: RowGroup, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a Hugging Face model is called with to read the N tokens of a group (rows, T) end to end, on a CPU.

    The mask has a row for every query by row, (1, 1, rows · T, S): models hand a mask of four dimensions on as it is. Raises
    ValueError where the config does not say how many heads all layers have.
    """
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not all(isinstance(number, int) for number in heads):
        raise ValueError(f"wanted as many heads in every layer, found {heads[0]} of queries and {heads[1]} of keys")
    ends, depths = torch.from_numpy(group.ends), torch.from_numpy(group.depths)
    inside, missing = group.nodes >= 0, missing_lanes(group.nodes.shape[1], dtype)
    mask = trie_attention(config, ends, depths, dtype)
    return {
        "input_ids": torch.from_numpy(group.token_ids[inside])[None],
        "position_ids": torch.from_numpy(group.depths[inside])[None],
        "attention_mask": {kind: _by_query(part, missing) for kind, part in mask.items()}
        if isinstance(mask, dict)
        else _by_query(mask, missing),
        ARGUMENT: _places(inside, missing, *heads),
    }


def places_of(group: RowGroup, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where tokens at some places of a flattened group stand end to end."""
    found: npt.NDArray[np.int64] = (np.cumsum(group.nodes.ravel() >= 0) - 1)[places]
    return found


def padded(states: Tensor, group: RowGroup) -> Tensor:
    """Return states (N, D) of a group's tokens, end to end, as (rows · T, D), with 0 in padding."""
    places = torch.from_numpy(np.flatnonzero(group.nodes >= 0))
    return states.new_zeros(group.nodes.size, states.shape[1]).index_copy(0, places, states)


def require_heads(places: Places | None, query: Tensor, key: Tensor) -> None:
    """Raise ValueError where places are those of other heads than query and key (1, heads, N, d) have."""
    if places is None:
        return
    wanted = [part.shape[1] * part.shape[2] for part in (query, key)]
    found = [part.shape[0] for part in (places.from_queries, places.from_keys)]
    if wanted != found:
        raise ValueError(f"wanted the places of {wanted} vectors of queries and keys, found those of {found}")


def by_row(part: Tensor, places: Tensor) -> Tensor:
    """Return vectors end to end (1, heads, N, d) as (rows, heads · T, d), by their places (rows, heads · T)."""
    vectors = part[0].transpose(0, 1).reshape(-1, part.shape[-1])
    return vectors.index_select(0, places.view(-1)).view(*places.shape, part.shape[-1])


def end_to_end(part: Tensor, places: Tensor, heads: int) -> Tensor:
    """Return vectors by row (..., d) as (1, N, heads, d), by their places (N · heads,)."""
    vectors = part.reshape(-1, part.shape[-1])
    return vectors.index_select(0, places).view(1, -1, heads, part.shape[-1])


def _by_query(mask: Any, missing: int) -> Tensor:
    """Return a mask (rows, 1, T, T) as (1, 1, rows · T, S), with so many more keys."""
    wider = with_unseen_keys(mask, missing)
    return wider.view(1, 1, -1, wider.shape[3])


def _places(inside: npt.NDArray[np.bool_], missing: int, query_heads: int, key_heads: int) -> Places:
    """Return the places of the tokens inside rows (rows, T), of which `missing` more keys than queries are padding."""
    rows, columns = (torch.from_numpy(part) for part in np.nonzero(inside))
    tokens = torch.zeros(inside.shape[0], inside.shape[1] + missing, dtype=torch.long)
    tokens[rows, columns] = torch.arange(len(rows))

    def grid(columns_of_row: Tensor, heads: int) -> Tensor:
        return (columns_of_row[:, None] * heads + torch.arange(heads)[:, None]).flatten(1)

    def back(heads: int, width: int) -> Tensor:
        return ((rows[:, None] * heads + torch.arange(heads)) * width + columns[:, None]).flatten()

    asking = tokens[:, : inside.shape[1]]
    found = (
        grid(asking, query_heads), grid(tokens, key_heads),
        back(query_heads, asking.shape[1]), back(key_heads, tokens.shape[1]),
    )  # fmt: skip
    return Places(*(part.clone() for part in found))  # no views: a compiler looks at what they are of, too
