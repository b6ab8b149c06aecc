"""Write files and folders whole or not at all, so that a kill or a full disk never leaves a half."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from pykalm.errors import RunError, TrainingError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

READ_ATTEMPTS = 5
"""How often a reader looks again at what a writer was replacing under its eyes."""


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside the target, then put it in the target's place at once.

    Raises TrainingError where the disk is full or writing fails; the target then is as it was.
    """
    draft = target.with_name(f".{target.name}-{os.getpid()}")
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.touch()
            mode = draft.stat().st_mode & 0o666
            write(draft)
            draft.chmod(mode)  # safetensors lets nobody else read its files
            _flush(draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)


def replace_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a folder beside the target, then put it in the target's place.

    A kill between the two renames leaves the old folder under another name; `recover_folder` brings it back. Only a
    writer that no other disturbs (`only_writer`) may call either; readers ask `standing_folder` where to read.
    """
    draft, old = target.with_name(f".{target.name}-new"), target.with_name(f".{target.name}-old")
    with explain_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            fill(draft)
            for file in draft.iterdir():
                file.chmod(draft.stat().st_mode & 0o666)  # as above
                _flush(file)
            if target.exists():
                target.rename(old)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            recover_folder(target)


def standing_folder(target: Path) -> Path:
    """Return where to read a folder that a writer may be replacing: its own place or, between the renames, the old one's.

    Changes nothing, so that a reader never gets in the way of a writer. The target itself where there is none of them.
    """
    old = target.with_name(f".{target.name}-old")
    for _ in range(READ_ATTEMPTS):
        for folder in (target, old):
            if folder.exists():
                return folder
        time.sleep(0.001)  # the second rename may have come between the two looks
    return target


def recover_folder(target: Path) -> None:
    """Bring back the folder that `replace_folder` was about to replace when it was killed. For writers only."""
    old = target.with_name(f".{target.name}-old")
    if old.exists():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left of `replace_file` in a folder that no other process can be writing to."""
    for draft in folder.glob(".*-*"):
        if draft.is_file():
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, made where there is none, against every other process that asks for it in the same way.

    The system lets go of it when the process ends, however it ends. Raises RunError where another one holds it, or
    a file is in its place. On Windows, which cannot lock a folder, nothing is held: there it is up to the user to train once
    at a time.
    """
    with explain_write_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunError(f"{folder}: wanted a folder, found a file there or on the way. Name another one.") from error
        handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if handle is not None:
            _lock(handle, folder)
        remove_drafts(folder)
        yield
    finally:
        if handle is not None:
            _unlock(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only where it is still empty


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"{folder}: wanted a folder that no one writes to, found another training at work in it. Wait for its end, "
            "stop it, or take another --out."
        ) from error


def _unlock(handle: int) -> None:
    """Let go, whatever processes were forked meanwhile and have not ended yet."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@contextlib.contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Turn a failed write into a TrainingError that says what is safe and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch hides what the system said behind an error of its own.
        cause = next((link for link in _chain(error) if isinstance(link, OSError)), error)
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause)
        remedy = "Free some space" if full else "Check the folder and its rights"
        raise TrainingError(f"{target}: cannot save: {cause}. {remedy}; what was saved before is whole.") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _flush(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
