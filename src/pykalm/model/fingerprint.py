"""Tell whether two models are the same: a hash over architecture and weights that no file format or folder enters."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

# Settings that say where a model came from or how it is run, not what it computes from token ids.
_IRRELEVANT_SETTINGS = frozenset(
    {
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)


def fingerprint_model(model: PreTrainedModel) -> str:
    """Hash what a model computes: class, settings, and every weight with name, shape, dtype and bytes.

    The same weights in the same dtype give the same 64 hexadecimal digits on every machine, whether they were
    read from a Hugging Face folder, the hub or a GGUF file.
    """
    digest = hashlib.sha256()
    digest.update(type(model).__name__.encode())
    digest.update(json.dumps(_plain(model.config.to_diff_dict()), sort_keys=True).encode())
    digest.update(hash_tensors(model.state_dict()).encode())
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors, in order of name, through name, shape, dtype and bytes; the device does not enter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # As bytes, because numpy has no bfloat16.
        values: npt.NDArray[np.uint8] = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values.data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Reduce settings to JSON values that agree between file formats: GGUF stores 1e-5 as 9.99999975e-06."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in _IRRELEVANT_SETTINGS}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return f"{value:.6g}" if isinstance(value, float) else _as_json(value)
    return [_plain(item) for item in value]


def _as_json(value: Any) -> Any:
    """Keep what JSON knows and write out the rest."""
    return value if value is None or isinstance(value, bool | int | str) else str(value)
