"""Dropout whose random numbers cost little on a CPU, where drawing them singly takes longer than the adapters do."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 16

_own = threading.local()


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let dropout in this thread draw numbers of its own, a function of the seed, and leave PyTorch's generator alone."""
    before = getattr(_own, "generator", None)
    _own.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _own.generator = before


class Dropout(nn.Module):
    """Set a share of the inputs to 0 in training and scale the others up, as nn.Dropout does.

    On a CPU the numbers are 16 random bits an element, of a generator that PyTorch's own, or that of `drawing_from`, seeds
    anew at every call; the share is p rounded to one in 65,536. Elsewhere this is nn.Dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some elements 0 and the others divided by the share that is kept."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        factors = torch.empty(x.shape, dtype=x.dtype)
        torch.ge(random_bits(x.numel(), _seed()).view(x.shape), dropped - LEVELS // 2, out=factors)
        return x * factors.mul_(LEVELS / (LEVELS - dropped))


def dropped_places(p: float, count: int) -> Tensor:
    """Return in order the places (int32), of `count`, that dropout with probability p drops, each by itself.

    The gaps between them are geometric, so for a small p there is little to draw.
    """
    found: Tensor = _places(p, count, _seed())
    return found


# An operation of its own, so that what it keeps is counted with the tensors of a pass.
@torch.library.custom_op("kalm::dropped_places", mutates_args=())
def _places(p: float, count: int, seed: Tensor) -> Tensor:
    """Draw `dropped_places` as a function of the seed, one number."""
    generator = np.random.Generator(np.random.SFC64(int(seed)))
    wanted = int(count * p + 6 * math.sqrt(count * p) + 10)
    found, last = [], -1
    while last < count:
        gaps = generator.standard_exponential(wanted, dtype=np.float32) / -math.log1p(-p)
        places = np.cumsum(gaps.astype(np.int64) + 1) + last
        found.append(places)
        last = int(places[-1])
    places = np.concatenate(found) if len(found) > 1 else found[0]
    return torch.from_numpy(places[: int(np.searchsorted(places, count))].astype(np.int32))


def _seed() -> Tensor:
    """Draw a seed from the generator of this thread, or PyTorch's own."""
    # A compiler sees one thread only, and would not understand another's generator.
    generator = None if torch.compiler.is_compiling() else getattr(_own, "generator", None)
    return torch.randint(1 << 62, (), generator=generator)


# An operation of its own, which compiled code calls as it is. With an argument of its own, so that no two calls look alike.
@torch.library.custom_op("kalm::random_bits", mutates_args=())
def random_bits(count: int, seed: Tensor) -> Tensor:
    """Return `count` random int16 numbers, every one as likely: a function of the seed, one number."""
    generator = np.random.Generator(np.random.SFC64(int(seed)))
    words = generator.integers(1 << 64, size=-(-count // 4), dtype=np.uint64).view(np.int16)
    return torch.from_numpy(words if len(words) == count else words[:count].copy())


@random_bits.register_fake
def _(count: int, seed: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.int16)
