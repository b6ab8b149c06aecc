"""Amounts of memory as people write them, and what to say when memory runs out, wherever a model computes."""

import contextlib
import re
from collections.abc import Iterator

from pykalm.errors import KalmError, OutOfMemoryError

# torch says it in a RuntimeError, on every kind of device in other words.
PHRASES = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")

BYTES = {"b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("b", 1000), ("ib", 1024))
}


def parse_size(value: object) -> object:
    """Return the bytes of a size such as "8GB" (10⁹), "900 MiB" (2²⁰) or "4096"; what is no text is returned as it is.

    Raises ValueError for a text that is no size.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if found is None or (found[2] or "b") not in BYTES:
        raise ValueError(f"wanted a size such as 8GB, 900MB, 16GiB or a number of bytes; found {value!r}")
    return int(float(found[1]) * BYTES[found[2] or "b"])


def format_size(num_bytes: float) -> str:
    """Write bytes in the largest unit that leaves a whole number before the point, as in 3.2 GB."""
    power = next((power for power in (4, 3, 2, 1) if num_bytes >= 1000**power), 0)
    return f"{num_bytes / 1000**power:.{1 if power else 0}f} {('', 'k', 'M', 'G', 'T')[power]}B"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python or torch means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in text for phrase in PHRASES)
    )


@contextlib.contextmanager
def explained_memory(remedy: str, *, kind: type[KalmError] = OutOfMemoryError) -> Iterator[None]:
    """Turn running out of memory into an error that names the remedy; an outer block, which knows more, replaces it."""
    try:
        yield
    except (RuntimeError, MemoryError, OutOfMemoryError) as error:
        cause = error.__cause__ or error if isinstance(error, OutOfMemoryError) else error
        if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
            raise
        found = str(cause).splitlines()[0] if str(cause) else "allocation refused"
        raise kind(f"out of memory: {found}. {remedy}") from cause
