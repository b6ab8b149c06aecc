"""Claims about weights kept in the order of products: the same bits, never those of another weight, gone with theirs.

In float32 they are PyTorch's but for rounding.
"""

import copy
import gc
from typing import Literal

import pytest
import torch
from torch import nn

from pykalm.bench.plan import adapters_of_peft
from pykalm.model import packed_weights
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.model.packed_weights import PackedLinear, gradient_at_rows, pack_frozen_weights, product
from pykalm.model.products import has_onednn
from tests.tiny_models import tiny_model

with_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no products in bfloat16 on this processor"
)
with_float32 = pytest.mark.skipif(not has_onednn(), reason="no products of oneDNN in float32 on this processor")


def weight_with_copies(out: int = 48, width: int = 32, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(out)).to(dtype)
    packed_weights._register(weight)
    return weight


@with_bfloat16
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
@pytest.mark.parametrize(("out", "width"), [(48, 32), (33, 100), (1536, 576)])
def test_products_are_the_same_bits(rows: int, out: int, width: int) -> None:
    weight = weight_with_copies(out, width)
    x, above, bias = (torch.randn(*shape).bfloat16() for shape in ((rows, width), (rows, out), (out,)))
    assert torch.equal(product(x, weight), nn.functional.linear(x, weight))
    assert torch.equal(product(x, weight, bias), nn.functional.linear(x, weight, bias))
    assert torch.equal(gradient_at_rows(above, weight), above @ weight)
    copies = packed_weights._copies_of(weight)
    assert copies is not None
    assert copies.own is not None, "that is, it was computed with the copy"
    assert copies.transposed is not None


@with_float32
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
@pytest.mark.parametrize(("out", "width"), [(48, 32), (33, 100), (1536, 576)])
def test_products_of_float32_are_the_same_but_for_rounding(rows: int, out: int, width: int) -> None:
    weight = weight_with_copies(out, width, torch.float32)
    x, above, bias = torch.randn(rows, width), torch.randn(rows, out), torch.randn(out)
    torch.testing.assert_close(product(x, weight, bias), nn.functional.linear(x, weight, bias), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(gradient_at_rows(above, weight), above @ weight, rtol=1e-4, atol=2e-4)
    copies = packed_weights._copies_of(weight)
    assert copies is not None
    assert copies.own is not None, "that is, it was computed with the copy"
    assert copies.transposed is not None


@with_float32
def test_a_weight_that_is_cast_there_and_back_is_read_anew() -> None:
    """Its place may be the same again, its numbers are not: bfloat16 has fewer digits."""
    for size in (32, 256, 1024, 4096):
        weight = nn.Parameter(torch.randn(size, size), requires_grad=False)
        packed_weights._register(weight)
        x = torch.randn(4, size)
        product(x, weight)
        weight.data = weight.data.bfloat16()
        weight.data = weight.data.float()
        assert torch.equal(product(x, weight), nn.functional.linear(x, weight)), size


@with_bfloat16
def test_a_weight_that_was_written_to_is_read_anew() -> None:
    weight, x = weight_with_copies(), torch.randn(5, 32).bfloat16()
    product(x, weight)
    weight.mul_(2)
    assert torch.equal(product(x, weight), nn.functional.linear(x, weight))
    weight.data = torch.randn(48, 32).bfloat16()
    assert torch.equal(product(x, weight), nn.functional.linear(x, weight))


@with_bfloat16
def test_copies_go_with_their_weight_and_another_in_its_place_has_none() -> None:
    weight = weight_with_copies()
    place = weight.data_ptr()
    product(torch.ones(1, 32).bfloat16(), weight)
    other = torch.zeros(48, 32, dtype=torch.bfloat16)
    packed_weights._copies[other.data_ptr()] = packed_weights._copies[place]  # as if it came to lie where one was
    assert torch.equal(product(torch.ones(1, 32).bfloat16(), other), torch.zeros(1, 48).bfloat16())
    del packed_weights._copies[other.data_ptr()], weight
    gc.collect()
    assert place not in packed_weights._copies


def adapted_encoder(targets: str, precision: Literal["bf16", "fp32"] = "bf16") -> Encoder:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = add_adapter(tiny_model("llama").to(dtype), rank=4, targets=targets, seed=1)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    return Encoder(model, source_fingerprint="", precision=precision)


def states_and_gradients(encoder: Encoder) -> list[torch.Tensor]:
    with encoder.precision():
        states = encoder.causal_lm.base_model(input_ids=torch.arange(3, 27).view(2, 12), use_cache=False)[0]
    learned = [weight for weight in encoder.trainable().values() if weight is not encoder.log_inverse_temperature]
    return [states.detach(), *torch.autograd.grad(states.float().square().sum(), learned)]


@with_bfloat16
@pytest.mark.parametrize("targets", ["mlp", "all-linear"])
def test_a_model_computes_the_same_bits_with_packed_weights(targets: str) -> None:
    """States and the gradients of adapters, beside layers that are adapted and layers that are not."""
    encoder = adapted_encoder(targets)
    plain = states_and_gradients(encoder)
    pack_frozen_weights(encoder.causal_lm)
    packed = [module for module in encoder.modules() if isinstance(module, PackedLinear)]
    assert (len(packed) > 0) == (targets == "mlp"), "a layer below an adapter is computed by the adapter"
    assert all(torch.equal(one, other) for one, other in zip(states_and_gradients(encoder), plain, strict=True))
    with adapters_of_peft(encoder):
        assert not any(isinstance(module, PackedLinear) for module in encoder.modules())
    assert sum(isinstance(module, PackedLinear) for module in encoder.modules()) == len(packed)
    copied = copy.deepcopy(encoder)
    assert torch.equal(copied.embed([[5, 6]]), encoder.embed([[5, 6]]))


@with_float32
@pytest.mark.parametrize("targets", ["mlp", "all-linear"])
def test_a_model_in_float32_computes_the_same_but_for_rounding(targets: str) -> None:
    encoder = adapted_encoder(targets, "fp32")
    plain = states_and_gradients(encoder)
    pack_frozen_weights(encoder.causal_lm)
    for found, expected in zip(states_and_gradients(encoder), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    base = encoder.causal_lm.base_model.layers[0].mlp.down_proj  # type: ignore[union-attr]
    copies = packed_weights._copies_of(getattr(base, "base_layer", base).weight)
    assert copies is not None
    assert copies.own is not None, "that is, it was computed with the copy"


@with_bfloat16
def test_what_learns_what_is_float16_and_what_is_too_large_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(model: nn.Module) -> int:
        pack_frozen_weights(model)
        return sum(isinstance(module, PackedLinear) for module in model.modules())

    assert packed(tiny_model("llama").half().requires_grad_(False)) == 0
    assert packed(tiny_model("llama").to(torch.bfloat16)) == 0
    frozen = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    monkeypatch.setattr(packed_weights, "MOST_BYTES", 1000)
    assert packed(frozen) == 0
    monkeypatch.undo()
    assert packed(frozen) > 0


@with_bfloat16
def test_an_adapter_that_is_merged_into_its_weight_is_seen() -> None:
    """peft writes to `weight.data`, past all that would tell."""
    encoder, tokens = adapted_encoder("all-linear"), torch.arange(3, 11)[None]
    pack_frozen_weights(encoder.causal_lm)

    def states() -> torch.Tensor:
        with torch.no_grad(), encoder.precision():
            found: torch.Tensor = encoder.causal_lm.base_model(input_ids=tokens, use_cache=False)[0]
            return found.float()

    apart = states()
    base = encoder.model.merge_and_unload()  # type: ignore[operator]
    encoder.model = base
    merged = states()
    assert float((merged - apart).norm() / apart.norm()) < 0.05, "but for rounding"
    encoder.model = add_adapter(base, rank=4, seed=2)  # it starts at 0, beside weights that hold the first
    assert torch.allclose(states(), merged, atol=1e-6)


@with_bfloat16
def test_a_bias_is_read_as_products_read_it_and_may_learn_later() -> None:
    weight, x = weight_with_copies(), torch.randn(5, 32).bfloat16()
    bias = torch.randn(96)[::2]
    assert torch.equal(product(x, weight, bias), nn.functional.linear(x, weight, bias.bfloat16().contiguous()))
    layer = nn.Linear(32, 48).bfloat16().requires_grad_(False)
    packed_weights._register(layer.weight)
    PackedLinear.take_over(layer)
    assert type(layer) is PackedLinear
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.bias.grad is not None
