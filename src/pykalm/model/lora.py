"""LoRA's product with less traffic: on a CPU the adapters' many small steps cost as much as an eighth of all the weights."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pykalm.model.dropout import Dropout, dropped_places


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
            result: Tensor = super().forward(x, *args, **options)
            return result
        dropout, base = self.lora_dropout[name], self.base_layer
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name],
            dropout.p if isinstance(dropout, Dropout) and dropout.training else 0.0,
        )  # fmt: skip
        return product

    def _plain_adapter(self, x: Tensor) -> str | None:
        """Return the one adapter at work, or None where the product is left to peft."""
        active, base = self.active_adapters, self.base_layer
        if x.device.type != "cpu" or torch.compiler.is_compiling() or self.disable_adapters or self.merged:
            return None
        if len(active) != 1 or active[0] not in self.lora_A or active[0] in self.lora_variant:
            return None
        if self.lora_bias[active[0]] or any(
            part.requires_grad for part in base._parameters.values() if part is not None
        ):
            return None
        return active[0] if isinstance(self.lora_dropout[active[0]], Dropout | nn.Identity) else None


class _Product(torch.autograd.Function):
    """The product and its gradients at x, A and B. Of dropout the places are kept that it drops."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float
    ) -> Tensor:
        """Return the product (..., out) in the dtype of x, in which all is computed."""
        with torch.autocast("cpu", enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            dropped = dropped_places(p, rows.numel()) if p else None
            ctx.factor = scaling / (1 - p)
            narrow = _without(rows, dropped) @ a.to(x.dtype).T
            result = F.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            result.addmm_(narrow, (b * ctx.factor).to(x.dtype).T)
        ctx.save_for_backward(rows, dropped, narrow, weight, a, b)
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients at x, A and B, where they are asked for."""
        rows, dropped, narrow, weight, a, b = ctx.saved_tensors
        above = gradient.reshape(-1, weight.shape[0])
        at_narrow = above @ (b * ctx.factor).to(above.dtype)
        at_x = at_a = at_b = None
        if ctx.needs_input_grad[3]:
            at_a = (at_narrow.T @ _without(rows, dropped)).to(a.dtype)
        if ctx.needs_input_grad[4]:
            at_b = (narrow.T @ above).T.to(b.dtype) * ctx.factor
        if ctx.needs_input_grad[0]:
            at_x = above @ weight.to(above.dtype)
            at_x += _without(at_narrow @ a.to(above.dtype), dropped, in_place=True)
            at_x = at_x.view(*gradient.shape[:-1], weight.shape[1])
        return at_x, None, None, at_a, at_b, None, None


def _without(values: Tensor, dropped: Tensor | None, *, in_place: bool = False) -> Tensor:
    """Return the numbers with 0 at the places that are dropped."""
    if dropped is None:
        return values
    kept = values if in_place else values.clone()
    kept.view(-1).index_fill_(0, dropped.long(), 0)
    return kept
