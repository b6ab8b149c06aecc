"""The vectors of all entities of a graph, kept with the fingerprint of what made them.

Entities with the same text share one row, so that their scores are equal to the last bit, however a matrix
product is cut into blocks: ties are counted, not broken by rounding.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pykalm.errors import ModelError, RunError
from pykalm.files import replace_file
from pykalm.graph.graph import IntArray
from pykalm.model.encoder import Progress
from pykalm.model.products import exact_float32, products
from pykalm.text.texts import Texts, TokenIds, sorted_rows

FORMAT = 1
VECTORS_FILE = "entities.safetensors"
DESCRIPTION_FILE = "index.json"
VECTORS_AT_ONCE = 1 << 16
KEY_COLUMNS = 8


class TextEncoder(Protocol):
    """Turn token sequences into unit vectors (model.encoder.Encoder does)."""

    def embed(self, texts: Texts | Sequence[TokenIds], *, progress: Progress | None = None) -> Tensor: ...

    def fingerprint(self) -> str: ...


class EntityTexts(Protocol):
    """Give the token sequence of every entity (text.verbalize.Verbalizer does)."""

    def candidates(self, entities: IntArray) -> Texts | Sequence[TokenIds]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True, eq=False)
class EntityIndex:
    """Hold the distinct vectors (U, D) of E entities, unit rows in float32 or float16; entity e has row_of_entity[e]."""

    vectors: Tensor
    row_of_entity: IntArray
    fingerprint: str

    @property
    def num_entities(self) -> int:
        """Count the entities, which may be more than the distinct vectors."""
        return len(self.row_of_entity)

    def scores(self, query: Tensor) -> Tensor:
        """Score every entity for query (B, D); returns (B, E), the cosine for unit rows."""
        return entity_scores(query, self.vectors, torch.from_numpy(self.row_of_entity))

    def require_fresh(self, encoder: TextEncoder, texts: EntityTexts) -> None:
        """Raise RunError unless the index was made by this encoder from these texts."""
        wanted = index_fingerprint(encoder, texts, dtype=self.vectors.dtype)
        _require_fingerprint(self.fingerprint, wanted, "entity index")

    def save(self, folder: Path) -> None:
        """Write the index; an interrupted save leaves the previous index or one that `load` refuses."""
        rows = torch.from_numpy(self.row_of_entity)
        tensors = {"vectors": self.vectors.contiguous(), "row_of_entity": rows}
        replace_file(folder / VECTORS_FILE, lambda path: save_file(tensors, path))
        description = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "num_entities": self.num_entities,
            "num_vectors": len(self.vectors),
            "width": self.vectors.shape[1],
            "sha256": _file_hash(folder / VECTORS_FILE),
        }
        text = json.dumps(description, indent=2) + "\n"
        replace_file(folder / DESCRIPTION_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    @staticmethod
    def load(folder: Path, *, expected_fingerprint: str) -> "EntityIndex":
        """Read an index; raises RunError when it is missing, damaged or made by other weights or texts.

        The vectors stay on disk, mapped into memory: the system reads them as they are used, and lets go of them when
        it needs the room.
        """
        description = _read_description(folder / DESCRIPTION_FILE)
        _require_fingerprint(str(description.get("fingerprint")), expected_fingerprint, str(folder))
        path = folder / VECTORS_FILE
        try:
            if not path.is_file() or _file_hash(path) != description.get("sha256"):
                raise _damaged(path, "the file is missing or its sha256 is not the one in index.json")
            tensors = load_file(path)
            return EntityIndex(tensors["vectors"], tensors["row_of_entity"].numpy(), expected_fingerprint)
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(path, str(error)) from error


def build_index(
    encoder: TextEncoder,
    texts: EntityTexts,
    num_entities: int,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> EntityIndex:
    """Embed every entity of a graph, and keep the vectors in a number format."""
    return embed_with_entities(encoder, texts, num_entities, (), dtype=dtype, progress=progress)[0]


def embed_with_entities(
    encoder: TextEncoder,
    texts: EntityTexts,
    num_entities: int,
    queries: Texts | Sequence[TokenIds],
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> tuple[EntityIndex, Tensor]:
    """Embed every entity and some queries in one call, so that what their texts share is computed once.

    Returns the index, its vectors rounded to a number format, and the query vectors (B, D) in float32; equal queries
    are embedded once. METHOD.md §6.
    """
    candidates, row_of_candidate = distinct_texts(texts.candidates(np.arange(num_entities, dtype=np.int64)))
    distinct_queries, row_of_query = distinct_texts(queries)
    embedded = encoder.embed(Texts.chain([candidates, distinct_queries]), progress=progress)
    vectors, row_of_vector = distinct_rows(embedded[: len(candidates)].to(dtype))
    index = EntityIndex(vectors, row_of_vector[row_of_candidate], index_fingerprint(encoder, texts, dtype=dtype))
    return index, embedded[len(candidates) :][torch.from_numpy(row_of_query)]


def index_fingerprint(encoder: TextEncoder, texts: EntityTexts, *, dtype: torch.dtype = torch.float32) -> str:
    """Name what an index depends on: weights and pooling, texts with their templates and cut-offs, number format."""
    return hashlib.sha256(f"{encoder.fingerprint()}\n{texts.fingerprint()}\n{dtype}".encode()).hexdigest()


def entity_scores(query: Tensor, vectors: Tensor, row_of_entity: Tensor) -> Tensor:
    """Score query (B, D) against the distinct vectors (U, D), then spread to the entities: (B, E) float32.

    Raises ModelError where a score is not a finite number: such scores cannot be ordered.
    """
    # In parts, so that narrower vectors are not all copied into float32 at once.
    starts = range(0, max(1, len(vectors)), VECTORS_AT_ONCE)
    parts = (vectors[start : start + VECTORS_AT_ONCE].float() for start in starts)
    with exact_float32():
        scores = torch.cat([products(query.float(), part) for part in parts], dim=1)
    for extreme in scores.aminmax() if scores.numel() else ():  # aminmax keeps a NaN, and needs no memory
        require_finite(float(extreme))
    return scores.index_select(1, row_of_entity)


def require_finite(extreme: float) -> None:
    """Raise ModelError where the largest or smallest score is not a finite number."""
    if not math.isfinite(extreme):
        raise ModelError(
            "wanted finite scores, found NaN or infinity in the vectors of queries or entities. The weights "
            "are damaged or float16 is too narrow: take an earlier checkpoint, or use bfloat16 or float32."
        )


def distinct_texts(texts: Texts | Sequence[TokenIds]) -> tuple[Texts, IntArray]:
    """Keep the first of equal token sequences; returns the distinct ones and the row there of each text."""
    texts = Texts.of(texts)
    padded = texts.padded()
    order = sorted_rows(padded)
    is_first = np.ones(len(texts), dtype=np.bool_)  # along the order, in which equal texts stand as they were given
    is_first[1:] = (padded[order[1:]] != padded[order[:-1]]).any(axis=1)
    kept, place = np.unique(order[is_first], return_inverse=True)
    rows = np.empty(len(texts), dtype=np.int64)
    rows[order] = place[np.cumsum(is_first) - 1]
    return texts.select(kept), rows


def distinct_rows(vectors: Tensor) -> tuple[Tensor, IntArray]:
    """Keep the first of equal rows of vectors (N, D); returns (U, D), the given ones where all differ, and places there.

    Rows are told apart by their first numbers, and only what these do not tell apart by all: a copy of millions of vectors
    would take as much memory as they do.
    """
    _, group_of, size_of = np.unique(_row_keys(vectors[:, :KEY_COLUMNS]), return_inverse=True, return_counts=True)
    alike = np.flatnonzero(size_of[group_of] > 1)
    first_of = np.arange(len(vectors))
    if len(alike):
        _, first, same = np.unique(_row_keys(vectors[torch.from_numpy(alike)]), return_index=True, return_inverse=True)
        first_of[alike] = alike[first[same]]
    kept = np.unique(first_of)
    found = vectors if len(kept) == len(vectors) else vectors[torch.from_numpy(kept)]
    return found, np.searchsorted(kept, first_of)


def _row_keys(vectors: Tensor) -> npt.NDArray[np.void]:
    """Return the rows (N, D) as N keys of bytes, which are the same where numbers are."""
    values = np.ascontiguousarray((vectors + 0.0).numpy())  # adding zero turns -0.0 into 0.0
    return values.view(np.dtype((np.void, values.dtype.itemsize * values.shape[1]))).ravel()


def _require_fingerprint(found: str, expected: str, where: str) -> None:
    if found != expected:
        raise RunError(
            f"{where}: stale index: wanted fingerprint {expected[:12]} (these weights and texts), "
            f"found {found[:12]}. Delete the index; it is then built again."
        )


def _read_description(path: Path) -> dict[str, object]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path}: wanted an entity index, found none. Build it again.") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise _damaged(path, f"wanted format {FORMAT}")
    return description


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(f"{path}: the entity index is damaged ({reason}). Delete its folder; it is then built again.")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
