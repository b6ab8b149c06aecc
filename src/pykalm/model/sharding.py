"""Weights shared out among processes (FSDP), for models that do not fit one device; without it every function is a no-op."""

import os
from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pykalm.errors import UsageError
from pykalm.launch import is_asked_for
from pykalm.processes import count, device


def wants_sharding() -> bool:
    """Return whether the launch asks for FSDP; raises UsageError where it asks for what kalm does not do with it."""
    if not is_asked_for("FSDP") or count() == 1:
        return False
    version, offload = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower()
    if version != "2" or offload not in ("false", "0"):
        raise UsageError(
            f"wanted --use_fsdp with --fsdp_version 2 and without --fsdp_offload_params, found version {version}, "
            f"offload {offload}. docs/many-processes.md has the command line."
        )
    return True


def shard(module: nn.Module, *, layers: Sequence[nn.Module], whole: nn.Parameter, methods: Sequence[str]) -> None:
    """Share a module's weights out among all processes, layer by layer; it computes on their devices from then on.

    whole: the parameter that stays as it is in every process; methods: those besides forward that compute with the
    weights and that all processes call alike. Gradients are summed over the processes, not averaged.
    """
    mesh = init_device_mesh(device().type, (count(),))
    whole.data = whole.data.to(device())
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, ignored_params={whole})
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for name in methods:
        register_fsdp_forward_method(module, name)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's weights are shared out."""
    return isinstance(module, FSDPModule)


def give_back(module: nn.Module) -> None:
    """Let go of the weights that a forward pass has gathered from the other processes and kept for a backward pass."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which every process holds a part; all processes ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return of a whole tensor the part that this process holds of a parameter of its shape, or the tensor itself."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
