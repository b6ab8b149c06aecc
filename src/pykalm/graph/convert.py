"""Turn the published layouts of well-known graphs into our folder layout: one small function per layout."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pykalm.errors import FetchError
from pykalm.graph.tables import read_rows, read_text

_SPLITS = ("train", "valid", "test")


def convert_wordnet(source: Path, to: Path) -> None:
    """Write WN18RR: splits of ConvE, and texts "lemma, gloss" of KG-BERT, cut at the first comma."""
    _copy_splits(source, to)
    pairs = [row[1].partition(", ") for row in _texts(source / "entity2text.txt")]
    ids = [row[0] for row in _texts(source / "entity2text.txt")]
    _write(
        to / "entities.tsv",
        ([entry, lemma, gloss] for entry, (lemma, _, gloss) in zip(ids, pairs, strict=True)),
    )
    _write(to / "relations.tsv", ([*row, ""] for row in _texts(source / "relation2text.txt")))


def convert_named(source: Path, to: Path) -> None:
    """Write UMLS: splits of ConvE, and names of KG-BERT; there are no descriptions."""
    _copy_splits(source, to)
    _write(to / "entities.tsv", ([*row, ""] for row in _texts(source / "entity2text.txt")))
    _write(to / "relations.tsv", ([*row, ""] for row in _texts(source / "relation2text.txt")))


def convert_freebase(source: Path, to: Path) -> None:
    """Write FB15k-237: splits of ConvE, and names and long texts of KG-BERT, for the entities used."""
    used = {cell for rows in _copy_splits(source, to).values() for row in rows for cell in (row[0], row[2])}
    long = dict(_texts(source / "entity2textlong.txt"))
    names = [row for row in _texts(source / "entity2text.txt") if row[0] in used]
    _write(to / "entities.tsv", ([entry, name, long.get(entry, "")] for entry, name in names))
    _write(to / "relations.tsv", ([*row, ""] for row in _texts(source / "relation2text.txt")))


def convert_codex(source: Path, to: Path) -> None:
    """Write CoDEx-S: splits, hard negatives, and English labels and descriptions, for the entities used only.

    An entity without an English label goes by its id.
    """
    splits = _copy_splits(source, to)
    for split in ("valid", "test"):
        splits[f"{split}_negatives"] = _copy(source / f"{split}_negatives.txt", to / f"{split}_negatives.tsv")
    rows = [row for part in splits.values() for row in part]
    used = sorted({cell for row in rows for cell in (row[0], row[2])}, key=_wikidata_number)
    entities, relations = _labels(source / "entities.json"), _labels(source / "relations.json")
    texts = [(entry, entities.get(entry, {})) for entry in used]
    lines = [[entry, text.get("label") or entry, text.get("description") or ""] for entry, text in texts]
    _write(to / "entities.tsv", lines)
    kept = sorted({row[1] for row in rows}, key=_wikidata_number)
    lines = [[entry, relations.get(entry, {}).get("label") or entry, ""] for entry in kept]
    _write(to / "relations.tsv", lines)


def _copy_splits(source: Path, to: Path) -> dict[str, list[list[str]]]:
    return {split: _copy(source / f"{split}.txt", to / f"{split}.tsv") for split in _SPLITS}


def _copy(source: Path, to: Path) -> list[list[str]]:
    rows = read_rows(source, (3,), "head, relation, tail")
    _write(to, rows)
    return rows


def _texts(path: Path) -> list[list[str]]:
    return read_rows(path, (2,), "id, text")


def _labels(path: Path) -> dict[str, dict[str, str]]:
    try:
        labels = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise FetchError(f"{path.name}:{error.lineno}: is not JSON ({error.msg}). Fetch the graph again.") from error
    if not isinstance(labels, dict) or not all(isinstance(entry, dict) for entry in labels.values()):
        raise FetchError(f"{path.name}: wanted an object of objects, by id. Fetch the graph again.")
    return labels


def _wikidata_number(entry: str) -> tuple[int, str]:
    return (int(entry[1:]) if entry[1:].isdigit() else 0, entry)


def _write(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write rows as tab-separated UTF-8; a tab or line break inside a cell becomes a space."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write("\t".join(" ".join(cell.split()) for cell in row) + "\n")
