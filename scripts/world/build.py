"""Build the bundled graph `world` from the tables in this folder; the same tables give the same bytes.

Usage: python scripts/world/build.py [--to FOLDER]   (default: src/pykalm/graph/world)
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "src" / "pykalm" / "graph" / "world"
SEED = "world-1"
HELD_OUT = 0.1  # of the triples of every relation, once for valid and once for test

RELATIONS = {
    "has_capital": ("has capital", "is the capital of"),
    "major_city": ("has major city", "is a major city of"),
    "located_in": ("is located in", "contains"),
    "borders": ("shares a border with", "shares a border with"),
    "official_language": ("has official language", "is an official language of"),
    "currency": ("uses the currency", "is the currency of"),
    "member_of": ("is a member of", "has as member"),
    "independent_from": ("became independent from", "formerly ruled"),
    "shore_on": ("has a shore on", "washes the shore of"),
    "flows_through": ("flows through", "is crossed by"),
    "has_part_of": ("holds part of", "extends into"),
    "stands_beside": ("stands beside", "has on its banks"),
    "language_family": ("belongs to the family", "includes the language"),
    "written_in": ("is written in", "is used to write"),
    "divided_into": ("is divided into", "is a fraction of"),
}
MEMBERSHIP = {"organisation": "member_of", "sea": "shore_on", "lake": "shore_on", "area": "has_part_of"}
STATES = {"SUN": "Soviet Union", "YUG": "Yugoslavia", "OTT": "Ottoman Empire", "CSK": "Czechoslovakia"}
PARTS = {  # who touches the part touches the whole: such a fact stays in train
    "sea/gulf-of-finland": "sea/baltic-sea",
    "sea/gulf-of-bothnia": "sea/baltic-sea",
    "sea/sea-of-azov": "sea/black-sea",
    "area/tatra-mountains": "area/carpathians",
}


class Entity(NamedTuple):
    """A row of entities.tsv."""

    id: str
    name: str
    description: str


class Triple(NamedTuple):
    """A fact: head, relation and tail are ids."""

    head: str
    relation: str
    tail: str


def read_table(name: str, folder: Path = HERE) -> list[dict[str, str]]:
    """Read a tab-separated table with a header line."""
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def make_id(kind: str, name: str) -> str:
    """Spell an id from a kind and a name: `city/sao-tome`."""
    plain = unicodedata.normalize("NFKD", name.translate(str.maketrans("łđøʻ", "ldo ")))
    plain = plain.replace("ʻ", "").encode("ascii", "ignore").decode().lower().replace("'", "")
    return f"{kind}/{re.sub(r'[^a-z0-9]+', '-', plain).strip('-')}"


def collect_entities() -> tuple[list[Entity], dict[str, str]]:
    """List the entities of all tables, and the id of each name, country code and currency code."""
    entities: list[Entity] = []
    ids: dict[str, str] = {}
    kinds = {
        "countries.tsv": "country",
        "cities.tsv": "city",
        "currencies.tsv": "currency",
        "languages.tsv": "language",
        "groups.tsv": "",
        "topics.tsv": "",
    }
    for table, kind in kinds.items():
        for row in read_table(table):
            entity_id = make_id(kind or row["kind"], row["name"])
            for key in (row["name"], row.get("code", "")):
                if key and ids.setdefault(key, entity_id) != entity_id:
                    raise ValueError(f"{table}: {key!r} is both {ids[key]} and {entity_id}. Rename one.")
            entities.append(Entity(entity_id, row["name"], row["description"] + "."))
    ids.update({code: ids[name] for code, name in STATES.items()})
    return sorted(entities), ids


def collect_triples(ids: dict[str, str]) -> list[Triple]:
    """Turn the tables into facts; a border is kept in both directions, as both countries list it."""
    triples: list[Triple] = []

    def add(head: str, relation: str, tails: list[str]) -> None:
        triples.extend(Triple(ids[head], relation, ids[tail]) for tail in tails if tail)

    for row in read_table("countries.tsv"):
        add(row["name"], "located_in", [row["located_in"]])
        add(row["name"], "borders", row["neighbours"].split())
        add(row["name"], "official_language", row["languages"].split(";"))
        add(row["name"], "currency", row["currencies"].split())
        add(row["name"], "independent_from", row["independent_from"].split())
    for row in read_table("cities.tsv"):
        add(row["name"], "stands_beside", row["beside"].split(";"))
        for column, relation in (("capital_of", "has_capital"), ("major_city_of", "major_city")):
            if row[column]:
                add(row[column], relation, [row["name"]])
    for row in read_table("groups.tsv"):
        for code in row["members"].split():
            if row["kind"] == "river":
                add(row["name"], "flows_through", [code])
            else:
                add(code, MEMBERSHIP[row["kind"]], [row["name"]])
    for row in read_table("topics.tsv"):
        add(row["name"], "located_in", [row["located_in"]])
    for row in read_table("languages.tsv"):
        add(row["name"], "language_family", [row["family"]])
        add(row["name"], "written_in", [row["script"]])
    for row in read_table("currencies.tsv"):
        add(row["name"], "divided_into", [row["divided_into"]])
    return sorted(triples)


def check_facts(triples: list[Triple]) -> None:
    """Raise ValueError for a fact told twice, or a border that only one side lists."""
    known = set(triples)
    twice = [triple for triple, count in Counter(triples).items() if count > 1]
    one_sided = [t for t in known if t.relation == "borders" and t._replace(head=t.tail, tail=t.head) not in known]
    if twice or one_sided:
        raise ValueError(f"Facts told twice: {twice}; borders that one side lacks: {one_sided}. Fix the tables.")


def find_implied(triples: list[Triple]) -> set[Triple]:
    """Find the facts that follow from others: the water beside a city of a country, the whole of a part."""
    homes = {t.tail: t.head for t in triples if t.relation in ("has_capital", "major_city")}
    implied = {t._replace(tail=PARTS[t.tail]) for t in triples if t.tail in PARTS}
    for city, relation, water in triples:
        if relation == "stands_beside":
            implied |= {Triple(homes[city], "shore_on", water), Triple(water, "flows_through", homes[city])}
    return implied


def split(triples: list[Triple]) -> dict[str, list[Triple]]:
    """Split by relation into train, valid and test: about 80, 10 and 10 percent of each.

    The unit is a pair of entities: all facts about one pair, so also a fact and its twin or inverse, go to
    the same split. Pairs come in the order of a seeded hash; one stays in train if a fact of it follows
    from others, or if an entity of it would otherwise keep no train triple.
    """
    implied = find_implied(triples)
    pairs: dict[tuple[str, ...], list[Triple]] = defaultdict(list)
    for triple in triples:
        pairs[tuple(sorted((triple.head, triple.tail)))].append(triple)
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256("\t".join((SEED, *pair)).encode()).hexdigest())
    left = Counter(entity for triple in triples for entity in (triple.head, triple.tail))
    quota = {relation: round(count * HELD_OUT) for relation, count in Counter(t.relation for t in triples).items()}
    splits: dict[str, list[Triple]] = {"train": [], "valid": [], "test": []}
    taken: Counter[tuple[str, str]] = Counter()
    for pair in ordered:
        facts = pairs[pair]
        goal = facts[0].relation
        free = implied.isdisjoint(facts) and all(left[entity] > len(facts) for entity in pair)
        open_splits = [name for name in ("test", "valid") if taken[name, goal] < quota[goal]]
        name = open_splits[0] if free and open_splits else "train"
        splits[name].extend(facts)
        if name != "train":
            taken.update((name, fact.relation) for fact in facts)
            left.subtract(entity for fact in facts for entity in (fact.head, fact.tail))
    return {name: sorted(facts) for name, facts in splits.items()}


def build(to: Path) -> None:
    """Write the graph folder: entities, relations and three splits as tab-separated UTF-8 lines."""
    entities, ids = collect_entities()
    triples = collect_triples(ids)
    check_facts(triples)
    files: dict[str, list[tuple[str, ...]]] = {
        "entities": [tuple(entity) for entity in entities],
        "relations": [(relation, *texts) for relation, texts in RELATIONS.items()],
        **{name: [tuple(t) for t in facts] for name, facts in split(triples).items()},
    }
    to.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join("\t".join(row) + "\n" for row in rows)
        (to / f"{name}.tsv").write_bytes(text.encode("utf-8"))
        print(f"{name}.tsv: {len(rows)} lines")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=TARGET, help="folder to write (default: %(default)s)")
    build(parser.parse_args().to)


if __name__ == "__main__":
    main()
