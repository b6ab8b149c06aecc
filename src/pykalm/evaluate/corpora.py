"""Plain texts that a language model is measured on: WikiText where $KALM_DATA holds it, or any text file.

WikiText writes "5 @,@ 000" and "film , and": its pages are read with the spaces of ordinary writing, as the field does, while
words and bytes are counted in the file's own text, so that perplexities per word and byte compare between models.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pykalm.errors import UsageError
from pykalm.graph.catalogue import search_path

WIKITEXT = {"wikitext2": "wikitext/wikitext2.raw.test.txt", "wikitext103": "wikitext/wikitext103.test.txt"}

SENTENCE_WORDS = (6, 40)
"""Words of a sentence, at least and at most."""

_PAGE_TITLE = re.compile(r"^(?= = [^=\n](?:.*[^=])? = $)", re.MULTILINE)
_HEADING = re.compile(r"\s*=.*=\s*")
_SENTENCE_END = re.compile(r"(?<= [.?!]) ")
_PIECE = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Document:
    """Hold a text as its file has it; `text` is what a model reads."""

    original: str
    is_wikitext: bool = False

    @property
    def text(self) -> str:
        """Return the text with the spaces of ordinary writing."""
        return detokenized(self.original) if self.is_wikitext else self.original

    @property
    def num_words(self) -> int:
        """Count what white space separates, as lm-eval does: white space at an end adds an empty word."""
        return len(re.split(r"\s+", self.original))

    @property
    def num_bytes(self) -> int:
        """Count the bytes of the original in UTF-8."""
        return len(self.original.encode("utf-8"))

    def cut(self, max_tokens: int, count_tokens: Callable[[str], int]) -> "Document":
        """Return the longest beginning of whole words that has at most so many tokens; the whole text where it has."""
        if count_tokens(self.text) <= max_tokens:
            return self
        pieces = _PIECE.findall(self.original)

        def beginning(words: int) -> Document:
            return Document("".join(pieces[:words]), self.is_wikitext)

        counts = range(len(pieces) + 1)
        return beginning(bisect_right(counts, max_tokens, key=lambda words: count_tokens(beginning(words).text)) - 1)


@dataclass(frozen=True)
class Corpus:
    """Hold the documents of a text under its name; each is read from its own beginning."""

    name: str
    documents: tuple[Document, ...]


def read_corpus(source: str | Path) -> Corpus:
    """Read `wikitext2` or `wikitext103` (test, a page a document) from $KALM_DATA, or a text file as one document.

    Raises UsageError where there is none, or where it is empty or not UTF-8.
    """
    path = find_corpus(source)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: wanted a text file in UTF-8, found that it cannot be read: {error}.") from error
    if not content.strip():
        raise UsageError(f"{path}: wanted a text, found an empty file. Give another one.")
    if source not in WIKITEXT:
        return Corpus(path.stem, (Document(content),))
    return Corpus(str(source), tuple(Document(page, is_wikitext=True) for page in wikitext_pages(content)))


def find_corpus(source: str | Path) -> Path:
    """Return the file of a text, by its name in the folders of $KALM_DATA or by its path; raises UsageError."""
    named = WIKITEXT.get(str(source))
    places = [folder / named for folder in search_path()] if named else [Path(source)]
    for place in places:
        if place.is_file():
            return place
    if named:
        raise UsageError(
            f"wanted the text {source!r} on this machine, found no {named} in the folders of $KALM_DATA. Put it there, or "
            "give the path of a text file."
        )
    raise UsageError(f"wanted a text file or one of {', '.join(WIKITEXT)}; found no file {str(source)!r} here.")


def wikitext_pages(content: str) -> list[str]:
    """Cut WikiText before every title of a page (" = Title = "); what comes before the first one is left out if blank.

    The line break before a title belongs to no page.
    """
    pages = _PAGE_TITLE.split(content)
    return [page.removesuffix("\n") for page in pages if page.strip()]


def detokenized(text: str) -> str:
    """Return a text of WikiText with the spaces of ordinary writing, by the rules that the field uses for perplexity."""
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        text = re.sub(inside, rf"{left}\1{right}", text)
    for depth in (4, 3, 2):
        text = text.replace(" ".join("=" * depth), "=" * depth)
    for written, meant in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(written, meant)
    return text


def read_sentences(source: str | Path, *, count: int, seed: int = 0) -> list[str]:
    """Draw up to `count` distinct sentences of a text by seed, in the order of the text, as ordinary writing.

    Those of 6 to 40 words without an unknown word (`<unk>`). Raises UsageError where there are fewer than two.
    """
    documents = read_corpus(source).documents
    found = list(dict.fromkeys(sentence for document in documents for sentence in _sentences(document)))
    if len(found) < 2:
        raise UsageError(
            f"{source}: wanted sentences of {SENTENCE_WORDS[0]} to {SENTENCE_WORDS[1]} words, found {len(found)}. "
            "Give a longer text."
        )
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[number] for number in sorted(chosen.tolist())]


def _sentences(document: Document) -> Sequence[str]:
    """Return the sentences of a document that may be drawn."""
    lines = (line for line in document.original.splitlines() if line.strip() and not _HEADING.fullmatch(line))
    ends = _SENTENCE_END if document.is_wikitext else re.compile(r"(?<=[.?!])\s+")
    pieces = [piece.strip() for line in lines for piece in ends.split(line)]
    least, most = SENTENCE_WORDS
    kept = [piece for piece in pieces if least <= len(piece.split()) <= most and "<unk>" not in piece]
    return [Document(f" {piece} ", document.is_wikitext).text.strip() for piece in kept]
