"""LoRA's product with less traffic: on a CPU the adapters' many small steps cost as much as an eighth of all the weights."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from pykalm.model.dropout import Dropout, dropped_places, without_some
from pykalm.model.layers import computed_dtype
from pykalm.model.operations import gradient_of, operation, shapes_of
from pykalm.model.packed_weights import forget_copies, gradient_at_rows, product


class LoraLinear(lora.Linear):
    """Compute what peft's layer computes; on a CPU in one operation, with a gradient of its own.

    That is for one adapter of plain matrices beside a frozen nn.Linear; anything else is left to peft.
    hashes_dropout: what is dropped is told by a hash, which a compiler makes part of its own loops. It goes by layer and not by
    whether a compiler is at work: one that gives up shall not drop other elements in the second pass of gradient caching.
    """

    hashes_dropout = False

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
        x, factor = x.to(computed_dtype(x)), self.scaling[name] / (1 - p)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        result: Tensor
        if number is not None and self.hashes_dropout:
            kept, narrowing = without_some(x, p, number), a.to(x.dtype)
            widening = _scaled(b, factor, x.dtype)  # type: ignore[arg-type]
            result = _product_beside(x, kept, base.weight, base.bias, narrowing, widening)[0]
        else:
            result = _product(x, base.weight, base.bias, a, b, number, factor, float(p))[0]
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


@operation("lora_product")
def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, number: Tensor | None, factor: float, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the product (..., out) in the dtype of x, in which all is computed, and what its gradient needs.

    That is dropout(x) · Aᵀ without its scale (N, r), the places that dropout, of the module of that number, drops, and what
    it keeps (N, in). Without dropout there are no places, and x itself is what is kept; it is not returned again.
    """
    with torch.autocast("cpu", enabled=False):
        rows = _rows(x)
        if number is None:
            kept, places = rows.new_empty(0), torch.empty(0, dtype=torch.int32)
        else:
            kept, places = _dropped(rows, p, int(number))
        narrowing, widening = a.to(rows.dtype), _scaled(b, factor, rows.dtype)
        result, narrow = _adapted(rows, rows if number is None else kept, weight, bias, narrowing, widening)
    return result.view(*x.shape[:-1], len(weight)), narrow, places, kept


@shapes_of(_product)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, number: Tensor | None, factor: float, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = x.numel() // x.shape[-1]
    places = torch.empty(0 if number is None else torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32)
    kept = x.new_empty(0 if number is None else (count, x.shape[-1]))
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(count, a.shape[0]), places, kept


@operation("lora_gradients")
def _gradients(
    gradient: Tensor, kept: Tensor, weight: Tensor, a: Tensor, b: Tensor, narrow: Tensor, places: Tensor, factor: float,
    at_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients at x (empty unless it is asked for), A and B; kept: dropout(x) without its scale."""
    with torch.autocast("cpu", enabled=False):
        above = _rows(gradient)
        scaled = _scaled(b, factor, above.dtype)
        at_narrow, at_a, at_b = _at_adapter(above, _rows(kept), narrow, scaled)
        at_a, at_b = at_a.to(a.dtype), (at_b.T.to(b.dtype) * factor).contiguous()
        if not at_input:
            return kept.new_empty(0), at_a, at_b
        at_x = gradient_at_rows(above, weight)
        at_x += _without(at_narrow.T @ a.to(above.dtype), places)
    return at_x.view(*gradient.shape[:-1], kept.shape[-1]), at_a, at_b


@shapes_of(_gradients)
def _(
    gradient: Tensor, kept: Tensor, weight: Tensor, a: Tensor, b: Tensor, narrow: Tensor, places: Tensor, factor: float,
    at_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*gradient.shape[:-1], kept.shape[-1]) if at_input else (0,)
    return kept.new_empty(shape), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, _, a, b, number, ctx.factor, _ = inputs
    _, narrow, places, kept = output
    ctx.save_for_backward(x if number is None else kept, weight, a, b, narrow, places)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients at x, A and B, where they are asked for."""
    at_input = bool(ctx.needs_input_grad[0])
    at_x, at_a, at_b = _gradients(gradient, *ctx.saved_tensors, ctx.factor, at_input)
    return at_x if at_input else None, None, None, at_a, at_b, None, None, None


gradient_of(_product, _backward, keep=_keep)


# What compiled layers call: the compiler makes x with dropout beside what x is made of, in one loop over memory, and again
# for the gradient; and A and B as products take them.
@operation("lora_product_beside")
def _product_beside(
    x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x · Wᵀ + bias + kept · aᵀ · b (..., out), and kept · aᵀ (N, r), all in the dtype of x; a (r, in), b (r, out)."""
    with torch.autocast("cpu", enabled=False):
        result, narrow = _adapted(_rows(x), _rows(kept), weight, bias, a, b)
    return result.view(*x.shape[:-1], len(weight)), narrow


@shapes_of(_product_beside)
def _(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(x.numel() // x.shape[-1], a.shape[0])


@operation("lora_gradients_beside")
def _gradients_beside(
    gradient: Tensor, kept: Tensor, weight: Tensor, a: Tensor, b: Tensor, narrow: Tensor, at_input: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients at x and at kept (empty unless they are asked for), a and b."""
    with torch.autocast("cpu", enabled=False):
        above, nothing = _rows(gradient), kept.new_empty(0)
        at_narrow, at_a, at_b = _at_adapter(above, _rows(kept), narrow, b)
        if not at_input:
            return nothing, nothing.clone(), at_a, at_b
        at_x, at_kept = gradient_at_rows(above, weight), at_narrow.T @ a
    return at_x.view(kept.shape), at_kept.view(kept.shape), at_a, at_b


@shapes_of(_gradients_beside)
def _(
    gradient: Tensor, kept: Tensor, weight: Tensor, a: Tensor, b: Tensor, narrow: Tensor, at_input: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = kept.shape if at_input else 0
    return kept.new_empty(shape), kept.new_empty(shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _keep_beside(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, kept, weight, _, a, b = inputs
    ctx.save_for_backward(kept, weight, a, b, output[1])


def _backward_beside(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients at x, kept, a and b, where they are asked for."""
    at_input = bool(ctx.needs_input_grad[0])
    at_x, at_kept, at_a, at_b = _gradients_beside(gradient, *ctx.saved_tensors, at_input)
    return (at_x, at_kept, None, None, at_a, at_b) if at_input else (None, None, None, None, at_a, at_b)


gradient_of(_product_beside, _backward_beside, keep=_keep_beside)


def _adapted(
    rows: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return rows · Wᵀ + bias + kept · aᵀ · b (N, out), and kept · aᵀ (N, r)."""
    narrow = kept @ a.T
    return product(rows, weight, bias).addmm_(narrow, b), narrow


def _at_adapter(above: Tensor, kept: Tensor, narrow: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at a · keptᵀ (r, N), at a (r, in) and at b (r, out).

    above (N, out): that at the result, narrow: kept · aᵀ (N, r). The few rows of a product come first, which is faster than
    its few columns last.
    """
    at_narrow = b @ above.T
    return at_narrow, at_narrow @ kept, narrow.T @ above


def _scaled(b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return factor · Bᵀ (r, out) in a dtype, row by row."""
    return (b * factor).to(dtype).T.contiguous()


def _rows(x: Tensor) -> Tensor:
    """Return (..., width) as (N, width)."""
    return x.reshape(-1, x.shape[-1])


def _dropped(rows: Tensor, p: float, number: int) -> tuple[Tensor, Tensor]:
    """Return the numbers (N, width) that dropout keeps, 0 where it drops, and the places that it drops."""
    places = dropped_places(p, rows.numel(), number)
    return _without(rows.clone(memory_format=torch.contiguous_format), places), places


def _without(values: Tensor, places: Tensor) -> Tensor:
    """Return the numbers (N, width), which lie side by side, after those at the places were set to 0."""
    if len(places):
        values.view(-1).index_fill_(0, places.long(), 0)
    return values
