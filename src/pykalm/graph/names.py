"""Find what a person means: an entity or relation by its id, its exact name or its name in any case."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

How = Literal["id", "name", "case-insensitive name"]

_SHORTLIST = 200  # names that difflib compares letter by letter; the rest is ruled out by their letter pairs


@dataclass(frozen=True)
class EntityMatch:
    """Say which entity was taken, how it was found, and which others bear the same name."""

    entity: int
    how: How
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class NameIndex:
    """Hold the positions of every id (one each), name and casefolded name (one or more each)."""

    ids: Mapping[str, int]
    names: Mapping[str, tuple[int, ...]]
    folded: Mapping[str, tuple[int, ...]]

    def find(self, text: str) -> tuple[How, tuple[int, ...]] | None:
        """Return how `text` was found and at which positions (ascending), or None; an id wins over a name."""
        if text in self.ids:
            return "id", (self.ids[text],)
        if text in self.names:
            return "name", self.names[text]
        folded = _fold(text)
        return ("case-insensitive name", self.folded[folded]) if folded in self.folded else None

    def nearest(self, text: str, count: int = 3) -> list[str]:
        """Return up to `count` names or ids that look like `text`, the most similar first."""
        return nearest(text, [*self.names, *self.ids], count)


def build_name_index(ids: Sequence[str], names: Sequence[str]) -> NameIndex:
    """Index N ids (distinct) and their N names, which may repeat."""
    return NameIndex(
        ids={text: position for position, text in enumerate(ids)},
        names=_positions(names),
        folded=_positions(map(_fold, names)),
    )


def nearest(text: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` choices that look like `text`; over 100,000 names take less than a second.

    A first sieve ranks the choices by shared letter pairs (Dice), a second compares the best with difflib.
    """
    wanted, pairs = _fold(text), _letter_pairs(_fold(text))
    originals: dict[str, str] = {}
    for choice in choices:
        originals.setdefault(_fold(choice), choice)
    scored = []
    for folded in originals:
        if abs(len(folded) - len(wanted)) <= len(wanted):  # difflib would refuse the others
            other = _letter_pairs(folded)
            scored.append((2 * len(pairs & other) / (len(pairs) + len(other)), folded))
    shortlist = [folded for _, folded in sorted(scored, key=lambda item: (-item[0], item[1]))[:_SHORTLIST]]
    return [originals[folded] for folded in difflib.get_close_matches(wanted, shortlist, n=count, cutoff=0.5)]


def suggestion(found: Sequence[str]) -> str:
    """Return the sentence " The nearest are 'France', 'Frankfurt'." with a leading space, or "" for none."""
    return f" The nearest {'is' if len(found) == 1 else 'are'} {', '.join(map(repr, found))}." if found else ""


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _letter_pairs(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[start : start + 2] for start in range(len(padded) - 1)}


def _positions(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for position, text in enumerate(texts):
        found.setdefault(text, []).append(position)
    return {text: tuple(positions) for text, positions in found.items()}
