"""Dropout whose random numbers cost little on a CPU, where drawing them singly takes longer than the adapters do."""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykalm.model.operations import operation, shapes_of

LEVELS = 1 << 16
BLOCK = 1 << 12
"""Places that are dropped together, in any order: few enough to stay in a processor's fastest memory."""
_MIX = 0x7FEB352D, 0x846CA68B - (1 << 32)
"""Odd factors (int32) that spread every bit of a word over those above it (Wellons' lowbias32)."""

_own = threading.local()


@dataclass(frozen=True)
class _Drawing:
    """Hold what a thread's dropout is drawn from, and how often each module has drawn."""

    seed: int
    times: Counter[int] = field(default_factory=Counter)

    def of(self, number: int) -> np.random.SFC64:
        """Return the random numbers of the next call of the module of that number."""
        self.times[number] += 1
        return np.random.SFC64(np.random.SeedSequence([self.seed, number, self.times[number]]))


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let dropout in this thread draw numbers of its own, and leave PyTorch's generator alone.

    They are a function of the seed, the module's number, and how often it was called: not of the order in which modules are
    computed, which is a compiler's to choose.
    """
    before = getattr(_own, "drawing", None)
    _own.drawing = _Drawing(seed)
    try:
        yield
    finally:
        _own.drawing = before


class Dropout(nn.Module):
    """Set a share of the inputs to 0 in training and scale the others up, as nn.Dropout does.

    On a CPU the numbers are 16 random bits an element, of a generator that PyTorch's own, or `drawing_from`, seeds anew at
    every call; the share is p rounded to one in 65,536. Elsewhere this is nn.Dropout. number: tells the modules of a model
    apart.
    """

    number: Tensor

    def __init__(self, p: float, number: int = 0) -> None:
        super().__init__()
        self.p = p
        # A tensor, so that layers which differ in it alone are compiled once.
        self.register_buffer("number", torch.tensor(number), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some elements 0 and the others divided by the share that is kept."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        factors = torch.empty(x.shape, dtype=x.dtype)
        torch.ge(random_bits(x, self.number).view(x.shape), dropped - LEVELS // 2, out=factors)
        return x * factors.mul_(LEVELS / (LEVELS - dropped))


def dropped_places(p: float, count: int, number: int = 0) -> Tensor:
    """Return the places (int32), of `count`, that dropout with probability p drops, each by itself; some are there twice.

    Into every block of places fall as many as a Poisson variable says, with a mean of −log(1 − p) a place. Those that fall on
    one place are then a Poisson variable too, independent of all others, and none does with probability 1 − p.
    """
    bits, blocks = _bits(number), -(-count // BLOCK)
    thrown = np.random.Generator(bits).poisson(-math.log1p(-p) * BLOCK, blocks)
    starts = np.repeat(np.arange(0, blocks * BLOCK, BLOCK, dtype=np.int32), thrown)
    places = starts + (_integers(bits, len(starts), np.dtype(np.uint16)) & (BLOCK - 1))
    return torch.from_numpy(places[places < count])


def without_some(x: Tensor, p: float, number: Tensor) -> Tensor:
    """Return x (..., width) with 0 where dropout with probability p drops, of the module of a number; not scaled up.

    Made for a compiler, which does so in the loop that makes x: every row and every column has a random word, and an element's
    word is a hash of both. Nothing but these is kept for the gradient.
    """
    rows, columns = random_words(x, number).split([x.numel() // x.shape[-1], x.shape[-1]])
    words = rows.view(*x.shape[:-1], 1) ^ columns
    words = words * _MIX[0]
    words = (words ^ ((words >> 15) & 0x1FFFF)) * _MIX[1]  # their lower bits would want more, and hardly count
    return torch.where(words >= min(round(p * 2**32), 2**32 - 1) - 2**31, x, 0)


@operation("random_words")
def random_words(x: Tensor, number: Tensor) -> Tensor:
    """Return a random int32 word for each of the N rows of x (..., width) and each of its columns (N + width,)."""
    count = x.numel() // x.shape[-1] + x.shape[-1]
    return _random(count, np.dtype(np.int32), int(number))


@shapes_of(random_words)
def _(x: Tensor, number: Tensor) -> Tensor:
    return torch.empty(x.numel() // x.shape[-1] + x.shape[-1], dtype=torch.int32)


# An operation of its own, which compiled code calls as it is. It is told x and the module, so that no two calls look alike.
@operation("random_bits")
def random_bits(x: Tensor, number: Tensor) -> Tensor:
    """Return a random int16 number for each of x, every one as likely, for the module of a number."""
    return _random(x.numel(), np.dtype(np.int16), int(number))


@shapes_of(random_bits)
def _(x: Tensor, number: Tensor) -> Tensor:
    return torch.empty(x.numel(), dtype=torch.int16)


def _random(count: int, dtype: "np.dtype[np.signedinteger[Any]]", number: int) -> Tensor:
    """Return `count` random integers, every one of their kind as likely, for the module of a number."""
    return torch.from_numpy(_integers(_bits(number), count, dtype))


def _integers(bits: np.random.SFC64, count: int, dtype: "np.dtype[Any]") -> npt.NDArray[Any]:
    """Return `count` random integers, every one of their kind as likely."""
    drawn: npt.NDArray[Any] = bits.random_raw(-(-count * dtype.itemsize // 8)).view(dtype)
    return drawn if len(drawn) == count else drawn[:count].copy()


def _bits(number: int) -> np.random.SFC64:
    """Return random numbers for the next call of a module in this thread, or from PyTorch's own generator."""
    drawing: _Drawing | None = getattr(_own, "drawing", None)
    return np.random.SFC64(int(torch.randint(1 << 62, ()))) if drawing is None else drawing.of(number)
