"""Make tiny random language models of many families, a tokenizer and a model folder, without any download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SLIDING_WINDOW = 6
"""Tokens that a layer with a sliding window sees: fewer than the texts of the tests have."""

TOKENIZER_SIZE = 3 + 256
"""Entries of `tiny_tokenizer`: the special tokens and every byte. A model for it needs this vocab_size."""

# The usual 0.02 leaves a network of width 32 almost linear: with a wrong mask its output would hardly move.
_SPREAD: dict[str, Any] = {"initializer_range": 0.2}
_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
# Grouped queries, so that the numbers of heads and of key heads differ.
_GROUPED: dict[str, Any] = {**_SPREAD, **_SIZE, "intermediate_size": 64, "num_key_value_heads": 2}
_UNGROUPED: dict[str, Any] = {**_SPREAD, **_SIZE, "intermediate_size": 64}
_GEMMA: dict[str, Any] = {
    **_GROUPED,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_GPT2: dict[str, Any] = {
    **_SPREAD,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
# Token vectors narrower than the states, so that project_in and project_out exist, as in OPT-350M.
_OPT: dict[str, Any] = {**_SIZE, "init_std": 0.2, "ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0}
_MAMBA: dict[str, Any] = {
    **_SPREAD,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 4,
    "time_step_rank": 4,
}

_CONFIGS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
    "mistral-sliding": (MistralConfig, {**_GROUPED, "sliding_window": SLIDING_WINDOW}),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "gemma3": (Gemma3TextConfig, _GEMMA),
    "gpt2": (GPT2Config, _GPT2),
    "gpt_neox": (GPTNeoXConfig, _UNGROUPED),
    "opt": (OPTConfig, _OPT),
    "phi": (PhiConfig, _UNGROUPED),
    "falcon": (FalconConfig, {**_SPREAD, **_SIZE, "alibi": False}),
    "mamba": (MambaConfig, _MAMBA),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""The names that `tiny_model` takes."""


def tiny_model(family: str, *, seed: int = 0, vocab_size: int = 128, **overrides: Any) -> PreTrainedModel:
    """Build a random float32 model of a family, in eval mode and without dropout; overrides replace config fields.

    Special tokens are those of `tiny_tokenizer`: 0 pads, 1 begins and 2 ends a text.
    """
    config_class, fields = _CONFIGS[family]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = config_class(**{**fields, **special, "vocab_size": vocab_size, **overrides})
    attention = {} if family == "mamba" else {"attn_implementation": "sdpa"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
        _shake_vectors(model)
    return model.eval()


@torch.no_grad()
def _shake_vectors(model: PreTrainedModel) -> None:
    """Add noise to biases and norms, which start as all 0 or all 1: leaving one out shall change the output."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a fast tokenizer with one token per byte after the special ones: decode undoes encode on any text."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    assert len(vocabulary) == TOKENIZER_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(folder: Path, *, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model with `tiny_tokenizer` as a Hugging Face folder, for end-to-end tests; return the folder."""
    model = tiny_model(family, seed=seed, vocab_size=TOKENIZER_SIZE, **overrides)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
