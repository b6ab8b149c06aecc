"""The wordings of queries, candidates and completions: plain data, saved with every run."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields

from pykalm.errors import ConfigError

FIELDS = ("head", "relation", "tail", "entity", "name", "description")
_FIELD = re.compile(r"(\s*)\{(" + "|".join(FIELDS) + r")\}")


@dataclass(frozen=True)
class Templates:
    """Bundle the wordings of one run. Braces around a field name stand for its text; all else is literal.

    entity: D(e) of an entity with a description (without one, D(e) is the name); query: `f(h, r)`, pooled at its last
    token; candidate: `f(t)`, likewise; completion: what the model reads before it writes the answer; answer: what it
    then writes, before the end token. METHOD.md §1–3.
    """

    name: str
    entity: str
    query: str
    candidate: str
    completion: str
    answer: str

    def to_dict(self) -> dict[str, str]:
        """Return the wordings as plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, str]) -> "Templates":
        """Read the wordings back; raises ConfigError when a wording is missing or unknown."""
        wanted = [field.name for field in fields(Templates)]
        if sorted(data) != sorted(wanted):
            raise ConfigError(
                f"templates: wanted the wordings {wanted}, found {sorted(data)}. Restore the missing ones."
            )
        if wrong := [name for name in wanted if not isinstance(data[name], str)]:
            raise ConfigError(f"templates: wanted texts, found other values under {wrong}. Restore them.")
        return Templates(**dict(data))


PUBLISHED = Templates(
    name="published",
    entity="{name}: {description}",
    query="[ {head}, {relation} ]",
    candidate="{ {entity} }",
    completion="Given the head entity and relation, write a tail entity that completes the triple: {head}, {relation}\n",
    answer="{entity}",
)

# Query, candidate and completion of an entity begin with the same tokens, and the completion continues its query: the
# entity is computed once for all triples it is in, and an answer costs nothing but its own tokens. METHOD.md §6.
PREFIX_SHARING = Templates(
    name="prefix-sharing",
    entity="{name}: {description}",
    query="[ {head}, {relation} ]",
    candidate="[ {entity} ]",
    completion="[ {head}, {relation} ]",
    answer=" {name}",
)

TEMPLATES = {templates.name: templates for templates in (PUBLISHED, PREFIX_SHARING)}


def parts(wording: str) -> Iterator[tuple[str, str]]:
    """Cut a wording into pairs (literal, field), in order; the last pair has an empty field when it ends in a literal.

    White space before a field belongs to the literal here; `split_space` hands it to the field, because tokenizers
    join a space to the word after it.
    """
    position = 0
    for match in _FIELD.finditer(wording):
        yield wording[position : match.start(2) - 1], match.group(2)
        position = match.end()
    if position < len(wording):
        yield wording[position:], ""


def split_space(literal: str, field: str) -> tuple[str, str]:
    """Return (literal without its trailing spaces, those spaces) before a field, (literal, "") at the end."""
    if not field:
        return literal, ""
    bare = literal.rstrip(" ")
    return bare, literal[len(bare) :]
