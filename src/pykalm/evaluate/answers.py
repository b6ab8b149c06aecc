"""Whether an answer is right: exactly, somewhere in what was written, or one of several right ones. EVALUATION.md §2."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pykalm.text.questions import NO, YES

Words = tuple[str, ...]

_ARTICLE = re.compile(r"(?:a|an|the)\s+(?=\S)")
_WORD = re.compile(r"\w+|[^\w\s]")

# Any of these is an answer; "true" alone is not, for the question has it too ("Is this true: ...").
SAYS = {"yes": YES, "this is true": YES, "no": NO, "this is not true": NO}


@dataclass(frozen=True)
class Score:
    """Say in which sense an answer is right. An empty one is wrong in all."""

    exact: bool
    contains: bool
    any_valid: bool


WRONG = Score(exact=False, contains=False, any_valid=False)


@lru_cache(maxsize=1 << 17)  # the names of right answers come again and again
def normalise(text: str) -> str:
    """Return a text in lower case, without outer punctuation, an article at its front and double spaces.

    What is punctuation only is kept: there are names such as "!!!". Equal letters of different code points become one.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _without_ends(_ARTICLE.sub("", _without_ends(folded), count=1))


def split_words(text: str) -> Words:
    """Return the words of a text, normalised; signs are words of their own, so that "C++" is not "C"."""
    return tuple(_WORD.findall(normalise(text)))


class Mentions:
    """Find the names that a text mentions: as whole words, from left to right, of several at one place the longest.

    "Niger" is not mentioned by "Nigeria", nor "Georgia" by "South Georgia" where that is a name.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {split_words(name) for name in names}
        self._lengths: dict[str, set[int]] = {}
        for words in self._names:
            self._lengths.setdefault(words[0], set()).add(len(words))

    def find(self, text: str) -> list[Words]:
        """Return the names, in words, in the order in which the text mentions them."""
        words, found, start = split_words(text), [], 0
        while start < len(words):
            name = self._longest_at(words, start)
            found += [name] if name else []
            start += max(1, len(name))
        return found

    def _longest_at(self, words: Words, start: int) -> Words:
        """Return the longest name that begins at a place in a text; () for none."""
        lengths = sorted(self._lengths.get(words[start], ()), reverse=True)
        names = (words[start : start + length] for length in lengths)
        return next((name for name in names if name in self._names), ())


class NameScorer:
    """Judge answers that name an entity, among all names of a graph."""

    def __init__(self, names: Sequence[str]) -> None:
        self._known = {normalise(name) for name in names}
        self._mentions = Mentions(names)

    def score(self, answer: str, gold: str, valid: Iterable[str]) -> Score:
        """Compare an answer with the entity of the triple, and with all entities known to answer the question."""
        if not answer.strip():
            return WRONG
        read, wanted = self._read(answer), normalise(gold)
        return Score(
            exact=read == wanted,
            contains=read == wanted or split_words(gold) in self._mentions.find(answer),
            any_valid=read in {normalise(name) for name in (gold, *valid)},
        )

    def _read(self, answer: str) -> str:
        """Return the name in an answer; one that goes on with a description, as texts of entities do, is its name."""
        whole = normalise(answer)
        name, colon, _ = answer.partition(": ")
        return normalise(name) if colon and whole not in self._known and name.strip() else whole


class ChoiceScorer:
    """Judge answers of tasks that offer choices. An answer that mentions several, as a repeated question does, is wrong.

    sayings: what stands for a choice when it is mentioned, and the choice; by default the choices themselves.
    """

    def __init__(self, choices: Sequence[str], sayings: Mapping[str, str] | None = None) -> None:
        meanings = sayings or {choice: choice for choice in choices}
        self._meanings = {split_words(saying): normalise(choice) for saying, choice in meanings.items()}
        self._mentions = Mentions(meanings)

    def score(self, answer: str, gold: str, valid: Iterable[str]) -> Score:
        """Compare an answer with the right choice, and with all right ones."""
        if not answer.strip():
            return WRONG
        read, wanted = normalise(answer), normalise(gold)
        said = {self._meanings[saying] for saying in self._mentions.find(answer)}
        return Score(
            exact=read == wanted,
            contains=read == wanted or said == {wanted},
            any_valid=read in {normalise(choice) for choice in (gold, *valid)},
        )


def truth_scorer() -> ChoiceScorer:
    """Return the judge of classifications: yes or no in any words that say one of them and not the other."""
    return ChoiceScorer((YES, NO), SAYS)


def _without_ends(text: str) -> str:
    """Return a text without outer punctuation, where anything is left then."""
    ends = {char for char in text if char.isspace() or unicodedata.category(char).startswith("P")}
    return text.strip("".join(sorted(ends))) or text
