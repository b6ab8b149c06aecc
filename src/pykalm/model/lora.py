"""LoRA's product with less traffic: on a CPU the adapters' many small steps cost as much as an eighth of all the weights."""

import math
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from pykalm.model.dropout import Dropout, dropped_places
from pykalm.model.layers import computed_dtype
from pykalm.model.packed_weights import forget_copies, gradient_at_rows, product


class LoraLinear(lora.Linear):
    """Compute what peft's layer computes; on a CPU in one operation, with a gradient of its own.

    That is for one adapter of plain matrices beside a frozen nn.Linear; anything else is left to peft.
    """

    @staticmethod
    def take_over(module: nn.Module) -> None:
        """Make a layer of peft's one of these, in place, where it is a plain one."""
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear

    def give_back(self) -> None:
        """Make the layer peft's own again, in place."""
        self.__class__ = lora.Linear  # type: ignore[assignment]

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return x · Wᵀ + bias + scaling · dropout(x) · Aᵀ · Bᵀ, (..., in) to (..., out)."""
        name = self._plain_adapter(x)
        if name is None or args or options:
            left: Tensor = super().forward(x, *args, **options)
            return left
        dropout, base = self.lora_dropout[name], self.base_layer
        p, number = 0.0, None
        if isinstance(dropout, Dropout) and dropout.training and dropout.p > 0:
            p, number = dropout.p, dropout.number
        result: Tensor = _product(
            x.to(computed_dtype(x)), base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, number,
            self.scaling[name] / (1 - p), float(p),
        )[0]  # fmt: skip
        return result

    def merge(self, *args: Any, **options: Any) -> None:
        """Add the adapters to the weight, as peft does, past all that would tell its copies."""
        forget_copies(self.base_layer.weight)  # type: ignore[arg-type]
        super().merge(*args, **options)

    def unmerge(self) -> None:
        """Take the adapters from the weight again, as peft does."""
        forget_copies(self.base_layer.weight)  # type: ignore[arg-type]
        super().unmerge()

    def _plain_adapter(self, x: Tensor) -> str | None:
        """Return the one adapter at work, or None where the product is left to peft."""
        active, base = self.active_adapters, self.base_layer
        if x.device.type != "cpu" or self.disable_adapters or self.merged:
            return None
        if len(active) != 1 or active[0] not in self.lora_A or active[0] in self.lora_variant:
            return None
        if self.lora_bias[active[0]] or any(
            part.requires_grad for part in base._parameters.values() if part is not None
        ):
            return None
        return active[0] if isinstance(self.lora_dropout[active[0]], Dropout | nn.Identity) else None


# Operations of their own, which compiled code calls as they are, and whose results are counted with the tensors of a pass.
@torch.library.custom_op("kalm::lora_product", mutates_args=())
def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, number: Tensor | None, factor: float, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product (..., out) in the dtype of x, in which all is computed, and what its gradient needs.

    That is dropout(x) · Aᵀ without its scale (N, r), and the places that dropout, of the module of that number, drops.
    """
    with torch.autocast("cpu", enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        drawn = torch.empty(0, dtype=torch.int32) if number is None else dropped_places(p, rows.numel(), int(number))
        places = _filled_up(drawn, rows.numel(), p)
        narrow = _without(rows, places) @ a.to(x.dtype).T
        result = product(rows, weight, bias)
        result.addmm_(narrow, (b * factor).to(x.dtype).T)
    return result.view(*x.shape[:-1], len(weight)), narrow, places


@_product.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, number: Tensor | None, factor: float, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.numel() // x.shape[-1]
    places = torch.empty(0 if number is None else _most_places(x.numel(), p), dtype=torch.int32)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(count, a.shape[0]), places


@torch.library.custom_op("kalm::lora_gradients", mutates_args=())
def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, narrow: Tensor, places: Tensor, factor: float,
    at_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients at x (empty unless it is asked for), A and B."""
    with torch.autocast("cpu", enabled=False):
        rows, above = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, len(weight))
        at_narrow = above @ (b * factor).to(above.dtype)
        at_a = (at_narrow.T @ _without(rows, places)).to(a.dtype)
        at_b = ((narrow.T @ above).T.to(b.dtype) * factor).contiguous()
        if not at_input:
            return x.new_empty(0), at_a, at_b
        at_x = gradient_at_rows(above, weight)
        at_x += _without(at_narrow @ a.to(above.dtype), places, in_place=True)
    return at_x.view(x.shape), at_a, at_b


@_gradients.register_fake
def _(
    gradient: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, narrow: Tensor, places: Tensor, factor: float,
    at_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if at_input else 0), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, a, b, _, ctx.factor, _ = inputs
    ctx.save_for_backward(x, weight, a, b, *output[1:])


def _backward(ctx: Any, gradient: Tensor, *beside: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients at x, A and B, where they are asked for."""
    at_input = bool(ctx.needs_input_grad[0])
    at_x, at_a, at_b = _gradients(gradient, *ctx.saved_tensors, ctx.factor, at_input)
    return at_x if at_input else None, None, None, at_a, at_b, None, None, None


_product.register_autograd(_backward, setup_context=_keep)


def _most_places(count: int, p: float) -> int:
    """Return more than as many as dropout with probability p drops of `count`, by eight deviations at least."""
    return count * (math.ceil(64 * p) + 1) // 64 + 256


def _filled_up(places: Tensor, count: int, p: float) -> Tensor:
    """Return the places in a tensor as long as always for that count, which compiled code wants to know; last, how many."""
    if not p:
        return places
    filled = torch.zeros(_most_places(count, p), dtype=torch.int32)
    filled[: len(places)] = places
    filled[-1] = len(places)
    return filled


def _without(values: Tensor, filled: Tensor, *, in_place: bool = False) -> Tensor:
    """Return the numbers with 0 at the places that are dropped."""
    if not len(filled):
        return values
    kept = values if in_place else values.clone(memory_format=torch.contiguous_format)
    kept.view(-1).index_fill_(0, filled[: int(filled[-1])].long(), 0)
    return kept
