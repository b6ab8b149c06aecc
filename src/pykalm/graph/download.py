"""Bring files from the network: resumable, checked against what was promised, unpacked in place."""

import errno
import hashlib
import http.client
import lzma
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from pykalm.errors import FetchError

_CHUNK = 1 << 16
_ATTEMPTS = 5
_TIMEOUT = 30.0  # seconds without a byte
_UNPACKED_LIMIT = 4 << 30  # bytes; a graph's archive that claims more is no graph

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

Progress = Callable[[int, int | None], None]
"""Is called with the bytes that are here and the bytes that are wanted, where that is known."""


def download(
    url: str,
    to: Path,
    *,
    size: int | None,
    digest: str,
    pause: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Download `url` to the file `to`, which appears whole and checked; an earlier part is continued.

    `size` is in bytes, None where only the digest is known; `digest` is "sha256:HEX" or "git:HEX", the id
    that git gives to the file (SHA-1 over its length and content). A cut connection is tried again, five
    times in all, after `pause` seconds and more. Raises FetchError for a refusing server, and for a wrong
    size or digest: then the file is removed.
    """
    if not url.startswith(("http://", "https://")):
        raise FetchError(f"{url}: wanted an http or https address. Correct the address.")
    part = to.with_name(f"{to.name}.part")
    to.parent.mkdir(parents=True, exist_ok=True)
    if not to.is_file():
        _receive(url, part, size=size, pause=pause, progress=progress)
        _check(url, part, size=size, digest=digest)
        os.replace(part, to)
    _check(url, to, size=size, digest=digest)
    return to


def file_digest(path: Path, kind: str) -> str:
    """Return "sha256:HEX" or "git:HEX" of a file; raises FetchError for another kind."""
    if kind == "git":
        state = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    elif kind == "sha256":
        state = hashlib.sha256()
    else:
        raise FetchError(f"wanted a digest of kind 'sha256' or 'git', found '{kind}'. Correct the entry.")
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return f"{kind}:{state.hexdigest()}"


def extract(archive: Path, to: Path) -> list[Path]:
    """Unpack a .zip, .tar, .tar.gz or .tar.xz into the folder `to` and return its files.

    All members are looked at before the first is written. Raises FetchError for one that would land outside
    `to` (absolute, drive or "..") or is not a plain file or folder (links, devices), and for a damaged
    archive.
    """
    written = []
    with _opened(archive) as members:
        targets = [(_inside(archive, name, to), content) for name, content in members]
        for target, content in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            with content() as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            written.append(target)
    return written


def _receive(url: str, part: Path, *, size: int | None, pause: float, progress: Progress | None) -> None:
    """Fill `part` until the server has no more, going on after a cut. Raises FetchError."""
    problem: Exception | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            return _receive_once(url, part, size, progress)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is not a beginning of this file
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise FetchError(f"{url}: the server answers {error.code} {error.reason}. Check it.") from error
            problem = error
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in _UNWRITABLE:
                raise FetchError(f"{part}: cannot be written, {error.strerror}. Make room and run again.") from error
            problem = error
    have = part.stat().st_size if part.exists() else 0
    raise FetchError(
        f"{url}: no luck in {_ATTEMPTS} attempts ({problem}); {have} bytes are kept. Run again to continue."
    ) from problem


def _receive_once(url: str, part: Path, size: int | None, progress: Progress | None) -> None:
    """Ask once for what is missing and append it; a server that sends all overwrites the part."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have >= size:
        return
    headers = {"User-Agent": "kalm", **({"Range": f"bytes={have}-"} if have else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as answer:
        length = answer.headers.get("Content-Length")
        continues = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if continues else 0
        total = have + int(length) if length is not None else size
        with part.open("ab" if continues else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, total)
                if size is not None and have > size:
                    return  # already wrong: no need for the rest
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _check(url: str, path: Path, *, size: int | None, digest: str) -> None:
    found_size, found = path.stat().st_size, file_digest(path, digest.partition(":")[0])
    if (size is not None and found_size != size) or found != digest:
        path.unlink()
        wanted = f"{digest}" if size is None else f"{size} bytes with {digest}"
        raise FetchError(
            f"{url}: wanted {wanted}, found {found_size} bytes with {found}. It was removed. Run again; "
            f"if it stays so, the file at this address is not the one that kalm knows."
        )


def _inside(archive: Path, name: str, to: Path) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name or not parts.parts:
        raise FetchError(f"{archive.name}: member '{name}' would leave the folder. Do not trust this archive.")
    return to.joinpath(*parts.parts)


Member = tuple[str, Callable[[], IO[bytes]]]


@contextmanager
def _opened(archive: Path) -> Iterator[list[Member]]:
    """Open an archive and list its files as (name, how to open the content); folders are left out."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                yield _zip_members(archive, zipped)
        else:
            with tarfile.open(archive) as tar:
                yield _tar_members(archive, tar)
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise FetchError(f"{archive}: cannot be unpacked, {reason}. Remove it and fetch it again.") from error


def _zip_members(archive: Path, zipped: zipfile.ZipFile) -> list[Member]:
    infos = [info for info in zipped.infolist() if not info.is_dir()]
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise FetchError(f"{archive.name}: member '{info.filename}' is a link. Do not trust this archive.")
    _check_unpacked(archive, sum(info.file_size for info in infos))
    return [(info.filename, partial(zipped.open, info)) for info in infos]


def _tar_members(archive: Path, tar: tarfile.TarFile) -> list[Member]:
    infos = [info for info in tar.getmembers() if not info.isdir()]
    for info in infos:
        if not info.isfile():
            raise FetchError(f"{archive.name}: member '{info.name}' is a link or device. Do not trust this archive.")
    _check_unpacked(archive, sum(info.size for info in infos))
    return [(info.name, partial(_tar_content, tar, info)) for info in infos]


def _tar_content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(info)
    assert content is not None  # a plain file, as was checked
    return content


def _check_unpacked(archive: Path, size: int) -> None:
    if size > _UNPACKED_LIMIT:
        raise FetchError(f"{archive.name}: would unpack to {size} bytes. Do not trust this archive.")
