"""The norm of the whole gradient, and its limit."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pykalm.model.sharding import whole


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradient of all parameters down to a norm of max_norm where it is longer; return its norm before.

    Weights that are shared out among processes count whole.
    """
    learned = [parameter for parameter in parameters if parameter.grad is not None]
    by_kind: dict[type, list[nn.Parameter]] = {}
    for parameter in learned:
        by_kind.setdefault(type(parameter.grad), []).append(parameter)
    norms: list[Tensor] = []
    for same_kind in by_kind.values():
        norms.append(whole(get_total_norm([parameter.grad for parameter in same_kind if parameter.grad is not None])))
    if not norms:
        return 0.0
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for same_kind in by_kind.values():
        clip_grads_with_norm_(same_kind, max_norm, norm)
    return float(norm)
