"""Measure in a fresh process: with memory that nobody else has used, and given back whole at its end."""

import signal
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from pykalm.errors import OutOfMemoryError

T = TypeVar("T")


def in_own_process(call: Callable[[], T]) -> T:
    """Call a function of a module in a process of its own; return or raise what it does.

    Raises OutOfMemoryError where the system ended the process.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=_be_quiet) as pool:
        try:
            return pool.submit(call).result()
        except BrokenProcessPool as error:
            raise OutOfMemoryError(
                "wanted a process that measures to its end, found that it was ended: as a rule because memory ran out. "
                "Measure a part (--only), with smaller steps (--batch-size), or where other programs need less."
            ) from error


def _be_quiet() -> None:
    """Die of Ctrl-C without a word, as whoever waits says it, and keep the warnings of libraries to oneself."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.simplefilter("ignore")
