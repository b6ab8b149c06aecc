"""The layers of a language model, whatever its family calls them; and their compilation."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from pykalm.errors import ModelError


def find_layers(model: Any) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield name and modules of every list in a Hugging Face model that is as long as its config says it is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == depth:
            yield name, stack


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the context in which a model computes: bfloat16 by autocast, or that of its weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def is_compiled(model: Any) -> bool:
    """Return whether the layers of a model are compiled."""
    return any(layer._compiled_call_impl is not None for _, stack in find_layers(model) for layer in stack)


def compile_layers(model: Any, dtype: torch.dtype) -> None:
    """Let torch.compile fuse the work of each layer, for rows of any number and length, and try it on three tokens.

    dtype: that of the computation. Layers are alike, so one is compiled for all. Raises ModelError where this machine
    cannot compile.
    """
    for _, stack in find_layers(model):
        for layer in stack:
            layer.compile(dynamic=True)
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), computing_in(dtype, device):
            model.base_model(input_ids=torch.zeros(1, 3, dtype=torch.long, device=device), use_cache=False)
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"training.compile: wanted to compile {type(model).__name__}, found {type(error).__name__}: {reason} A CPU needs "
            "a C++ compiler (on Debian or Ubuntu: apt install g++). Install one, or set training.compile=false: same "
            "result, slower."
        ) from error
