"""Weights shared out among processes (FSDP), for models that do not fit one device; without it every function is a no-op."""

import os

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from pykalm.errors import UsageError
from pykalm.launch import is_asked_for
from pykalm.processes import count


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


def shard(encoder: nn.Module, *, blocks: list[nn.Module], own_methods: tuple[str, ...], device: torch.device) -> None:
    """Share an encoder's weights out among all processes, block by block; it computes on `device` from then on.

    The temperature stays whole in every process. Gradients are summed over the processes, not averaged.
    own_methods: those besides forward that compute with the weights and are called by all processes alike.
    """
    mesh = init_device_mesh(device.type, (count(),))
    temperature = encoder.log_inverse_temperature
    assert isinstance(temperature, nn.Parameter)
    temperature.data = temperature.data.to(device)
    for module in (*blocks, encoder):
        fully_shard(module, mesh=mesh, ignored_params={temperature})
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
    for name in own_methods:
        register_fsdp_forward_method(encoder, name)


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
