"""Read tab-separated files fast, and say file and line of everything that is wrong with them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pykalm.errors import GraphError

ENDINGS = (".tsv", ".txt")

_SHOWN = 5  # problems that an error spells out; the rest is counted


def find_table(folder: Path, stem: str) -> Path | None:
    """Return folder/stem.tsv or folder/stem.txt, whichever exists, or None; raises GraphError for both."""
    found = [folder / f"{stem}{ending}" for ending in ENDINGS if (folder / f"{stem}{ending}").is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise GraphError(f"{folder}: wanted one file for '{stem}', found {names}. Remove one.")
    return found[0] if found else None


def read_rows(path: Path, widths: Sequence[int], columns: str) -> list[list[str]]:
    """Return the cells of every line; `widths` are the numbers of columns allowed, `columns` names them.

    A byte order mark, CRLF line ends and blank lines at the end do no harm; cells are left as they are.
    Raises GraphError for a file that is not UTF-8, is empty, or has lines with another number of columns.
    """
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise GraphError(f"{path.name}: the file is empty, in {path.parent}. Write {columns} in each line.")
    rows = [line.split("\t") for line in lines]
    wrong = [index for index, row in enumerate(rows) if len(row) not in widths]
    wanted = " or ".join(map(str, widths))
    raise_problems(
        f"{path.name}:{index + 1}: wanted {wanted} columns separated by tabs ({columns}), "
        f"found {len(rows[index])}: {shorten(lines[index])!r}. Fix or remove the line."
        for index in wrong
    )
    return rows


def read_text(path: Path) -> str:
    """Return a file as text without a byte order mark; raises GraphError with the line that is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GraphError(f"{path}: cannot be read, {error.strerror}. Check the file's permissions.") from error
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "UTF-16" if utf16 else f"0x{content[error.start]:02x}"
        raise GraphError(
            f"{path.name}:{line}: wanted UTF-8 text, found {found} at byte {error.start}, in {path.parent}. "
            f"Convert the file, for example with iconv -f ENCODING -t UTF-8."
        ) from error


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one GraphError that spells out the first five problems and counts the rest; none, no error."""
    listed = list(problems)
    if listed:
        rest = [f"... and {len(listed) - _SHOWN} more problems like these."] if len(listed) > _SHOWN else []
        raise GraphError("\n".join(listed[:_SHOWN] + rest))


def shorten(text: str, length: int = 60) -> str:
    """Return a text that fits in a message: its first `length` letters, with dots where it was longer."""
    return text if len(text) <= length else text[: length - 3] + "..."
