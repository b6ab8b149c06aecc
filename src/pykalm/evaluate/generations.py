"""What a model wrote, kept line by line as it comes, so that an interrupted measurement goes on where it stopped."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykalm.errors import KalmError
from pykalm.files import explain_write_errors, replace_file

log = logging.getLogger(__name__)

Line = dict[str, Any]


@dataclass(frozen=True)
class Generation:
    """Hold an answer as it was written, and the likeliest choices with their log-likelihoods where they were asked for."""

    answer: str
    ranked: tuple[tuple[str, float], ...] | None = None


class GenerationLog:
    """Keep the lines of a measurement in a file, each with the fingerprint of all that the answers depend on.

    Lines of another fingerprint, and one that a kill has cut, are left out when the file is opened and go with the next
    write. Where it cannot be written the measurement goes on, and saving it in the end says why.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.kept = list(_read_lines(path, fingerprint))
        self._is_clean, self._is_writable = False, True

    def generations(self) -> dict[tuple[str, str], Generation]:
        """Return what was written before, by task and prompt."""
        return {(line["task"], line["prompt"]): _generation(line) for line in self.kept}

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines at the end of the file, safe on the disk when this returns."""
        if not self._is_writable:
            return
        try:
            if not self._is_clean:
                self.replace(self.kept)
            text = "".join(_write_line(line, self.fingerprint) for line in lines)
            with explain_write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except KalmError as error:
            self._is_writable = False
            log.warning("kalm: answers are not kept while they come. %s", error)

    def replace(self, lines: Iterable[Line]) -> None:
        """Put lines in place of all that the file holds. Raises TrainingError where it cannot be written."""
        text = "".join(_write_line(line, self.fingerprint) for line in lines)
        replace_file(self.path, lambda path: path.write_text(text, encoding="utf-8"))
        self._is_clean = True


def _write_line(line: Mapping[str, Any], fingerprint: str) -> str:
    return json.dumps({**line, "fingerprint": fingerprint}, ensure_ascii=False) + "\n"


def _read_lines(path: Path, fingerprint: str) -> Iterable[Line]:
    """Yield the whole lines of a fingerprint; none where there is no such file."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    for raw in content.split(b"\n"):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and line.pop("fingerprint", None) == fingerprint:
            yield line


def _generation(line: Line) -> Generation:
    ranked = line.get("ranked")
    return Generation(line["answer"], None if ranked is None else tuple((name, score) for name, score in ranked))
