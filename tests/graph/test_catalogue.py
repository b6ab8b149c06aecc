"""Graphs by name: the search path, the cache, and fetching from a server on loopback."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pykalm.errors import FetchError, GraphError
from pykalm.graph.catalogue import CATALOGUE, cache_folder, fetch_graph, list_graphs, load_graph

Write = Callable[..., Path]
TRAIN = "a|r|b\nb|r|c\n"


@pytest.fixture(autouse=True)
def _empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an empty cache, an empty search path and an empty working folder."""
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KALM_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_folder_is_loaded_by_its_path(write_graph: Write) -> None:
    folder = write_graph("here/towns", train=TRAIN)
    for source in (folder, str(folder), "./towns", "towns"):
        assert load_graph(source).name == "towns"


def test_a_name_is_found_on_the_search_path_whatever_its_case(
    write_graph: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_graph("first/UMLS", train=TRAIN)
    write_graph("second/umls", train="x|r|y\n")
    deep = write_graph("second/inductive/WN18RR_v1_ind", train=TRAIN, ending="txt")
    roots = [first.parent, first.parent / "missing", deep.parent.parent]
    monkeypatch.setenv("KALM_DATA", os.pathsep.join(map(str, roots)))
    assert load_graph("Umls").entity_ids == ("a", "b", "c")  # the first of the search path wins
    assert load_graph("wn18rr-v1-ind").name == load_graph("WN18RR_v1_ind").name == "wn18rr-v1-ind"
    here = {entry.name: entry.folder for entry in list_graphs()}
    assert (here["umls"], here["wn18rr-v1-ind"], here["wn18rr"]) == (first, deep, None)
    assert list(here)[: len(CATALOGUE)] == list(CATALOGUE)


def test_world_is_bundled_and_the_search_path_does_not_hide_it(
    write_graph: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALM_DATA", str(write_graph("data/world", train=TRAIN).parent))
    world = load_graph("World")
    assert world.name == "world"
    assert (world.num_entities >= 600, sum(map(len, world.splits.values())) >= 2500) == (True, True)
    assert next(iter(list_graphs())).folder != Path(os.environ["KALM_DATA"]) / "world"


def test_a_known_name_that_is_not_here_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"graph 'WN18RR' is not on this machine .* Run: kalm data fetch wn18rr"):
        load_graph("WN18RR")
    with pytest.raises(GraphError, match=r"no graph and no folder 'umsl' .* The nearest is 'umls'"):
        load_graph("umsl")
    with pytest.raises(GraphError, match="there is no such folder"):
        load_graph(tmp_path / "nowhere")


def test_the_cache_lies_where_the_machine_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KALM_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kalm" / "graphs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kalm" / "graphs"


def tar_of(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for stem, content in files.items():
            member = tarfile.TarInfo(f"{stem}.txt")
            member.size = len(content.replace("|", "\t").encode())
            tar.addfile(member, io.BytesIO(content.replace("|", "\t").encode()))
    return buffer.getvalue()


SPLITS = {"train": "a|_r_1|b\r\nb|_r_1|c\r\n", "valid": "a|_r_1|c\n", "test": "c|_r_1|a\n"}
CODEX = {"train": "Q2|P9|Q10\nQ10|P9|Q2\n", "valid": "Q2|P9|Q2\n", "test": "Q10|P9|Q10\n"}
LABELS = {"Q2": {"label": "Earth", "description": "a\tplanet"}, "Q10": {"label": ""}, "Q99": {"label": "unused"}}

# What the addresses give, in the published layouts, small; and the (name, description) of every entity after that.
PUBLISHED: dict[str, tuple[dict[str, bytes], list[tuple[str, str]]]] = {
    "wn18rr": (
        {
            "WN18RR.tar.gz": tar_of(**SPLITS),
            "entity2text.txt": b"a\tstool, waste, or a seat\nb\tchair, a seat\nc\tleg\n",
            "relation2text.txt": b"_r_1\tr one",
        },
        [("stool", "waste, or a seat"), ("chair", "a seat"), ("leg", "")],
    ),
    "umls": (
        {
            "umls.tar.gz": tar_of(**SPLITS),
            "entity2text.txt": b"a\tan a\nb\ta b\nc\ta c\n",
            "relation2text.txt": b"_r_1\tr one",
        },
        [("an a", ""), ("a b", ""), ("a c", "")],
    ),
    "fb15k-237": (
        {
            "FB15k-237.tar.gz": tar_of(**SPLITS),
            "entity2text.txt": b"a\tAda\nunused\tNobody\nb\tBob\nc\tCy\n",
            "entity2textlong.txt": b"b\tBob is long.\nunused\tx\na\tAda  is longer.\n",
            "relation2text.txt": b"_r_1\tr one",
        },
        [("Ada", "Ada is longer."), ("Bob", "Bob is long."), ("Cy", "")],
    ),
    "codex-s": (
        {
            **{f"{split}.txt": content.replace("|", "\t").encode() for split, content in CODEX.items()},
            "valid_negatives.txt": b"Q2\tP9\tQ10\n",
            "test_negatives.txt": b"Q10\tP9\tQ2\n",
            "entities.json": json.dumps(LABELS).encode(),
            "relations.json": b'{"P9": {"label": "r one"}}',
        },
        [("Earth", "a planet"), ("Q10", "")],
    ),
}


@pytest.fixture
def publish(server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function that serves a small version of a graph, with its own sizes and digests in the catalogue."""

    def start(name: str) -> str:
        sources = []
        for source in CATALOGUE[name].sources:
            content = PUBLISHED[name][0][source.file_name]
            server.files[f"/{source.path}"] = content
            size = None if source.size is None else len(content)
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            plain = f"sha256:{hashlib.sha256(content).hexdigest()}"
            sources.append(replace(source, size=size, digest=plain if size else f"git:{git}"))
        monkeypatch.setitem(CATALOGUE, name, replace(CATALOGUE[name], sources=tuple(sources)))
        return str(server.url)

    return start


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_is_fetched_and_found_by_name(
    name: str, publish: Callable[[str], str], tmp_path: Path
) -> None:
    seen: list[str] = []
    folder = fetch_graph(name.upper(), base_url=publish(name), progress=lambda file, *_: seen.append(file))
    assert folder == tmp_path / "cache" / name
    assert set(seen) == set(PUBLISHED[name][0])
    graph = load_graph(name)
    assert list(zip(graph.entity_names, graph.entity_descriptions, strict=True)) == PUBLISHED[name][1]
    assert [len(graph.splits[split]) for split in ("train", "valid", "test")] == [2, 1, 1]
    assert graph.relation_texts == ("r one",)
    assert list(graph.negatives) == (["valid", "test"] if name == "codex-s" else [])
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent != folder] == []


def test_a_fetched_graph_is_not_fetched_again(server: Any, publish: Callable[[str], str], tmp_path: Path) -> None:
    address = publish("umls")
    for _ in range(2):
        assert fetch_graph("umls", to=tmp_path / "mine", base_url=address) == tmp_path / "mine" / "umls"
    assert len(server.requests) == 3


def test_an_interrupted_fetch_leaves_no_graph_and_goes_on(
    server: Any, publish: Callable[[str], str], tmp_path: Path
) -> None:
    address = publish("umls")
    server.files["/" + CATALOGUE["umls"].sources[2].path] = b"_r_1\tlies\n"
    with pytest.raises(FetchError, match=r"relation2text.txt: wanted .* found 10 bytes"):
        fetch_graph("umls", base_url=address)
    assert not (tmp_path / "cache" / "umls").exists()
    publish("umls")
    fetch_graph("umls", base_url=address)
    assert [path.rpartition("/")[2] for path, _ in server.requests].count("umls.tar.gz") == 1
    assert load_graph("umls").num_entities == 3


def test_a_layout_that_is_not_as_expected_leaves_no_graph(
    publish: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PUBLISHED["codex-s"][0], "entities.json", b"[1, 2]")
    with pytest.raises(FetchError, match=r"entities.json: wanted an object of objects"):
        fetch_graph("codex-s", base_url=publish("codex-s"))
    monkeypatch.setitem(PUBLISHED["codex-s"][0], "entities.json", b"{")
    (tmp_path / "cache/.downloads/codex-s/entities.json").unlink()
    with pytest.raises(FetchError, match=r"entities.json:1: is not JSON"):
        fetch_graph("codex-s", base_url=publish("codex-s"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".downloads"]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FetchError, match=r"file: cannot be written, .*\$KALM_CACHE"):
        fetch_graph("umls", to=tmp_path / "file")


def test_what_cannot_be_fetched_says_so() -> None:
    with pytest.raises(FetchError, match=r"'dbpedia' is not in the catalogue. Take one of: world, wn18rr"):
        fetch_graph("dbpedia")
    with pytest.raises(FetchError, match="'world' is bundled"):
        fetch_graph("world")


def test_every_source_is_pinned_to_a_commit_with_a_digest() -> None:
    for graph in CATALOGUE.values():
        for source in graph.sources:
            commit = source.path.split("/")[2]
            assert len(commit) == 40
            kind, _, value = source.digest.partition(":")
            assert (kind, len(value)) in {("sha256", 64), ("git", 40)}
            assert source.size or kind == "git"
