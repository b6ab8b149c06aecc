"""What the tests of graphs share: graph folders written by hand, and a file server on loopback that misbehaves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest


@pytest.fixture
def write_graph(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes files, given as keyword = content with spaces for tabs, to a new folder."""

    def write(folder: str = "graph", ending: str = "tsv", **files: str) -> Path:
        path = tmp_path / folder
        path.mkdir(parents=True)
        for stem, content in files.items():
            (path / f"{stem}.{ending}").write_text(content.replace("|", "\t"), encoding="utf-8")
        return path

    return write


@dataclass
class FileServer:
    """Hold what the server gives, how it misbehaves, and which requests it saw (path, Range header)."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # the next answers break off after so many bytes
    statuses: list[int] = field(default_factory=list)  # the next answers are these errors
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[FileServer]:
    """Serve files on loopback, with ranges, cuts and errors as told."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requests.append((self.path, wanted))
            if state.statuses:
                return self.send_error(state.statuses.pop(0))
            if self.path not in state.files:
                return self.send_error(404)
            content, start = state.files[self.path], 0
            if wanted and state.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    return self.send_error(416)
            self.send_response(206 if wanted and state.ranges else 200)
            if wanted and state.ranges:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            rest = content[start:]
            self.wfile.write(rest[: state.cut_after.pop(0)] if state.cut_after else rest)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state.url = f"http://127.0.0.1:{running.server_port}"
        thread = Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield state
        running.shutdown()
        thread.join()
