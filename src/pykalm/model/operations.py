"""Operations of our own, which a compiler calls as they are, and whose results are counted with the tensors of a pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
Operation = torch._ops.OpOverload

_library = torch.library.Library("kalm", "FRAGMENT")  # type: ignore[no-untyped-call]

FUNCTIONS: dict[Operation, Callable[..., Any]] = {}
"""What every operation computes."""


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Make a function of tensors an operation kalm::NAME, which must not return what it was given.

    As torch.library.custom_op does, but that a call goes to the function at once: there each one takes three times as long,
    and a pass makes hundreds (docs/log.md).
    """

    def register(function: Callable[..., Any]) -> Operation:
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))  # type: ignore[no-untyped-call]
        _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        made: Operation = getattr(torch.ops.kalm, name).default
        FUNCTIONS[made] = function
        return made

    return register


def shapes_of(made: Operation) -> Callable[[Function], Function]:
    """Let a function of tensors without numbers stand for an operation, where a compiler asks what shapes it returns."""

    def register(function: Function) -> Function:
        torch.library.register_fake(made, function, lib=_library)
        return function

    return register


def gradient_of(made: Operation, backward: Callable[..., Any], *, keep: Callable[..., None]) -> None:
    """Give an operation a gradient, from what is kept of its call and the gradient at its first result.

    What it returns beside that is for its gradient alone. So no zeros are made for what nothing depends on.
    """
    count = len(made._schema.arguments)

    def kept(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        keep(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    def handed_on(ctx: Any, gradient: torch.Tensor | None, *beside: torch.Tensor | None) -> tuple[Any, ...]:
        found: tuple[Any, ...] = (None,) * count if gradient is None else backward(ctx, gradient)
        return found

    torch.library.register_autograd(made, handed_on, setup_context=kept, lib=_library)
