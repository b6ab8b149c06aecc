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
    from_queries (N · H,), from_keys (N · K + 1,): a place by row of every vector end to end, and of one that is no vector's.
    asks (rows, H · T, 1): whether a query by row is that one; it is not where a row repeats what another holds, nor in padding.
    repeats, into (R,): the other places by row of the keys that several rows see, and those they are of end to end; what is
    none is of the vector too many. So that no form of its own is compiled where there is none, R is 2 at least.
    """

    queries: Tensor
    keys: Tensor
    from_queries: Tensor
    asks: Tensor
    from_keys: Tensor
    repeats: Tensor
    into: Tensor


def missing_lanes(keys: int, dtype: torch.dtype) -> int:
    """Return how many keys in bfloat16 are missing to whole vectors of LANES, where they fill one at least."""
    return -keys % LANES if dtype == torch.bfloat16 and keys >= LANES else 0


def with_unseen_keys(mask: Tensor, missing: int) -> Tensor:
    """Return a mask of numbers (..., S) with so many more keys, which nothing sees."""
    return F.pad(mask, (0, missing), value=torch.finfo(mask.dtype).min)


class Layout(NamedTuple):
    """Hold how the tokens of a group (rows, T) stand end to end: every distinct prefix once, however many rows repeat it.

    chosen (N,): the place in the flattened group of every token end to end; of (rows · T,): the reverse, also of what is
    repeated; 0 in padding.
    """

    chosen: npt.NDArray[np.int64]
    of: npt.NDArray[np.int64]


def layout(group: RowGroup) -> Layout:
    """Return how the tokens of a group stand end to end."""
    inside = np.flatnonzero(group.nodes >= 0)
    _, first, reverse = np.unique(group.twins.ravel()[inside], return_index=True, return_inverse=True)
    of = np.zeros(group.nodes.size, dtype=np.int64)
    of[inside] = reverse
    return Layout(inside[first], of)


def arguments(config: Any, group: RowGroup, where: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a Hugging Face model is called with to read the N tokens of a group (rows, T) end to end, on a CPU.

    The mask has a row for every query by row, (1, 1, rows · T, S): models hand a mask of four dimensions on as it is. Raises
    ValueError where the config does not say how many heads all layers have.
    """
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not all(isinstance(number, int) for number in heads):
        raise ValueError(f"wanted as many heads in every layer, found {heads[0]} of queries and {heads[1]} of keys")
    ends, depths = torch.from_numpy(group.ends), torch.from_numpy(group.depths)
    missing = missing_lanes(group.nodes.shape[1], dtype)
    mask = trie_attention(config, ends, depths, dtype)
    return {
        "input_ids": torch.from_numpy(group.token_ids.ravel()[where.chosen])[None],
        "position_ids": torch.from_numpy(group.depths.ravel()[where.chosen])[None],
        "attention_mask": {kind: _by_query(part, missing) for kind, part in mask.items()}
        if isinstance(mask, dict)
        else _by_query(mask, missing),
        ARGUMENT: _places(group.nodes >= 0, where, missing, *heads),
    }


def padded(states: Tensor, where: Layout) -> Tensor:
    """Return states (N, D) of a group's tokens, end to end, as (rows · T, D), with anything in padding."""
    return states.index_select(0, torch.from_numpy(where.of))


def require_heads(places: Places | None, query: Tensor, key: Tensor) -> None:
    """Raise ValueError where places are those of other heads than query and key (1, heads, N, d) have."""
    if places is None:
        return
    wanted = [part.shape[1] * part.shape[2] for part in (query, key)]
    found = [places.from_queries.shape[0], places.from_keys.shape[0] - 1]
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


def summed_end_to_end(part: Tensor, places: Tensor, repeats: Tensor, into: Tensor, heads: int) -> Tensor:
    """Return the sums of gradients at keys by row (..., d) as (1, N, heads, d), by Places."""
    vectors = part.reshape(-1, part.shape[-1])
    found = vectors.index_select(0, places).index_add_(0, into, vectors.index_select(0, repeats))
    return found[:-1].view(1, -1, heads, part.shape[-1])


def _by_query(mask: Any, missing: int) -> Tensor:
    """Return a mask (rows, 1, T, T) as (1, 1, rows · T, S), with so many more keys."""
    wider = with_unseen_keys(mask, missing)
    return wider.view(1, 1, -1, wider.shape[3])


def _places(inside: npt.NDArray[np.bool_], where: Layout, missing: int, query_heads: int, key_heads: int) -> Places:
    """Return the places of the tokens inside rows (rows, T), of which `missing` more keys than queries are padding."""
    rows, width = inside.shape
    asking = torch.from_numpy(where.of).view(rows, width)
    seen = F.pad(asking, (0, missing))
    is_chosen = np.zeros(inside.size, dtype=np.bool_)
    is_chosen[where.chosen] = True
    repeated = np.flatnonzero(inside.ravel() & ~is_chosen)

    def grid(columns_of_row: Tensor, heads: int) -> Tensor:
        return (columns_of_row[:, None] * heads + torch.arange(heads)[:, None]).flatten(1)

    def back(places: npt.NDArray[np.int64], heads: int, width_there: int) -> Tensor:
        row, column = (torch.from_numpy(part) for part in np.divmod(places, width))
        return ((row[:, None] * heads + torch.arange(heads)) * width_there + column[:, None]).flatten()

    none = torch.zeros(2, dtype=torch.long)
    found = (
        grid(asking, query_heads), grid(seen, key_heads),
        back(where.chosen, query_heads, width),
        torch.from_numpy(is_chosen).view(rows, 1, width, 1).expand(-1, query_heads, -1, -1).flatten(1, 2),
        torch.cat([back(where.chosen, key_heads, width + missing), none[:1]]),
        torch.cat([back(repeated, key_heads, width + missing), none]),
        torch.cat([grid(torch.from_numpy(where.of[repeated])[:, None], key_heads).flatten(),
                   none + len(where.chosen) * key_heads]),
    )  # fmt: skip
    return Places(*(part.clone() for part in found))  # no views: a compiler looks at what they are of, too
