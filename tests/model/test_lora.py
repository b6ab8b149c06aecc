"""Claims about LoRA's product in one operation: it is peft's, its gradients are, and what it cannot do is left to peft."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora

from pykalm.learn.footprint import peak_bytes
from pykalm.model.adapters import add_adapter
from pykalm.model.dropout import Dropout, drawing_from, dropped_places, without_some
from pykalm.model.lora import LoraLinear
from tests.laws.common import hands_nothing_on
from tests.tiny_models import tiny_model

WIDTH = 32


def layer_of(dropout: float = 0.0, family: str = "llama") -> LoraLinear:
    """Return the first adapted layer of a tiny model, in train mode, far from its start at 0."""
    model = add_adapter(tiny_model(family), rank=4, alpha=6, dropout=dropout, seed=1).train()
    found = next(module for module in model.modules() if isinstance(module, lora.Linear))
    torch.nn.init.normal_(found.lora_B["default"].weight, generator=torch.Generator().manual_seed(3))
    return found  # type: ignore[return-value]


def gradients_of(layer: lora.Linear, x: torch.Tensor, above: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    learned = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    product = layer(x)
    return [product.detach(), *torch.autograd.grad(product, [x, *learned], above)]


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's linear layers have a bias
@pytest.mark.parametrize("half", [False, True])
def test_product_and_gradients_are_those_of_peft(family: str, half: bool) -> None:
    """Float32 to 1e-5; under autocast to bfloat16 within its rounding."""
    layer = layer_of(family=family)
    assert isinstance(layer, LoraLinear)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, WIDTH, generator=generator)
    above = torch.randn(2, 5, layer.out_features, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        product = layer(x)
        found = gradients_of(layer, x, above.to(product.dtype))
        layer.give_back()
        assert type(layer) is lora.Linear
        wanted = gradients_of(layer, x, above.to(product.dtype))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert float((one - other).norm() / other.norm()) < (0.02 if half else 1e-5)


def test_the_gradient_is_that_of_finite_differences_with_dropout_too() -> None:
    layer = layer_of(dropout=0.4).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def product(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        with drawing_from(7):
            return layer(x)

    learned = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    assert torch.autograd.gradcheck(product, (x, *learned))


@pytest.mark.parametrize("family", ["llama", "phi"])  # phi's linear layers have a bias
def test_the_product_of_compiled_layers_is_that_of_peft_with_the_same_dropout(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 to 1e-5; peft is given what was kept, scaled up, in place of its dropout."""
    monkeypatch.setattr(LoraLinear, "hashes_dropout", True)
    layer, generator = layer_of(dropout=0.4, family=family), torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, WIDTH, generator=generator)
    above = torch.randn(2, 5, layer.out_features, generator=generator)
    with drawing_from(7):
        found = gradients_of(layer, x, above)
    number = layer.lora_dropout["default"].number
    with drawing_from(7):
        kept = without_some(torch.ones_like(x), 0.4, number)
    assert 0.4 < float(kept.mean()) < 0.8
    layer.give_back()
    layer.lora_dropout["default"] = _Times(kept / 0.6)
    wanted = gradients_of(layer, x, above)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm() / other.norm()) < 1e-5


class _Times(torch.nn.Module):
    def __init__(self, factors: torch.Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors


def test_what_a_compiled_layer_drops_is_each_element_by_itself_with_its_probability() -> None:
    """Shares of rows, columns and whole draws, of neighbours and of two calls: six standard deviations at most."""
    p, shape = 0.05, (20, 400, 600)
    with drawing_from(3):
        dropped = torch.stack([1 - without_some(torch.ones(shape[1:]), p, torch.tensor(1)) for _ in range(shape[0])])
    away = (dropped.double() - p) / (p * (1 - p)) ** 0.5
    for kept in ((0,), (1,), (2,), (0, 1), (0, 2)):
        over = [axis for axis in range(3) if axis not in kept]
        count = dropped.numel() / torch.tensor([shape[axis] for axis in kept]).prod()
        assert float(away.mean(over).abs().max()) * float(count) ** 0.5 < 6, kept
    for moved in ((0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)):
        together = away * away.roll(moved, (0, 1, 2))
        assert abs(float(together.mean())) * dropped.numel() ** 0.5 < 6, moved


def test_a_share_near_one_drops_nearly_all_and_none_drops_nothing() -> None:
    x = torch.ones(50, 40)
    assert torch.equal(without_some(x, 0.0, torch.tensor(1)), x)
    assert float(without_some(x, 0.999, torch.tensor(1)).mean()) < 0.02
    assert not float(without_some(x, 1 - 2**-34, torch.tensor(1)).sum())


def test_dropout_leaves_the_base_alone_and_keeps_the_mean() -> None:
    layer = layer_of(dropout=0.25)
    x = torch.ones(20_000, WIDTH)
    with torch.no_grad():
        torch.manual_seed(0)
        dropped = layer(x)
        whole = layer.eval()(x)
    assert not torch.allclose(dropped, whole)
    deviation = dropped.std(0) / len(x) ** 0.5
    assert float(((dropped.mean(0) - whole.mean(0)) / deviation).abs().max()) < 4


def test_what_is_dropped_is_each_place_by_itself_with_its_probability() -> None:
    """Of more than 2^20 places a share p within five deviations, also at both ends; neighbours as often as p says."""
    count = (1 << 20) + 1000
    for p in (0.001, 0.05, 0.5, 0.999):
        with drawing_from(11):
            places = dropped_places(p, count)
        dropped = torch.zeros(count, dtype=torch.bool)
        dropped[places.long()] = True  # an IndexError where a place is outside
        for part in (dropped, dropped[:60_000], dropped[-60_000:], dropped[(1 << 20) - 64 :]):
            assert abs(float(part.float().mean()) - p) <= 5 * (p * (1 - p) / len(part)) ** 0.5
        for distance in (1, 2, 1 << 16):
            both = (dropped[distance:] & dropped[:-distance]).float()
            assert abs(float(both.mean()) - p * p) <= 7 * (p * p * (1 - p * p) / len(both)) ** 0.5
        for size in (8, 1 << 12):  # as even, from block to block, as independent chances are, and no more
            blocks = dropped[: count // size * size].view(-1, size).sum(1).double()
            variance = size * p * (1 - p)
            assert abs(float(blocks.var()) / variance - 1) < 6 * ((2 + 1 / variance) / len(blocks)) ** 0.5
    assert len(dropped_places(0.5, 0)) == 0


def test_dropout_is_a_function_of_its_seed() -> None:
    with drawing_from(1):
        first, second = dropped_places(0.3, 1000), dropped_places(0.3, 1000)
    with drawing_from(1):
        assert torch.equal(dropped_places(0.3, 1000), first)
    assert not torch.equal(first[:100], second[:100])


def test_merged_and_disabled_adapters_are_left_to_peft() -> None:
    layer, x = layer_of().eval(), torch.randn(4, WIDTH)
    with torch.no_grad():
        wanted = layer(x)
        layer.merge()
        assert torch.allclose(layer(x), wanted, atol=1e-5)
        layer.unmerge()
        layer.enable_adapters(False)
        assert torch.allclose(layer(x), layer.base_layer(x))


def test_only_plain_layers_are_taken_over() -> None:
    model = add_adapter(tiny_model("gpt2"), rank=4)
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    assert layers
    assert not any(isinstance(layer, LoraLinear) for layer in layers), (
        "GPT-2's layers keep their weights the other way round"
    )


def test_a_layer_can_be_copied() -> None:
    layer, x = layer_of().eval(), torch.randn(4, WIDTH)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("shape", [(0, WIDTH), (0, 3, WIDTH)])
def test_no_rows_are_no_rows(shape: tuple[int, ...]) -> None:
    """As an expert that got no token."""
    x = torch.zeros(shape, requires_grad=True)
    product = layer_of(dropout=0.5)(x)
    assert product.shape == (*shape[:-1], layer_of().out_features)
    product.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_a_bias_that_learns_and_a_variant_added_later_are_left_to_peft() -> None:
    layer = layer_of(family="phi")
    layer.base_layer.bias.requires_grad_()
    layer(torch.ones(2, WIDTH)).sum().backward()
    assert layer.base_layer.bias.grad is not None
    later = layer_of()
    later.update_layer(
        "dora", r=4, lora_alpha=6, config=LoraConfig(r=4, lora_alpha=6, use_dora=True), init_lora_weights=True
    )
    later.set_adapter("dora")
    assert later._plain_adapter(torch.ones(2, WIDTH)) is None


def test_what_an_operation_makes_and_keeps_is_counted_with_the_tensors_of_a_pass() -> None:
    """With dropout the input without what is dropped, 4 bytes a number, beside the places, int32 and so 4 · p."""
    x = torch.ones(1 << 12, WIDTH)
    held = [peak_bytes(lambda p=p: layer_of(dropout=p)(x), torch.device("cpu")) for p in (0.0, 0.5)]  # type: ignore[misc]
    assert 5 * x.numel() < held[1] - held[0] < 9 * x.numel()


def test_dropout_that_drops_nothing_by_chance_is_none() -> None:
    """Of so few places none may fall out; what is kept for the gradient is as long all the same."""
    layer, x = layer_of(dropout=1e-6), torch.randn(2, WIDTH)
    assert torch.allclose(layer(x), layer_of()(x), atol=1e-4)


def test_dropout_does_not_depend_on_the_order_of_layers_but_on_how_often_each_is_called() -> None:
    """A compiler orders what does not depend on each other as it likes, and otherwise with gradients than without."""
    with drawing_from(1):
        first, second, again = (dropped_places(0.3, 1000, number) for number in (1, 2, 1))
    with drawing_from(1):
        other, one = (dropped_places(0.3, 1000, number) for number in (2, 1))
    assert torch.equal(first, one)
    assert torch.equal(second, other)
    assert not torch.equal(first[:100], again[:100])
    assert not torch.equal(first[:100], second[:100])


def test_every_layer_of_a_model_draws_other_numbers() -> None:
    model = add_adapter(tiny_model("llama"), rank=4, dropout=0.5)
    numbers = [int(module.number) for module in model.modules() if isinstance(module, Dropout)]
    assert len(numbers) > 2
    assert len(set(numbers)) == len(numbers)


def test_inputs_that_lie_the_other_way_round_and_dropout_turned_off_in_training() -> None:
    layer, x = layer_of(dropout=0.5), torch.randn(WIDTH, 6).T
    assert layer(x).shape == (6, layer.out_features)
    layer.lora_dropout["default"].p = 0.0
    assert torch.allclose(layer(x), layer_of()(x), atol=1e-5)


@pytest.mark.parametrize("hashes", [False, True])
def test_a_product_that_nothing_depends_on_moves_nothing(hashes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraLinear, "hashes_dropout", hashes)
    layer, x = layer_of(dropout=0.3), torch.randn(4, WIDTH, requires_grad=True)
    learned = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    product = hands_nothing_on(layer(x))
    assert torch.autograd.grad(product.sum(), learned, allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("hashes", [False, True])
def test_no_zeros_are_made_for_what_is_returned_beside_a_product(hashes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on it but the gradient."""
    monkeypatch.setattr(LoraLinear, "hashes_dropout", hashes)
    layer, x = layer_of(dropout=0.3), torch.randn(4, WIDTH, requires_grad=True)
    if hashes:  # what is dropped there is set to 0 by PyTorch's own operations, whose gradient makes some
        monkeypatch.setattr("pykalm.model.lora.without_some", lambda x, p, number: x * 1)
    product = layer(x)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(product, [x, layer.lora_A["default"].weight], torch.ones_like(product))
    assert "aten::zeros" not in {event.name for event in profile.events() or []}
