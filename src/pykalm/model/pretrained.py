"""Read a causal language model and its tokenizer through transformers, and say clearly what is wrong with it."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from pykalm.errors import ModelError
from pykalm.memory import is_out_of_memory

Quantization = Literal["none", "4bit"]

# What transformers, safetensors and gguf raise for files that are absent, damaged or of an unknown kind.
_FAILURES = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError, struct.error, SafetensorError)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars: kalm draws its own."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def read_pretrained(
    place: str,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype,
    quantize: Quantization = "none",
    device: torch.device,
    local_files_only: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a model, in eval mode on a device, and its tokenizer from a folder, a GGUF file in one, or the hub.

    Raises ModelError where the place holds no causal language model, a damaged or incomplete one, or no fast
    tokenizer.
    """
    name = f"{place}/{gguf_file}" if gguf_file else place
    where: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": False}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    with no_progress_bars():
        config = _read_config(name, place, where)
        _require_causal(name, config)
        model = _read_model(name, place, where, dtype=dtype, quantize=quantize, device=device)
        tokenizer = read_tokenizer(name, place, where)
    # Without the added special tokens: for some GGUF files transformers adds one that the model never had.
    if tokenizer.vocab_size > vocabulary_size(model):
        raise ModelError(
            f"{name}: the tokenizer knows {tokenizer.vocab_size} tokens but the model only {vocabulary_size(model)}. "
            "They do not belong together: restore the tokenizer that was saved with the model."
        )
    return model, tokenizer


def vocabulary_size(model: PreTrainedModel) -> int:
    """Count the tokens that a model has vectors for, V."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings.weight, torch.Tensor)
    return int(embeddings.weight.shape[0])


def _read_config(name: str, place: str, where: dict[str, Any]) -> PreTrainedConfig:
    """Read the settings of a model, which show whether it is a causal language model before any weight is read."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(place, **where)
    except _FAILURES as error:
        if "gguf_file" in where:
            raise ModelError(
                f"{name}: cannot read this GGUF file: {_first_line(error)} Use one of an architecture that "
                "transformers reads (Llama, Mistral, Qwen, Gemma, ...), or the model's Hugging Face folder."
            ) from error
        raise ModelError(
            f"{name}: cannot read its config.json: {_first_line(error)} Check the name, or give a folder that "
            "save_pretrained wrote; models that need code of their own are not run."
        ) from error
    return config


def _require_causal(name: str, config: PreTrainedConfig) -> None:
    """Raise ModelError for an encoder (BERT), an encoder-decoder (T5), or a backbone without an output head."""
    architectures = list(config.architectures or [])
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures:
        is_causal = any(a in known or a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    else:
        is_causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if config.is_encoder_decoder or not is_causal:
        raise ModelError(
            f"{name}: wanted a causal language model, found {', '.join(architectures) or config.model_type}"
            f"{' (an encoder-decoder)' if config.is_encoder_decoder else ''}. Choose a model whose config.json "
            "names an architecture ...ForCausalLM, such as Llama, Qwen, Gemma or GPT-2."
        )


def _read_model(
    name: str,
    place: str,
    where: dict[str, Any],
    *,
    dtype: torch.dtype,
    quantize: Quantization,
    device: torch.device,
) -> PreTrainedModel:
    """Read weights, refusing files that lack some: transformers would draw those at random and only warn."""
    settings: dict[str, Any] = {}
    if quantize == "4bit":
        settings = {"quantization_config": _four_bit(name, where, dtype, device), "device_map": {"": device}}
    elif "gguf_file" in where and hasattr(transformers, "GgufConfig"):
        # Otherwise newer releases keep some architectures packed where they find a kernel, and these do not train.
        settings = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True, **where, **settings
        )
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise  # the files are fine, the device is too small: whoever chose both says what to lower
        raise ModelError(
            f"{name}: cannot read the model's weights: {_first_line(error)} "
            "They are missing or damaged: download or convert the model again."
        ) from error
    model, info = loaded
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{name}: {len(lacking)} of the model's weights are missing or of another shape, among them "
            f"{lacking[0]}. The files are incomplete or belong to another model: download or convert it again."
        )
    result: PreTrainedModel = model.eval() if quantize == "4bit" else model.eval().to(device)
    return result


def _four_bit(name: str, where: dict[str, Any], dtype: torch.dtype, device: torch.device) -> BitsAndBytesConfig:
    """Build the settings of a 4-bit base (QLoRA's: NF4, double quantisation), or say what is missing for it."""
    if "gguf_file" in where:
        raise ModelError(f"{name}: a GGUF file cannot be loaded in 4 bit. Set quantize to 'none'.")
    if device.type != "cuda":
        raise ModelError(f"quantize: 4bit needs a CUDA GPU, found device '{device}'. Set quantize to 'none'.")
    if find_spec("bitsandbytes") is None:
        raise ModelError("quantize: 4bit needs bitsandbytes, which is not installed. Run: pip install bitsandbytes")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def read_tokenizer(name: str, place: str, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Read a fast tokenizer; the slow ones give no offsets and take minutes on a graph's texts."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, **where)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ModelError(
            f"{name}: cannot read the tokenizer: {_first_line(error)} Model and tokenizer must lie in one place."
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name}: wanted a fast tokenizer, found {type(tokenizer).__name__}. Convert it to a tokenizer.json."
        )
    return tokenizer


def _first_line(error: BaseException) -> str:
    """Shorten another library's message to its first sentence-like line, ended by a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
