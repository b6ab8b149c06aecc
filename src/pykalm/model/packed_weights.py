"""Weights that do not learn, kept once more in the order in which a CPU's matrix products read them.

Each product would otherwise bring its weight into that order first, which is 4 to 10 % of it (docs/log.md). In bfloat16 the
results are the same to the last bit; in float32, where PyTorch's own products are MKL's, they add up in another order.
"""

import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykalm.model.layers import computed_dtype, find_layers
from pykalm.model.operations import gradient_of, operation, shapes_of
from pykalm.model.products import has_onednn

MOST_BYTES = 2 << 30
"""What copies may take, two of every weight: for products and for gradients at their inputs. A larger model has none."""
ROWS = 1024
"""Rows of a product that the order suits, as in a chunk on a CPU; others may be taken."""


@dataclass(eq=False)
class _Copies:
    """Hold a weight's copies, made when they are first asked for: of itself, and of its transpose.

    memory: where its numbers were; a cast there and back may give it the same place again, with other numbers.
    """

    weight: "weakref.ref[Tensor]"
    memory: "weakref.ref[torch.UntypedStorage]"
    version: int
    own: Tensor | None = None
    transposed: Tensor | None = None


_copies: dict[int, _Copies] = {}
"""By where a weight's numbers lie. An entry goes with its weight."""


class PackedLinear(nn.Linear):
    """Compute what nn.Linear computes, with the copies of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ + bias, (..., in) to (..., out)."""
        dtype = computed_dtype(x)
        learns = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if x.device.type != "cpu" or learns or self.weight.dtype != dtype:
            return super().forward(x)
        found: Tensor = _frozen_product(x.to(dtype), self.weight, self.bias)
        return found

    def give_back(self) -> None:
        """Make the layer PyTorch's own again, in place."""
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @staticmethod
    def take_over(module: nn.Module) -> None:
        """Make a layer one of these, in place, where it is PyTorch's own, its weight has copies and its bias learns nothing."""
        plain = type(module) is nn.Linear and (module.bias is None or not module.bias.requires_grad)
        if plain and _copies_of(module.weight) is not None:  # type: ignore[arg-type]
            module.__class__ = PackedLinear


def pack_frozen_weights(model: Any) -> None:
    """Let the frozen linear modules in the layers of a Hugging Face model on a CPU compute with copies.

    Adapters beside them do so by themselves. Nothing happens where the copies would be too large, or the machine has no such
    products.
    """
    linear = {
        name: part
        for _, stack in find_layers(model)
        for name, part in stack.named_modules()
        if isinstance(part, nn.Linear) and _can_be_packed(part.weight)
    }
    if not linear or 2 * sum(part.weight.nbytes for part in linear.values()) > MOST_BYTES:
        return
    for name, part in linear.items():
        _register(part.weight)
        if not name.endswith("base_layer"):  # inside an adapter, which does not call it
            PackedLinear.take_over(part)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows · Wᵀ + bias, (N, in) to (N, out), with the copy of the weight where there is one."""
    copies, bias = _copies_of(weight), None if bias is None else bias.to(rows.dtype).contiguous()
    if copies is None or rows.dtype != weight.dtype:
        return F.linear(rows, weight.to(rows.dtype), bias)
    if copies.own is None:
        copies.own = _packed(weight)
    return _packed_product(rows, copies.own, bias)


def gradient_at_rows(above: Tensor, weight: Tensor) -> Tensor:
    """Return above · W, (N, out) to (N, in), with the copy of the transposed weight where there is one."""
    copies = _copies_of(weight)
    if copies is None or above.dtype != weight.dtype:
        return above @ weight.to(above.dtype)
    if copies.transposed is None:
        copies.transposed = _packed(weight.T.contiguous())
    return _packed_product(above, copies.transposed, None)


@operation("frozen_product")
def _frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x · Wᵀ + bias, (..., in) to (..., out)."""
    return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


@shapes_of(_frozen_product)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operation("frozen_gradient")
def _frozen_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return gradient · W, (..., out) to (..., in)."""
    return gradient_at_rows(gradient.reshape(-1, len(weight)), weight).view(*gradient.shape[:-1], weight.shape[1])


@shapes_of(_frozen_gradient)
def _(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], weight.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _frozen_gradient(gradient, *ctx.saved_tensors), None, None


gradient_of(_frozen_product, _backward, keep=_keep)


def _can_be_packed(weight: Tensor) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype in _formats()
        and not weight.requires_grad
        and not weight.is_inference()
        and weight.is_contiguous()
    )


@cache
def _formats() -> tuple[torch.dtype, ...]:
    """Return the number formats of which the machine has such products."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return ()
    has = {
        torch.float32: has_onednn(),
        torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    }
    return tuple(dtype for dtype in has if has[dtype])


def _register(weight: Tensor) -> None:
    """Note that a weight may have copies, until it is gone."""
    place = weight.data_ptr()
    if _copies_of(weight) is None:
        _copies[place] = _Copies(weakref.ref(weight), weakref.ref(weight.untyped_storage()), weight._version)
        weakref.finalize(weight, _forget, place, _copies[place])


def forget_copies(weight: Tensor) -> None:
    """Compute without copies from now on: who writes to `weight.data`, which leaves no trace, calls this."""
    _copies.pop(weight.data_ptr(), None)


def _forget(place: int, copies: _Copies) -> None:
    if _copies.get(place) is copies:  # and not those of a weight that came to lie there since
        del _copies[place]


def _copies_of(weight: Tensor) -> _Copies | None:
    """Return the copies of a weight, if it has any and is what it was when they were made."""
    copies = _copies.get(weight.data_ptr())
    owner = None if copies is None else copies.weight()
    if copies is None or owner is None or owner.data_ptr() != weight.data_ptr():
        return None
    same = owner.shape == weight.shape and owner.dtype == weight.dtype and weight.is_contiguous()
    untouched = owner._version == copies.version and copies.memory() is weight.untyped_storage()
    return copies if same and untouched else None


def _packed(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return found


def _packed_product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return found
