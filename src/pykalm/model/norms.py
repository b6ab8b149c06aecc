"""RMS norms in one step: on a CPU a norm of the model's own is a dozen passes over memory, half of them for its gradient."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TRIED_ROWS = 8
"""Rows on which a norm is compared with what is computed in its place."""
ROUNDING = 1e-5
"""How far sums in another order may move a number, as a share of it."""
LIKE = {torch.float32: (ROUNDING, 1.0), torch.bfloat16: (2**-6, 0.98)}
"""How far a number may be from the norm's own, as a share of it, and which share of them no further than ROUNDING. A number in
bfloat16 that rounds the other way may do so twice."""


class OneStep(nn.Module):
    """Compute what a norm of a Hugging Face model computes, weight · (x / rms(x)), where its weight learns nothing.

    Mixed into the norm's own class, in place, by `take_over`. A compiler reads the norm's own forward, which it fuses better.
    """

    weight: Tensor
    tried: torch.dtype

    def forward(self, *given: Any, **options: Any) -> Tensor:
        """Return the norm of x (..., width) in its dtype."""
        alone = len(given) == 1 and not options and not torch.compiler.is_compiling()
        epsilon = _epsilon(self) if alone and self._suits(*given) else None
        if epsilon is None:
            own: Tensor = super().forward(*given, **options)
            return own
        return cast(Tensor, _RMSNorm.apply(*given, self.weight, epsilon))  # type: ignore[no-untyped-call]

    def _suits(self, x: Tensor) -> bool:
        """Return whether the norm of x is computed here: on a CPU, in the dtype that was tried, with a weight at rest."""
        return x.device.type == "cpu" and x.dtype == self.weight.dtype == self.tried and not self.weight.requires_grad

    def give_back(self) -> None:
        """Make the norm transformers' own again, in place."""
        self.__class__ = type(self).__bases__[1]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Say how to make the norm again: its class is made as it is taken over, and stands nowhere under its name."""
        return _again, (type(self).__bases__[1],), self.__dict__

    @staticmethod
    def take_over(module: nn.Module) -> None:
        """Make a module one of these, in place, where it is an RMS norm by its name and by its numbers."""
        named = type(module).__name__.endswith("RMSNorm") and not isinstance(module, OneStep)
        if named and _epsilon(module) is not None and _is_like(module):
            module.__class__ = _in_one_step(type(module))
            cast(OneStep, module).tried = cast(Tensor, module.weight).dtype


def norms_in_one_step(model: nn.Module) -> None:
    """Let the RMS norms of a Hugging Face model on a CPU compute in one step where their weights learn nothing."""
    for module in model.modules():
        OneStep.take_over(module)


class _RMSNorm(torch.autograd.Function):
    """Round as the norms of Llama and its kin do: x / rms(x) in float32, then to the dtype of x, then times the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = inverse.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        scaled = wide * inverse if wide is x else wide.mul_(inverse)
        return scaled.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, at_scaled = x.float(), (above * weight).float()
        with torch.autocast("cpu", enabled=False):
            along = torch.linalg.vecdot(at_scaled, wide).unsqueeze(-1)
        along = along.mul_(inverse).mul_(inverse).div_(-x.shape[-1])
        return at_scaled.addcmul_(wide, along).mul_(inverse).to(x.dtype), None, None


def _epsilon(module: nn.Module) -> float | None:
    """Return what a norm adds to the mean square, by the names that families have for it."""
    named = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in named if isinstance(value, float)), None)


@torch.no_grad()
def _is_like(module: nn.Module) -> bool:
    """Return whether a norm's own forward returns what is computed here: some families add 1 to the weight, or round later.

    Tried with a weight that is not all 1, which would hide when it is rounded.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weight, epsilon = tensors.get("weight"), _epsilon(module)
    if weight is None or len(tensors) > 1 or weight.dim() != 1:
        return False
    if weight.device.type != "cpu" or weight.dtype not in LIKE:
        return False
    x = torch.linspace(-2, 3, TRIED_ROWS * len(weight)).sin_().view(TRIED_ROWS, -1)
    x[::2] *= 1e-3  # so small that what is added to the mean square shows
    x, uneven = x.to(weight.dtype), torch.linspace(0.5, 2, len(weight)).to(weight.dtype)
    try:
        own = torch.func.functional_call(module, {"weight": uneven}, (x,))
    except Exception:  # one that wants more than x is none of these
        return False
    found = _RMSNorm.apply(x, uneven, epsilon)  # type: ignore[no-untyped-call]
    if not isinstance(own, Tensor) or own.dtype != found.dtype or own.shape != found.shape:
        return False
    away, same = LIKE[weight.dtype]
    near, level = (torch.isclose(own.float(), found.float(), rtol=share, atol=0) for share in (away, ROUNDING))
    return bool(near.all()) and float(level.float().mean()) >= same


def _in_one_step(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of norms of a kind that are computed in one step, under its name; one for each kind."""
    if kind not in _kinds:
        _kinds[kind] = type(kind.__name__, (OneStep, kind), {"__module__": kind.__module__})
    return _kinds[kind]


def _again(kind: type[nn.Module]) -> nn.Module:
    """Return an empty norm of a kind that is computed in one step."""
    made = _in_one_step(kind)
    return made.__new__(made)


_kinds: dict[type[nn.Module], type[nn.Module]] = {}
