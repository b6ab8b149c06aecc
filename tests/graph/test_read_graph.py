"""Reading a graph folder: layouts that are fine, and mistakes that are named by file and line."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pykalm.errors import GraphError
from pykalm.graph.read import read_graph

Write = Callable[..., Path]

ENTITIES = "a|Anna|a person\nb|Bern|a city\\nin a country\nc|Chur|\n"
RELATIONS = "lives|lives in|is home of\nnear|is near|\n"
TRAIN = "a|lives|b\nb|near|c\n"


def test_a_whole_folder_is_read(write_graph: Write) -> None:
    folder = write_graph(
        train=TRAIN,
        valid="a|near|b\n",
        test="a|lives|c\n",
        valid_negatives="b|near|b\n",
        entities=ENTITIES,
        relations=RELATIONS,
    )
    graph = read_graph(folder)
    assert (graph.name, graph.num_entities, graph.num_relations) == ("graph", 3, 2)
    assert graph.entity_names == ("Anna", "Bern", "Chur")
    assert graph.entity_descriptions == ("a person", "a city in a country", "")
    assert graph.inverse_texts == ("is home of", "inverse of is near")
    assert {split: rows.tolist() for split, rows in graph.splits.items()} == {
        "train": [[0, 0, 1], [1, 1, 2]],
        "valid": [[0, 1, 1]],
        "test": [[0, 0, 2]],
    }
    assert {split: rows.tolist() for split, rows in graph.negatives.items()} == {"valid": [[1, 1, 1]]}


def test_ids_serve_as_texts_in_order_of_first_appearance(write_graph: Write) -> None:
    graph = read_graph(write_graph(train="b|r_1|a\na|r_2|c\n", test="d|r_1|b\n"), name="mine")
    assert graph.name == "mine"
    assert graph.entity_names == graph.entity_ids == ("b", "a", "c", "d")
    assert graph.relation_texts == ("r_1", "r_2")
    assert graph.inverse_texts == ("inverse of r_1", "inverse of r_2")


def test_txt_crlf_byte_order_mark_and_blank_end_change_nothing(write_graph: Write, tmp_path: Path) -> None:
    plain = read_graph(write_graph(train=TRAIN, entities=ENTITIES, relations=RELATIONS))
    folder = tmp_path / "windows"
    folder.mkdir()
    for stem, content in (("train", TRAIN), ("entities", ENTITIES), ("relations", RELATIONS)):
        text = content.replace("|", "\t").replace("\n", "\r\n") + "\r\n \r\n"
        (folder / f"{stem}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_graph(folder).fingerprint() == plain.fingerprint()


def test_a_description_column_may_be_missing_in_some_lines(write_graph: Write) -> None:
    graph = read_graph(write_graph(train="a|near|b\na|near|a", entities="a|Anna\nb|Bern|a city", relations="near|near"))
    assert graph.entity_descriptions == ("", "a city")


def test_a_line_separator_of_unicode_does_not_end_a_line(write_graph: Write) -> None:
    graph = read_graph(write_graph(train="a|r|b\n", entities="a|one\u2028line\x85here|x\nb|b|\n"))
    assert graph.num_entities == 2


MISTAKES = {
    "too few columns": ({"train": "a|lives|b\na lives b\n"}, r"train.tsv:2: wanted 3 columns .* found 1: 'a lives b'"),
    "too many columns": ({"train": "a|lives|b|c\n"}, r"train.tsv:1: wanted 3 columns .* found 4"),
    "a blank line inside": ({"train": "a|lives|b\n\nb|near|c\n"}, r"train.tsv:2: .* found 1: ''"),
    "an unknown relation": (
        {"train": "a|lives|b\na|livs|b\n"},
        r"train.tsv:2: relation 'livs' is not in relations.tsv \(2 known\). Fix the line or add the relation.",
    ),
    "an unknown entity": ({"valid": "a|lives|x\n"}, r"valid.tsv:1: entity 'x' is not in entities.tsv \(3 known\)"),
    "an unknown negative": ({"test_negatives": "x|near|a"}, r"test_negatives.tsv:1: entity 'x' is not in"),
    "an empty cell": ({"train": "a||b\n"}, r"train.tsv:1: the relation is empty"),
    "an empty file": ({"train": "\n\n"}, r"train.tsv: the file is empty"),
    "an empty split": ({"test": ""}, r"test.tsv: the file is empty"),
    "a repeated id": ({"entities": ENTITIES + "a|Again|\n"}, r"entities.tsv:4: id 'a' stands in line 1 already"),
    "an empty id": ({"entities": ENTITIES + " |Nobody|\n"}, r"entities.tsv:4: the id is empty \(text 'Nobody'\)"),
    "an empty name": ({"entities": ENTITIES + "d| |x\n"}, r"entities.tsv:4: the name of 'd' is empty"),
    "an empty text": ({"relations": "lives||\nnear|near|"}, r"relations.tsv:1: the text of 'lives' is empty"),
    "an id alone": ({"relations": "lives\nnear|near|"}, r"relations.tsv:1: wanted 2 or 3 columns .* found 1"),
}


@pytest.mark.parametrize(("files", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_by_file_and_line(write_graph: Write, files: dict[str, str], message: str) -> None:
    parts = {"train": TRAIN, "entities": ENTITIES, "relations": RELATIONS, **files}
    with pytest.raises(GraphError, match=message):
        read_graph(write_graph(**parts))


def test_an_empty_cell_is_refused_where_ids_are_the_texts(write_graph: Write) -> None:
    with pytest.raises(GraphError, match=r"train.tsv:2: the entity is empty"):
        read_graph(write_graph(train="a|r|b\na|r| \n"))


def test_five_problems_are_spelled_out_and_the_rest_is_counted(write_graph: Write) -> None:
    with pytest.raises(GraphError) as caught:
        read_graph(write_graph(train="x|lives|b\n" * 12, entities=ENTITIES))
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[4].startswith("train.tsv:5: entity 'x'")
    assert lines[5] == "... and 7 more problems like these."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tr\tb\nZürich\tr\tb\n".encode("latin-1"), r"train.tsv:2: wanted UTF-8 text, found 0xfc at byte 7"),
        ("a\tr\tb\n".encode("utf-16"), r"train.tsv:1: wanted UTF-8 text, found UTF-16 at byte 0"),
    ],
)
def test_another_encoding_is_named_with_line_and_byte(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.tsv").write_bytes(content)
    with pytest.raises(GraphError, match=message):
        read_graph(tmp_path)


def test_a_folder_that_is_no_graph_says_what_is_wanted(write_graph: Write, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"there is no such folder. Give a folder with train.tsv"):
        read_graph(tmp_path / "nowhere")
    inner = write_graph("outer/inner", train=TRAIN)
    with pytest.raises(GraphError, match=r"no train.tsv or train.txt.* Graphs inside it: inner"):
        read_graph(inner.parent)
    with pytest.raises(GraphError, match="this is a file"):
        read_graph(inner / "train.tsv")
    (inner / "train.txt").write_text("a\tr\tb\n")
    with pytest.raises(GraphError, match=r"found train.tsv and train.txt. Remove one"):
        read_graph(inner)


def test_a_file_that_cannot_be_read_says_why(write_graph: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_graph(train=TRAIN)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(GraphError, match=r"train.tsv: cannot be read, Permission denied. Check"):
        read_graph(folder)


# The counts are those of the README beside the data: train, valid, test, entities, relations.
COUNTS = {
    "WN18RR": (86835, 3034, 3134, 40943, 11),
    "FB15k-237": (272115, 17535, 20466, 14541, 237),
    "CoDEx-S": (32888, 1827, 1828, 2034, 42),
    "UMLS": (5216, 652, 661, 135, 46),
    "inductive/WN18RR_v1": (5410, 630, 638, 2746, 9),
    "inductive/WN18RR_v1_ind": (1618, 185, 188, 922, 8),
}


@pytest.mark.parametrize("folder", COUNTS)
def test_published_graphs_have_their_published_counts(data_folder: Path, folder: str) -> None:
    start = time.perf_counter()
    graph = read_graph(data_folder / folder)
    assert time.perf_counter() - start < 10  # about 1 s for the largest
    sizes = [len(graph.splits[split]) for split in ("train", "valid", "test")]
    assert (*sizes, graph.num_entities, graph.num_relations) == COUNTS[folder]
    assert all("\\n" not in text and "\n" not in text for text in graph.entity_descriptions)
