"""Read a knowledge graph from a folder of tab-separated files; a mistake is named by file and line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pykalm.errors import GraphError
from pykalm.graph.graph import SPLITS, IntArray, KnowledgeGraph
from pykalm.graph.tables import ENDINGS, find_table, raise_problems, read_rows

_TRIPLE_COLUMNS = "head, relation, tail"
_WANTED = (
    "a folder with train.tsv (head, relation, tail separated by tabs) "
    "and, if there are any, valid, test, entities and relations"
)


def read_graph(folder: Path, name: str | None = None) -> KnowledgeGraph:
    """Read the graph in `folder`; its name is the folder's unless one is given.

    Files end in .tsv or .txt and are UTF-8, tab-separated:

    - train (wanted), valid, test: head, relation, tail, by id; {valid,test}_negatives: false triples.
    - entities: id, name, description, which may be left out.
    - relations: id, text, inverse text, which may be left out: then "inverse of TEXT".

    Without an entities or relations file the ids, exactly as they are, serve as texts, in the order in which
    train, valid and test first name them. A line break written as backslash-n in a text becomes a space: a
    line end would stop a generated answer. Raises GraphError with file, line and remedy, five at once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "this is a file" if folder.exists() else "there is no such folder"
        raise GraphError(f"{folder}: {found}. Give {_WANTED}.")
    tables = {stem: path for stem in SPLITS if (path := find_table(folder, stem))}
    if "train" not in tables:
        inside = sorted(path.parent.name for ending in ENDINGS for path in folder.glob(f"*/train{ending}"))
        hint = f" Graphs inside it: {', '.join(inside)}." if inside else ""
        raise GraphError(f"{folder}: there is no train.tsv or train.txt. Give {_WANTED}.{hint}")
    rows = {split: read_rows(path, (3,), _TRIPLE_COLUMNS) for split, path in tables.items()}
    entities = _read_texts(find_table(folder, "entities"), "name, description") or _texts_from(rows, (0, 2))
    relations = _read_texts(find_table(folder, "relations"), "text, inverse text") or _texts_from(rows, (1,))
    splits = {split: _to_positions(rows[split], entities, relations, file=tables[split].name) for split in rows}
    return KnowledgeGraph(
        name=name or folder.resolve().name,
        entity_ids=entities.ids,
        entity_names=entities.texts,
        entity_descriptions=entities.details,
        relation_ids=relations.ids,
        relation_texts=relations.texts,
        inverse_texts=tuple(map(_inverse_text, relations.texts, relations.details)),
        splits=splits,
        negatives=_read_negatives(folder, entities, relations),
    )


@dataclass(frozen=True)
class _Texts:
    """Hold the lines of an entities or relations file, or what the triples themselves say in its stead."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    details: tuple[str, ...]  # description of an entity, inverse text of a relation; may be empty
    positions: Mapping[str, int]
    file: str


def _read_texts(path: Path | None, columns: str) -> _Texts | None:
    """Read id, text and detail of every line; raises GraphError for a repeated id, an empty id or text."""
    if path is None:
        return None
    rows = read_rows(path, (2, 3), f"id, {columns}")
    ids = tuple(row[0] for row in rows)
    texts = tuple(_one_line(row[1]) for row in rows)
    positions: dict[str, int] = {}
    problems = []
    for index, (entry, text) in enumerate(zip(ids, texts, strict=True)):
        first, place = positions.setdefault(entry, index), f"{path.name}:{index + 1}"
        if first != index:
            problems.append(f"{place}: id '{entry}' stands in line {first + 1} already. Remove one of the two.")
        elif not entry.strip():
            problems.append(f"{place}: the id is empty (text '{text}'). Write one or remove the line.")
        elif not text:
            problems.append(f"{place}: the {columns.split(',')[0]} of '{entry}' is empty. Write one.")
    raise_problems(problems)
    details = tuple(_one_line(row[2]) if len(row) > 2 else "" for row in rows)
    return _Texts(ids, texts, details, positions, path.name)


def _texts_from(rows: Mapping[str, Sequence[Sequence[str]]], columns: Sequence[int]) -> _Texts:
    """Take the ids in some columns of all splits as texts, in order of first appearance."""
    every = (row for split in SPLITS for row in rows.get(split, ()))
    ids = tuple(filter(str.strip, dict.fromkeys(row[column] for row in every for column in columns)))
    return _Texts(ids, ids, ("",) * len(ids), {entry: index for index, entry in enumerate(ids)}, "the splits")


def _to_positions(rows: Sequence[Sequence[str]], entities: _Texts, relations: _Texts, *, file: str) -> IntArray:
    """Turn rows of ids into (N, 3) positions; raises GraphError for an id that is empty or not listed."""
    parts = (("entity", entities), ("relation", relations), ("entity", entities))
    triples = np.empty((len(rows), 3), dtype=np.int64)
    for column, (_, texts) in enumerate(parts):
        found = (texts.positions.get(row[column], -1) for row in rows)
        triples[:, column] = np.fromiter(found, dtype=np.int64, count=len(rows))
    problems = []
    for row, column in np.argwhere(triples < 0):
        (kind, texts), cell = parts[column], rows[row][column]
        missing = (
            f"{kind} '{cell}' is not in {texts.file} ({len(texts.ids)} known)"
            if cell.strip()
            else f"the {kind} is empty"
        )
        problems.append(f"{file}:{row + 1}: {missing}. Fix the line or add the {kind}.")
    raise_problems(problems)
    return triples


def _read_negatives(folder: Path, entities: _Texts, relations: _Texts) -> dict[str, IntArray]:
    """Read the false triples that a graph ships for valid and test."""
    negatives = {}
    for split in ("valid", "test"):
        path = find_table(folder, f"{split}_negatives")
        if path is not None:
            rows = read_rows(path, (3,), _TRIPLE_COLUMNS)
            negatives[split] = _to_positions(rows, entities, relations, file=path.name)
    return negatives


def _inverse_text(text: str, inverse: str) -> str:
    return inverse or f"inverse of {text}"


def _one_line(text: str) -> str:
    return " ".join(text.replace("\\n", "\n").split()) if "\\n" in text else text.strip()
