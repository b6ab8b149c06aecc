"""Hold what `pykalm.model.adapters` promises, on tiny models of every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pykalm.errors import ModelError, TrainingError
from pykalm.model import adapters
from pykalm.model.adapters import add_adapter, find_targets, load_adapter, save_adapter
from tests.tiny_models import FAMILIES, tiny_model

TOKENS = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel, *, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output: Tensor = model(input_ids=TOKENS, use_cache=False).logits.float()
    return output


def trained(model: PreTrainedModel, adapted: nn.Module, *, steps: int = 2, autocast: bool = False) -> None:
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        (logits(model, autocast=autocast) ** 2).mean().backward()
        optimiser.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_step_changes_the_output_and_gives_the_base_no_gradient(family: str) -> None:
    model = tiny_model(family)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before = logits(model).detach()
    adapted = add_adapter(model, rank=2, alpha=4)
    assert torch.equal(logits(model).detach(), before), "B starts at 0, so a fresh adapter does nothing"
    # In the first step only B has a gradient (A is multiplied by B = 0); in the second both have.
    trained(model, adapted, steps=2)
    for name, parameter in adapted.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, f"{name} is adapted but the model does not use it"
    after = {name.replace(".base_layer", ""): value for name, value in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert (logits(model).detach() - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_linear_modules_of_the_layers_and_never_head_or_embeddings(family: str) -> None:
    model = tiny_model(family)
    names = find_targets(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert all(model.get_submodule(name) not in (head, embeddings) for name in names)
    layers = model.config.get_text_config().num_hidden_layers
    assert len(names) in range(layers, 8 * layers, layers)
    assert not any("project" in name for name in names), "OPT's projections lie outside the layers"


@pytest.mark.parametrize(
    ("family", "per_layer"), [("llama", 3), ("gpt2", 2), ("opt", 2), ("phi", 2), ("falcon", 2), ("gpt_neox", 2)]
)
def test_mlp_targets_leave_attention_out(family: str, per_layer: int) -> None:
    names = find_targets(tiny_model(family), "mlp")
    assert len(names) == 2 * per_layer
    assert not any("attn" in name or "attention" in name for name in names)


def test_listed_targets_are_taken_by_their_endings() -> None:
    names = find_targets(tiny_model("llama"), ["q_proj", "layers.0.mlp.up_proj"])
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


class Router(nn.Linear):
    """Return two tensors, as the router of Llama 4 does."""

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(states)
        return scores, scores.softmax(dim=-1)


def test_a_linear_module_that_returns_a_pair_is_no_target() -> None:
    model = tiny_model("llama")
    before = find_targets(model)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.router = Router(32, 4)
    assert find_targets(model) == before
    with pytest.raises(ModelError, match="'router' not among the linear modules"):
        find_targets(model, ["router"])


@pytest.mark.parametrize("targets", [["q_proj", "c_attn"], ["lm_head"], ["proj"], [], ["embed_tokens"]])
def test_unknown_targets_raise_and_list_what_there_is(targets: list[str]) -> None:
    with pytest.raises(ModelError, match="down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        find_targets(tiny_model("llama"), targets)


def test_a_module_that_mamba_reads_past_its_adapter_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'dt_proj' not among .* Choose from: in_proj"):
        add_adapter(tiny_model("mamba"), targets=["dt_proj"])


def initial_weights(seed: int) -> dict[str, Tensor]:
    adapted = add_adapter(tiny_model("llama"), rank=2, seed=seed)
    return {name: value.detach() for name, value in adapted.named_parameters() if "lora_A" in name}


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(1)
    first = initial_weights(7)
    state = torch.random.get_rng_state()
    again, other = initial_weights(7), initial_weights(8)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not any(torch.equal(other[name], value) for name, value in first.items())
    bound = 32**-0.5  # fan-in of the width
    assert 0.5 * bound < first[min(first)].abs().max() <= bound


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mamba"])
def test_adapter_weights_are_float32_over_a_bfloat16_base_under_autocast(family: str) -> None:
    model = tiny_model(family).bfloat16()
    before = logits(model, autocast=True).detach()
    adapted = add_adapter(model, rank=2)
    dtypes = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} <= {torch.bfloat16, torch.float32}
    trained(model, adapted, autocast=True)
    # The step must show above bfloat16's own rounding (2^-8 of logits of size 5).
    assert (logits(model, autocast=True).detach() - before).abs().max() > 0.05


def test_a_new_adapter_is_in_the_mode_of_its_model() -> None:
    assert not any(module.training for module in add_adapter(tiny_model("llama"), dropout=0.5).modules())
    assert all(module.training for module in add_adapter(tiny_model("llama").train(), dropout=0.5).modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_save_and_load_are_bitwise_inverse(family: str, kind: Any, tmp_path: Path) -> None:
    model = tiny_model(family)
    adapted = add_adapter(model, kind=kind, rank=2)
    trained(model, adapted)
    save_adapter(adapted, tmp_path / "adapter")
    fresh = tiny_model(family)
    restored = load_adapter(fresh, tmp_path / "adapter", trainable=False)
    wanted, found = adapted.state_dict(), restored.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert torch.equal(logits(fresh), logits(model))
    assert not any(parameter.requires_grad for parameter in restored.parameters())
    assert not list(tmp_path.glob(".*")), "no draft is left behind"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_restored_adapter_trains_on_as_the_first_one_would(kind: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapted = add_adapter(model, kind=kind, rank=2)
    trained(model, adapted)
    save_adapter(adapted, tmp_path / "adapter")
    fresh = tiny_model("llama")
    restored = load_adapter(fresh, tmp_path / "adapter", trainable=True)
    trained(model, adapted, steps=1)
    trained(fresh, restored, steps=1)
    assert torch.equal(logits(fresh), logits(model))


def test_peft_itself_reads_a_saved_adapter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapted = add_adapter(model, rank=2)
    trained(model, adapted)
    save_adapter(adapted, tmp_path / "adapter")
    foreign = tiny_model("llama")
    PeftModel.from_pretrained(foreign, str(tmp_path / "adapter"))
    assert torch.equal(logits(foreign), logits(model))


def test_full_fine_tuning_trains_every_parameter_in_float32() -> None:
    model = tiny_model("llama").bfloat16()
    adapted = add_adapter(model, kind="full")
    assert adapted is model
    assert all(p.requires_grad and p.dtype is torch.float32 for p in model.parameters())


def test_a_quantised_base_is_not_trained_in_full() -> None:
    model = tiny_model("llama")
    model.is_quantized = True  # type: ignore[assignment]
    with pytest.raises(ModelError, match="quantised base"):
        add_adapter(model, kind="full")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_full_disk_leaves_the_earlier_adapter_whole(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    adapted = add_adapter(model, kind=kind, rank=2)
    save_adapter(adapted, tmp_path / "adapter")
    files = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    trained(model, adapted)
    write = adapters._write

    def write_until_full(model: nn.Module, learned: dict[str, torch.Tensor], folder: Path) -> None:
        write(model, learned, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "_write", write_until_full)
    with pytest.raises(TrainingError, match=r"No space left on device.*Free some space"):
        save_adapter(adapted, tmp_path / "adapter")
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "found neither"),
        ("cut", "damaged"),
        ("other family", "do not fit|belongs to another"),
        ("width", "belongs"),
    ],
)
def test_a_wrong_adapter_folder_raises(damage: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(add_adapter(tiny_model("llama"), rank=2), folder)
    model = tiny_model("llama")
    if damage == "missing":
        (folder / "adapter_config.json").unlink()
    elif damage == "cut":
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        model = tiny_model("gpt2") if damage == "other family" else tiny_model("llama", intermediate_size=48)
    with pytest.raises(ModelError, match=message):
        load_adapter(model, folder, trainable=False)


def test_saved_lora_holds_only_the_adapter(tmp_path: Path) -> None:
    save_adapter(add_adapter(tiny_model("llama"), rank=2), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2, "A and B of seven linear modules in two layers"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
