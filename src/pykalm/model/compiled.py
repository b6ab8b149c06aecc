"""Compiled layers: torch.compile fuses what stands between the products of a layer, for rows of any number and length."""

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pykalm.errors import ModelError
from pykalm.memory import is_out_of_memory
from pykalm.model import dropout, lora, matmul_attention, packed_weights
from pykalm.model.dropout import drawing_from
from pykalm.model.encoder import Encoder
from pykalm.model.last_layer import feed_forward
from pykalm.model.layers import find_layers
from pykalm.model.side_by_side import side_by_side
from pykalm.text.trie import RowGroup, build_trie, row_group

FORMS = 64
"""Forms of a layer that are compiled when they are met; by default eight, and others are left slow. With and without gradient,
dropout, a mask, an input that learns, one row and more, these come to more."""
WITH_OPERATIONS = dropout, lora, matmul_attention, packed_weights
"""The modules that hold operations of ours, which compiled code calls as they are."""


def compile_layers(encoder: Encoder) -> None:
    """Let torch.compile fuse the work of each layer, and try it, with gradients and without, as a training will call it.

    Layers are alike, so one is compiled for all; the threads that compute chunks side by side share what is compiled, for one
    thread each. Raises ModelError where this machine cannot compile.
    """
    name, was_training = type(encoder.causal_lm).__name__, encoder.training
    limit = _limit()
    try:
        if encoder.train().computes_again:
            raise ModelError(
                f"training.compile: wanted layers that are computed once, found gradient checkpointing in {name}, which would "
                "draw other dropout in compiled layers the second time. Turn one of the two off; training.memory_tokens "
                "bounds memory too."
            )
        # One that computes few tokens only, at places that are a thread's own, is no matter of a compiler.
        narrow = feed_forward(encoder.causal_lm) if encoder.narrow else None
        for layer in _layers(encoder):
            if narrow is not None and narrow[1] in layer.modules():
                continue
            layer.compile(**_options(encoder.device), **limit)
            _compute_by(layer, layer._compiled_call_impl)
        encoder.is_compiled = True
        _try(encoder)
    except Exception as error:  # whatever a compiler raises
        undo_compiling(encoder)
        if isinstance(error, ModelError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ModelError(
            f"training.compile: wanted to compile {name}, found {type(error).__name__}: {reason} A CPU needs a C++ compiler "
            "(on Debian or Ubuntu: apt install g++). Install one, or set training.compile=false: as good, slower."
        ) from error
    finally:
        encoder.train(was_training)


def _options(device: torch.device) -> dict[str, Any]:
    """Return how layers are compiled for a device.

    On a CPU by code that calls its loops from C++ and lets go of Python's lock meanwhile, for which threads side by side wait
    half as long. PyTorch keeps compiled code on disk and does not look into our operations, which a new version may
    change; so it is kept under what they are, in the one option that holds any words and does nothing else here.
    On a GPU for rows as long as those of a training, and any number of them: what a form met so far had in common stays.
    """
    if device.type != "cpu":
        return {"dynamic": None}
    return {"dynamic": True, "options": {"cpp_wrapper": True, "aot_inductor.metadata": {"pykalm": _operations()}}}


def _limit() -> dict[str, int]:
    """Let a layer be compiled in FORMS. Where PyTorch's settings are a thread's own, that is said to what is compiled."""
    if "recompile_limit" in signature(torch.compile).parameters:
        return {"recompile_limit": FORMS}
    torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
    return {}


@cache
def _operations() -> str:
    """Return a digest of the sources of our operations."""
    sources = [Path(str(module.__file__)).read_bytes() for module in WITH_OPERATIONS]
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _try(encoder: Encoder) -> None:
    """Compile what a training calls, in the threads that will."""
    at_once, groups, one_at_a_time = encoder.chunks_at_once(), _some_rows(encoder), Lock()

    def attempt(_: int) -> None:
        with one_at_a_time:  # or each would compile for itself
            _passes_and_gradient(encoder, groups)

    with (
        torch.random.fork_rng(devices=[encoder.device] if encoder.device.type == "cuda" else []),
        torch.enable_grad(),
        closing(side_by_side(attempt, range(at_once), at_once=at_once)) as attempts,
    ):
        list(attempts)


def undo_compiling(encoder: Encoder) -> None:
    """Let layers compute as they did before they were compiled."""
    encoder.is_compiled = False
    for layer in _layers(encoder):
        _compute_by(layer, None)


def _compute_by(layer: nn.Module, compiled: Any) -> None:
    """Let a layer compute by what was compiled, or plainly, and drop as that does."""
    layer._compiled_call_impl = compiled
    for module in layer.modules():
        if isinstance(module, lora.LoraLinear):
            module.hashes_dropout = compiled is not None


def _layers(encoder: Encoder) -> list[nn.Module]:
    return [layer for _, stack in find_layers(encoder.causal_lm) for layer in stack]


@contextmanager
def left_plain(encoder: Encoder) -> Iterator[None]:
    """Let compiled layers compute as they do without for a while; what is compiled is kept."""
    kept = [(layer, layer._compiled_call_impl) for layer in _layers(encoder)]
    undo_compiling(encoder)
    try:
        yield
    finally:
        for layer, compiled in kept:
            _compute_by(layer, compiled)
        encoder.is_compiled = any(compiled for _, compiled in kept)


def _passes_and_gradient(encoder: Encoder, groups: list[RowGroup]) -> None:
    """Read groups of rows without a gradient, and the last one with one, and compute it, in train mode."""
    with drawing_from(0):
        with torch.no_grad():
            for group in groups:
                encoder(group, shared=encoder.packed)
        states: Tensor = encoder(groups[-1], shared=encoder.packed)
    learned = [weight for weight in encoder.trainable().values() if weight is not encoder.log_inverse_temperature]
    torch.autograd.grad(states.float().sum(), learned, allow_unused=True)


def _some_rows(encoder: Encoder) -> list[RowGroup]:
    """Return groups of some rows: more than one, which is compiled for itself; of several lengths, as a rule.

    Of a GPU two groups, for what differs between them is compiled so that it may differ again.
    """
    return [_rows(encoder, count) for count in ((3,) if encoder.device.type == "cpu" else (3, 2))]


def _rows(encoder: Encoder, count: int) -> RowGroup:
    longest = getattr(encoder.causal_lm.config.get_text_config(), "max_position_embeddings", None) or encoder.row_tokens
    length = max(2, min(encoder.row_tokens // 2 + 1, longest - count))
    texts = [np.full(length + number, number) for number in range(count)]
    trie = build_trie(texts, row_tokens=encoder.row_tokens, share=encoder.packed)
    return row_group(trie, np.arange(len(trie.row_lengths)))
