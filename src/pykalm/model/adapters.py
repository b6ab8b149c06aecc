"""Make a loaded language model trainable, by LoRA or in full; save and restore what was trained, bit for bit."""

import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pykalm.errors import ModelError
from pykalm.files import replace_folder
from pykalm.model.dropout import Dropout
from pykalm.model.layers import find_layers
from pykalm.model.lora import LoraLinear
from pykalm.model.pretrained import no_progress_bars
from pykalm.model.sharding import whole
from pykalm.processes import is_main, on_main

AdapterKind = Literal["lora", "full"]
Targets = Literal["auto", "all-linear", "mlp"] | list[str]

PLAIN_LINEAR = {"FalconLinear"}
"""Classes derived from nn.Linear in transformers' models that only spell the same product differently."""

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_FULL_WEIGHTS = "model.safetensors"


def add_adapter(
    model: PreTrainedModel,
    *,
    kind: AdapterKind = "lora",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Targets = "auto",
    seed: int = 0,
) -> nn.Module:
    """Make a model trainable in place; return what `save_adapter` takes (for LoRA a peft wrapper around the model).

    LoRA freezes the base as it is (bfloat16, 4-bit) and adds float32 matrices, the same ones for the same seed,
    to the modules that `find_targets` names. "full" turns every parameter to float32 and trains them all. Where
    base and trained weights differ in dtype, run the model under `torch.autocast`. Raises ModelError for unknown
    targets, and for full fine-tuning of a quantised base. METHOD.md §5.
    """
    if kind == "full":
        return _make_fully_trainable(model)
    names = find_targets(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=float(alpha),  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=dropout,
        target_modules=names,
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    adapted = _inject(model, config)
    _initialise(adapted, torch.Generator().manual_seed(seed))
    return adapted


def find_targets(model: PreTrainedModel, targets: Targets = "auto") -> list[str]:
    """Name the modules that LoRA adapts, chosen by their type and place.

    "auto" and "all-linear" take every linear module inside the layers, "mlp" those outside attention. A list
    holds names or endings of names (`["q_proj", "v_proj"]`). Raises ModelError where one fits nothing, listing
    what there is.
    """
    available = list(_linear_modules(model))
    if isinstance(targets, str) and targets not in ("auto", "all-linear", "mlp"):
        targets = [targets]
    if targets == "mlp":
        parts = model.named_modules()
        attention = tuple(f"{name}." for name, part in parts if "attention" in type(part).__name__.lower())
        chosen = [name for name in available if not name.startswith(attention)]
    elif isinstance(targets, str):
        chosen = available
    else:
        _refuse_unknown(targets, available)
        chosen = [name for name in available if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not chosen:
        raise ModelError(
            f"adapter.targets: {targets!r} fits no linear module in the layers of {type(model).__name__}. "
            f"Name some of these: {_endings(available)}; or choose kind 'full'."
        )
    return chosen


def _linear_modules(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of the linear modules inside the layers: no embeddings, no output head, nothing around them.

    A state-space mixer (it owns `A_log`) hands the weights of its inner linear modules straight to a kernel, past
    any adapter, so only those that read the layer's input, and so are called as modules, count there.
    """
    width = model.config.get_text_config().hidden_size
    for stack_name, stack in find_layers(model):
        mixers = tuple(f"{name}." for name, part in stack.named_modules() if hasattr(part, "A_log"))
        for name, module in stack.named_modules():
            if not _is_plain_linear(module):
                continue
            if not name.startswith(mixers) or getattr(module, "in_features", None) == width:
                yield f"{stack_name}.{name}"


def _is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module maps one tensor to one tensor as a linear map: what an adapter can stand beside.

    A class derived from nn.Linear may return something else (a router of experts, a pair) or read its weights in groups,
    so only the linear classes themselves count, those of bitsandbytes, and derived ones known to be plain.
    """
    kind = type(module)
    return (
        kind in (nn.Linear, Conv1D)
        or kind.__name__ in PLAIN_LINEAR
        or (isinstance(module, nn.Linear) and kind.__module__.startswith("bitsandbytes."))
    )


def _refuse_unknown(targets: list[str], available: list[str]) -> None:
    """Raise ModelError naming every target that is neither a name nor the end of one."""
    unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in available)]
    if unknown:
        raise ModelError(
            f"adapter.targets: {', '.join(map(repr, unknown))} not among the linear modules in the model's "
            f"layers. Choose from: {_endings(available)}."
        )


def _endings(names: list[str]) -> str:
    """List the distinct last parts of module names."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"


def _make_fully_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Turn every parameter to float32, so that small updates are not rounded away, and train them all."""
    if getattr(model, "is_quantized", False):
        raise ModelError(
            "adapter.kind: a quantised base cannot be trained in full. Choose kind 'lora', or quantize 'none'."
        )
    nn.Module.float(model)
    model.requires_grad_(True)
    return model


def _inject(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put LoRA layers into a model, with float32 weights and in the model's own mode (training or evaluation)."""
    # peft draws initial weights from the global generator, which is not ours to move; `_initialise` draws them anew.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )  # peft asks for it
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):
        # Under autocast, peft's cast of every input to float32 would be undone at once by the matrix product;
        # it costs 2 to 7 % of a step and a fifth more memory for the backward pass (measured, width 576).
        layer.cast_input_dtype_enabled = False
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = Dropout(dropout.p, number)
        LoraLinear.take_over(layer)
    adapted.train(model.training)
    assert isinstance(adapted, PeftModel)
    return adapted


@torch.no_grad()
def _initialise(adapted: PeftModel, generator: torch.Generator) -> None:
    """Draw A as peft does (uniform within 1/√fan-in), from a generator on the CPU for any device; B stays 0."""
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.copy_(values)


def save_adapter(model: nn.Module, folder: Path, *, notes: Mapping[str, str] | None = None) -> None:
    """Save what was trained, LoRA in peft's layout or a whole Hugging Face folder, in place of what the folder held.

    notes: texts by file name that belong to the weights. All is replaced at once: a full disk or a kill leaves the
    earlier files whole. Raises TrainingError where writing fails. All processes call it, the main one writes.
    """
    learned = _learned(model)

    def fill(draft: Path) -> None:
        _write(model, learned, draft)
        for name, text in (notes or {}).items():
            (draft / name).write_text(text, encoding="utf-8")

    on_main(lambda: replace_folder(folder, fill))


def _learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights to be saved by name, in the main process whole; the others help and keep none."""
    lora = isinstance(model, PeftModel)
    state = get_peft_model_state_dict(model, save_embedding_layers=False) if lora else model.state_dict()
    learned = {}
    for name, tensor in state.items():
        gathered = whole(tensor)
        if is_main():
            learned[name] = gathered.contiguous().cpu() if lora or gathered is not tensor else gathered
    return learned


def _write(model: nn.Module, learned: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the files of a LoRA adapter or of a whole model into an empty folder, weights as one file."""
    if isinstance(model, PeftModel):
        save_file(learned, folder / _ADAPTER_WEIGHTS)
        config = model.peft_config["default"]
        assert isinstance(config, LoraConfig)
        # peft keeps a set, whose order would differ from run to run.
        config.target_modules = sorted(config.target_modules or [])
        config.save_pretrained(str(folder))
        return
    assert isinstance(model, PreTrainedModel)
    with no_progress_bars():
        model.save_pretrained(folder, state_dict=learned, max_shard_size="1000GB")


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool) -> nn.Module:
    """Put what `save_adapter` saved into the same base model, in place; return what `add_adapter` returned.

    Raises ModelError where the folder holds no adapter, a damaged one, or one for another model.
    """
    try:
        if (folder / _ADAPTER_CONFIG).is_file():
            return _load_lora(model, folder, trainable=trainable)
        if (folder / _FULL_WEIGHTS).is_file():
            return _load_full(model, folder, trainable=trainable)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder}: wanted an adapter for {type(model).__name__}, found one that is damaged or belongs to "
            f"another model: {error}. Give the base model it was trained on, or restore the folder."
        ) from error
    raise ModelError(
        f"{folder}: wanted an adapter, found neither {_ADAPTER_CONFIG} nor {_FULL_WEIGHTS}. Check the run's path."
    )


def _load_lora(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Inject LoRA layers as the saved settings say and fill them with the saved weights."""
    state = load_file(folder / _ADAPTER_WEIGHTS)
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.inference_mode = not trainable
    adapted = _inject(model, config)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if wanted.keys() != state.keys():
        odd = sorted(wanted.keys() ^ state.keys())
        raise ModelError(
            f"{folder / _ADAPTER_WEIGHTS}: {len(odd)} tensors do not fit the model's adapter, among them {odd[0]!r}. "
            "Give the base model it was trained on."
        )
    set_peft_model_state_dict(adapted, state)
    return adapted


def _load_full(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PreTrainedModel:
    """Fill a model with saved weights, through transformers, which knows how a family's saved names differ."""
    with no_progress_bars():
        saved = type(model).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    _make_fully_trainable(model).load_state_dict(saved.state_dict())
    model.requires_grad_(trainable)
    return model
