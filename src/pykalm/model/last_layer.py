"""The last layer's feed-forward part, computed for the tokens whose states are read: nothing else ever sees its result.

A token of any other layer is seen by those after it. Of the last one only the states are used, of a batch at the ends of texts
and where completions are scored: about every tenth (docs/log.md). Its attention sees all tokens, as always.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pykalm.model.layers import find_layers

NAMES = ("mlp", "feed_forward", "ffn")
"""What families call the part of a layer that computes every token by itself. One that does not is refused at the start."""

_own = threading.local()


def feed_forward(model: Any) -> tuple[str, nn.Module] | None:
    """Return name and module of the last layer's feed-forward part in a Hugging Face model, where it is a module."""
    found = [
        (f"{name}.{len(stack) - 1}.{part}", getattr(stack[-1], part))
        for name, stack in find_layers(model)
        for part in NAMES
        if isinstance(getattr(stack[-1], part, None), nn.Module)
    ]
    return found[0] if len(found) == 1 else None


def can_be_narrowed(model: Any) -> bool:
    """Prepare a model for `narrowed_to`; return whether it has such a part."""
    found = feed_forward(model)
    if found is not None and _narrow not in found[1]._forward_pre_hooks.values():
        found[1].register_forward_pre_hook(_narrow)
        found[1].register_forward_hook(_widen)
    return found is not None


@contextmanager
def narrowed_to(places: Tensor | None) -> Iterator[None]:
    """Let passes in this thread compute that part at these places (P,) of their flattened tokens, or at all for None.

    The states of all other tokens are then of no use.
    """
    _own.places, _own.shape = places, None
    try:
        yield
    finally:
        _own.places = _own.shape = None


def _narrow(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor] | None:
    """Return the input (1, P, D) at the places, of the input of all tokens (..., D)."""
    places = getattr(_own, "places", None)
    if places is None or _own.shape is not None:  # a part that was prepared may be wrapped, and prepared again
        return None
    if len(arguments) != 1:
        raise TypeError(f"{type(module).__name__}: wanted one input by its place, found {len(arguments)}")
    x: Tensor = arguments[0]
    _own.shape = x.shape[:-1]
    return (x.reshape(-1, x.shape[-1]).index_select(0, places)[None],)


def _widen(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
    """Return the output of all tokens (..., D) with 0 where none was computed."""
    shape: torch.Size | None = getattr(_own, "shape", None)
    if shape is None:
        return None
    _own.shape = None
    if not isinstance(output, Tensor):
        raise TypeError(f"{type(module).__name__}: wanted one tensor, found {type(output).__name__}")
    whole = output.new_zeros(shape.numel(), output.shape[-1])
    return whole.index_copy(0, _own.places, output[0]).view(*shape, -1)
