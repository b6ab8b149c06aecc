"""Plain texts: pages, words and bytes by hand counts; the spaces of ordinary writing; sentences; what is not there."""

from pathlib import Path

import pytest

from pykalm.errors import UsageError
from pykalm.evaluate.corpora import Document, detokenized, read_corpus, read_sentences, wikitext_pages

PAGES = (
    " \n = First Page = \n \n One two @-@ three . \n = = Part = = \n \n It was 5 @,@ 000 , he said . \n"
    " \n = Second ( page ) = \n \n The end . \n"
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a small WikiText the one of $KALM_DATA."""
    for name in ("wikitext2.raw.test.txt", "wikitext103.test.txt"):
        (tmp_path / "wikitext").mkdir(exist_ok=True)
        (tmp_path / "wikitext" / name).write_text(PAGES, encoding="utf-8")
    monkeypatch.setenv("KALM_DATA", str(tmp_path))
    return tmp_path


def test_a_page_begins_with_its_title_and_parts_of_it_do_not() -> None:
    pages = wikitext_pages(PAGES)
    assert pages == [
        " = First Page = \n \n One two @-@ three . \n = = Part = = \n \n It was 5 @,@ 000 , he said . \n ",
        " = Second ( page ) = \n \n The end . ",
    ]


def test_wikitext_is_read_with_the_spaces_of_ordinary_writing() -> None:
    text = detokenized(
        " \" Oh , \" she said ; it 's 3 @.@ 5 ( or 4 ) cars ' length , e.g. at 5 ° C . \n = = Part = = \n"
    )
    assert text == " \"Oh,\" she said; it's 3.5 (or 4) cars' length, e.g. at 5°C. \n== Part ==\n".replace(". \n", ".\n")


def test_words_and_bytes_are_those_of_the_original(data: Path) -> None:
    corpus = read_corpus("wikitext2")
    assert corpus.name == "wikitext2"
    second = corpus.documents[1]
    # An empty word at both ends, as lm-eval counts: "", =, Second, (, page, ), =, The, end, ., "".
    assert second.num_words == 11
    assert second.num_bytes == len(" = Second ( page ) = \n \n The end . ")
    assert second.text == " = Second (page) =\n\nThe end. "


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "é.txt").write_text("a , b\n = c = \nü", encoding="utf-8")
    (document,) = read_corpus(tmp_path / "é.txt").documents
    assert document.text == "a , b\n = c = \nü"
    assert (document.num_words, document.num_bytes) == (7, len("a , b\n = c = \nu") + 1)


def test_a_cut_is_the_longest_beginning_of_whole_words() -> None:
    document = Document("one two three  four")
    kept = {limit: document.cut(limit, len).original for limit in (2, 3, 8, 13, 14, 18, 19)}
    assert kept == {2: "", 3: "one", 8: "one two", 13: "one two three", 14: "one two three", 18: "one two three",
                    19: "one two three  four"}  # fmt: skip
    assert document.cut(100, len) is document


def test_sentences_are_drawn_by_seed_without_headings_and_unknown_words(tmp_path: Path) -> None:
    lines = [
        f" Sentence number {i} has seven words . It has <unk> words but it is left out . Short . \n" for i in range(9)
    ]
    path = tmp_path / "wikitext" / "wikitext103.test.txt"
    path.parent.mkdir()
    path.write_text(" \n = A Title of six whole words = \n" + "".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KALM_DATA", str(tmp_path))
        drawn = read_sentences("wikitext103", count=4, seed=1)
        assert drawn == read_sentences("wikitext103", count=4, seed=1)
        assert read_sentences("wikitext103", count=50) == [f"Sentence number {i} has seven words." for i in range(9)]
    assert len(drawn) == 4


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_DATA", str(tmp_path))
    with pytest.raises(UsageError, match=r"no wikitext/wikitext2\.raw\.test\.txt in the folders of \$KALM_DATA"):
        read_corpus("wikitext2")
    with pytest.raises(UsageError, match="one of wikitext2, wikitext103"):
        read_corpus("wikitext3")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, found in (("empty.txt", "empty file"), ("binary.txt", "cannot be read")):
        with pytest.raises(UsageError, match=found):
            read_corpus(tmp_path / name)
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    with pytest.raises(UsageError, match="wanted sentences"):
        read_sentences(tmp_path / "short.txt", count=3)


def test_wikitext_2_has_62_pages(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the field counts in its test part; every word of the file is in one of them, and a blank at each end."""
    monkeypatch.setenv("KALM_DATA", str(data_folder))
    for name, file in (("wikitext2", "wikitext2.raw.test.txt"), ("wikitext103", "wikitext103.test.txt")):
        documents = read_corpus(name).documents
        content = (data_folder / "wikitext" / file).read_text(encoding="utf-8")
        assert len(documents) == 62
        assert sum(document.num_words - 2 for document in documents) == len(content.split())
