"""Find a graph by name or folder: bundled, on the search path $KALM_DATA, in the cache, or fetched."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pykalm.errors import FetchError, GraphError
from pykalm.graph.download import Progress, download, extract
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.names import nearest, suggestion
from pykalm.graph.read import read_graph
from pykalm.graph.sources import BASE_URL, CATALOGUE, NamedGraph
from pykalm.graph.tables import find_table

__all__ = [
    "CATALOGUE",
    "GraphEntry",
    "NamedGraph",
    "cache_folder",
    "fetch_graph",
    "list_graphs",
    "load_graph",
    "search_path",
    "source_folder",
]

FileProgress = Callable[[str, int, int | None], None]
"""Is called with the file's name, the bytes that are here and the bytes that are wanted, where that is known."""

_ARCHIVES = (".tar.gz", ".tar.xz", ".tar", ".tgz", ".zip")


@dataclass(frozen=True)
class GraphEntry:
    """Say where a graph that has a name lies; folder is None where it would have to be fetched."""

    name: str
    summary: str
    folder: Path | None


def load_graph(source: str | Path) -> KnowledgeGraph:
    """Load a graph from a name ("world", "wn18rr", "WN18RR_v1-ind") or from a folder ("./my_graph", a Path).

    A name is looked for among the bundled graphs, in the folders of $KALM_DATA (two levels deep, whatever
    the case, "-" and "_" being one), in the cache, and at last as a folder. Raises GraphError where nothing
    is found.
    """
    if isinstance(source, Path) or source.startswith(".") or Path(source).is_absolute():
        return read_graph(Path(source))
    key = _key(source)
    if key == "world":
        with resources.as_file(resources.files("pykalm.graph") / "world") as folder:
            return read_graph(folder, "world")
    here = _folders()
    if key in here:
        return read_graph(here[key], key)
    if Path(source).exists():
        return read_graph(Path(source))  # which says what is wrong with a file
    raise GraphError(_not_found(source, here))


def source_folder(source: str | Path) -> Path | None:
    """Return the folder, absolute, from which `load_graph` reads what is no name; None for a name or nothing at all."""
    if isinstance(source, Path) or source.startswith(".") or Path(source).is_absolute():
        return Path(source).resolve()
    is_name = _key(source) == "world" or _key(source) in _folders()
    return Path(source).resolve() if not is_name and Path(source).is_dir() else None


def list_graphs() -> list[GraphEntry]:
    """List the graphs of the catalogue, then those that are found beside them, in order of their names."""
    here = _folders()
    with resources.as_file(resources.files("pykalm.graph") / "world") as folder:
        here["world"] = folder
    entries = [GraphEntry(graph.name, graph.summary, here.get(graph.name)) for graph in CATALOGUE.values()]
    return entries + [GraphEntry(name, "", here[name]) for name in sorted(here) if name not in CATALOGUE]


def fetch_graph(
    name: str,
    *,
    to: Path | None = None,
    base_url: str = BASE_URL,
    progress: FileProgress | None = None,
) -> Path:
    """Download a graph of the catalogue, check it, bring it into our layout and return its folder, `to`/name.

    `to` is the cache folder by default; `progress` is called with file name, bytes here, bytes wanted. The
    folder appears whole or not at all; interrupted downloads are kept in `to`/.downloads and continued. A
    folder that exists is returned as it is. Raises FetchError.
    """
    graph = CATALOGUE.get(_key(name))
    if graph is None:
        raise FetchError(f"'{name}' is not in the catalogue. Take one of: {', '.join(CATALOGUE)}.")
    if graph.convert is None:
        raise FetchError(f"'{graph.name}' is bundled with kalm. There is nothing to fetch: use it by its name.")
    to = cache_folder() if to is None else to
    folder = to / graph.name
    if folder.is_dir():
        return folder
    try:
        _fetch(graph, to, base_url, progress)
    except OSError as error:
        remedy = "Make room, or name another folder in $KALM_CACHE"
        raise FetchError(f"{to}: cannot be written, {error.strerror}. {remedy}.") from error
    return folder


def _fetch(graph: NamedGraph, to: Path, base_url: str, progress: FileProgress | None) -> None:
    """Download and check every source, build the graph beside its place, and move it there in one step."""
    downloads = to / ".downloads" / graph.name
    for source in graph.sources:
        report = _reporter(progress, source.file_name)
        url, target = f"{base_url.rstrip('/')}/{source.path}", downloads / source.file_name
        download(url, target, size=source.size, digest=source.digest, progress=report)
    with tempfile.TemporaryDirectory(prefix=f".{graph.name}.", dir=to) as scratch:
        _build(graph, downloads, Path(scratch))
        os.replace(Path(scratch) / graph.name, to / graph.name)
    shutil.rmtree(downloads)


def cache_folder() -> Path:
    """Return the folder of fetched graphs: $KALM_CACHE, else "kalm/graphs" in the user's cache folder."""
    if os.environ.get("KALM_CACHE"):
        return Path(os.environ["KALM_CACHE"]).expanduser()
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(local or default) / "kalm" / "graphs"


def _build(graph: NamedGraph, downloads: Path, scratch: Path) -> None:
    """Unpack what was downloaded into scratch/raw and write the graph to scratch/name; read it as a proof."""
    raw, built = scratch / "raw", scratch / graph.name
    raw.mkdir()
    built.mkdir()
    for file in sorted(downloads.iterdir()):
        if file.name.endswith(_ARCHIVES):
            extract(file, raw)
        elif not file.name.endswith(".part"):
            shutil.copy(file, raw)
    assert graph.convert is not None  # fetch_graph has seen to it
    graph.convert(raw, built)
    read_graph(built, graph.name)


def _reporter(progress: FileProgress | None, file_name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda here, wanted: progress(file_name, here, wanted)


def _folders() -> dict[str, Path]:
    """Map name to folder for every graph on the search path and in the cache; the first wins."""
    found: dict[str, Path] = {}
    for root in [*search_path(), cache_folder()]:
        for folder in _graph_folders(root):
            found.setdefault(_key(folder.name), folder)
    return found


def search_path() -> list[Path]:
    """Return the folders of $KALM_DATA, in order."""
    return [Path(entry).expanduser() for entry in os.environ.get("KALM_DATA", "").split(os.pathsep) if entry]


def _graph_folders(root: Path) -> Iterator[Path]:
    """Yield the folders with a train file in `root` and in its subfolders, in order of their names."""
    for pattern in ("*", "*/*"):
        for folder in sorted(root.glob(pattern)):
            if not folder.name.startswith(".") and folder.is_dir() and find_table(folder, "train"):
                yield folder


def _key(name: str) -> str:
    return name.casefold().replace("_", "-")


def _not_found(source: str, here: dict[str, Path]) -> str:
    looked = ", ".join(str(root) for root in [*search_path(), cache_folder()])
    if _key(source) in CATALOGUE:
        remedy = f"Run: kalm data fetch {_key(source)}. Or name a folder that holds it in $KALM_DATA."
        return f"graph '{source}' is not on this machine (looked in {looked}). {remedy}"
    hint = suggestion(nearest(_key(source), [*CATALOGUE, *here]))
    return f"there is no graph and no folder '{source}' (looked in {looked}).{hint} See: kalm data list."
