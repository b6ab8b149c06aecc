"""The layers of a language model, whatever its family calls them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def find_layers(model: Any) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield name and modules of every list in a Hugging Face model that is as long as its config says it is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, stack in model.named_modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == depth:
            yield name, stack


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the context in which a model computes: bfloat16 by autocast, or that of its weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def computed_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a CPU computes with x here: that of autocast, or its own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
