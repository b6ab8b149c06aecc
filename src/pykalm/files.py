"""Write files and folders whole or not at all, so that a kill or a full disk never leaves a half."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from pykalm.errors import TrainingError


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside the target, then put it in the target's place at once.

    Raises TrainingError where the disk is full or writing fails; the target then is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    os.close(handle)
    draft = Path(name)
    with explain_write_errors(target):
        try:
            write(draft)
            _flush(draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)


def replace_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a folder beside the target, then put it in the target's place.

    A kill between the two renames leaves the old folder under another name; `recover_folder` brings it back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft, old = target.with_name(f".{target.name}-new"), target.with_name(f".{target.name}-old")
    recover_folder(target)
    with explain_write_errors(target):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            fill(draft)
            for file in draft.iterdir():
                _flush(file)
            if target.exists():
                target.rename(old)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Bring back the folder that `replace_folder` was about to replace when it was killed."""
    old = target.with_name(f".{target.name}-old")
    if old.exists():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


@contextlib.contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Turn a failed write into a TrainingError that says what is safe and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        remedy = "Free some space" if full else "Check the folder and its rights"
        raise TrainingError(f"{target}: cannot save: {error}. {remedy}; what was saved before is whole.") from error


def _flush(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
