"""Say in words what to do when memory runs out, wherever a model computes."""

import contextlib
from collections.abc import Iterator

from pykalm.errors import KalmError, OutOfMemoryError

# torch says it in a RuntimeError, on every kind of device in other words.
PHRASES = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")


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
