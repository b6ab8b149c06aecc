"""Which states of a text become its vector: that of its last token, or the mean over all its tokens."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from pykalm.model.arrays import on_device
from pykalm.text.texts import IntArray
from pykalm.text.trie import RowGroup

Pooling = Callable[[Tensor, RowGroup, IntArray], Tensor]


def last_token(states: Tensor, group: RowGroup, places: IntArray) -> Tensor:
    """Return the states (P, D) at the places (P,) where texts end in a flattened group of rows, states (T, D)."""
    return states[on_device(places, states.device)]


def token_mean(states: Tensor, group: RowGroup, places: IntArray) -> Tensor:
    """Return the mean (P, D), in float32, of the states (T, D) along the paths of the texts that end at places (P,).

    As exact as the last state is: every state of a path is what a pass over that text alone gives. A state that several
    texts share is read once and counts in the mean of each.
    """
    tokens, starts = (on_device(part, states.device) for part in group.paths_to(places))
    return F.embedding_bag(tokens, states.float(), starts, mode="mean", include_last_offset=True)


POOLINGS: dict[str, Pooling] = {"last": last_token, "mean": token_mean}
