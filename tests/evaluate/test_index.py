"""The entity index: what is stored, what is refused, and that equal texts are one row."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pykalm.bench.machine import peak_memory
from pykalm.errors import RunError
from pykalm.model import index as index_module
from pykalm.model.index import (
    DESCRIPTION_FILE,
    KEY_COLUMNS,
    VECTORS_FILE,
    EntityIndex,
    build_index,
    distinct_rows,
    distinct_texts,
    index_fingerprint,
)  # fmt: skip
from tests.evaluate.fakes import GEORGIA, STATE, FakeEncoder, FakeTexts

FINGERPRINT = index_fingerprint(FakeEncoder(), FakeTexts())


def saved_index(folder: Path) -> EntityIndex:
    index = build_index(FakeEncoder(), FakeTexts(), 7)
    index.save(folder)
    return index


def test_equal_texts_share_a_row() -> None:
    index = build_index(FakeEncoder(), FakeTexts(), 7)
    assert (index.num_entities, len(index.vectors)) == (7, 6)
    assert index.row_of_entity[GEORGIA] == index.row_of_entity[STATE]


def test_scores_are_the_products_with_every_entity() -> None:
    encoder, index = FakeEncoder(), build_index(FakeEncoder(), FakeTexts(), 7)
    query = encoder.embed([np.array([1, 0, 0]), np.array([1, 1, 1])])
    vectors = encoder.embed(FakeTexts().candidates(np.arange(7)))
    torch.testing.assert_close(index.scores(query), query @ vectors.T)


def test_distinct_rows_give_back_the_rows_bit_for_bit() -> None:
    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))[torch.arange(200) % 50]
    distinct, places = distinct_rows(rows)
    assert len(distinct) == 50
    assert torch.equal(distinct[torch.from_numpy(places)], rows)


def test_rows_that_begin_alike_are_told_apart_by_the_rest() -> None:
    """Of five rows with one beginning three differ; a sixth begins otherwise. The first of each is kept, in order."""
    rows = torch.zeros(6, KEY_COLUMNS + 2)
    rows[:, -1] = torch.tensor([3.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    rows[5, 0] = 1
    distinct, places = distinct_rows(rows)
    assert distinct[:, -1].tolist() == [3, 1, 2, 1]
    assert places.tolist() == [0, 1, 0, 2, 1, 3]


def test_vectors_that_all_differ_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of millions a copy would take gigabytes."""
    vectors = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    widths: list[int] = []
    keys = index_module._row_keys
    monkeypatch.setattr(index_module, "_row_keys", lambda rows: (widths.append(rows.shape[1]), keys(rows))[1])
    distinct, places = distinct_rows(vectors)
    assert widths == [KEY_COLUMNS]  # what is copied of them
    assert distinct.data_ptr() == vectors.data_ptr()
    assert places.tolist() == list(range(20))


def test_saving_takes_no_second_copy_of_the_vectors(tmp_path: Path) -> None:
    vectors = torch.randn(100_000, 64)  # 26 MB
    index = EntityIndex(vectors, np.arange(len(vectors)), FINGERPRINT)
    index.save(tmp_path / "first")  # loads what the first save loads
    assert peak_memory(lambda: index.save(tmp_path / "index"), vectors.device).peak_bytes < vectors.nbytes / 2


def test_saved_vectors_can_be_read_by_whoever_may_read_the_folder(tmp_path: Path) -> None:
    saved_index(tmp_path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    plain = tmp_path / "plain"
    plain.touch()
    assert modes == {VECTORS_FILE: plain.stat().st_mode & 0o777, DESCRIPTION_FILE: plain.stat().st_mode & 0o777}


def test_distinct_rows_take_minus_zero_for_zero() -> None:
    assert len(distinct_rows(torch.tensor([[0.0, 1.0], [-0.0, 1.0]]))[0]) == 1


def test_distinct_texts_keep_the_order_and_tell_lengths_apart() -> None:
    texts = [np.array([1]), np.array([1, 0]), np.array([1]), np.array([0, 1])]
    distinct, places = distinct_texts(texts)
    assert [text.tolist() for text in distinct] == [[1], [1, 0], [0, 1]]
    assert places.tolist() == [0, 1, 0, 2]


def test_float16_vectors_are_rounded_kept_and_another_index(tmp_path: Path) -> None:
    full = build_index(FakeEncoder(), FakeTexts(), 7)
    half = build_index(FakeEncoder(), FakeTexts(), 7, dtype=torch.float16)
    half.require_fresh(FakeEncoder(), FakeTexts())
    half.save(tmp_path)
    with pytest.raises(RunError, match="stale index"):
        EntityIndex.load(tmp_path, expected_fingerprint=full.fingerprint)
    loaded = EntityIndex.load(tmp_path, expected_fingerprint=half.fingerprint)
    assert loaded.vectors.dtype == torch.float16
    assert torch.equal(loaded.vectors, full.vectors.half())
    query = FakeEncoder().embed([np.array([1, 0, 0])])
    assert loaded.scores(query).dtype == torch.float32
    torch.testing.assert_close(loaded.scores(query), full.scores(query), atol=2e-3, rtol=0)  # 11 bits


def test_vectors_that_float16_cannot_tell_apart_share_a_row() -> None:
    near = {(2, 0): [0.6, 0.8], (2, 1): [0.6, 0.8 + 1e-6]} | {(2, entity): [1.0, 0.0] for entity in range(2, 7)}
    assert len(build_index(FakeEncoder(near), FakeTexts(), 7).vectors) == 3
    index = build_index(FakeEncoder(near), FakeTexts(), 7, dtype=torch.float16)
    assert index.row_of_entity.tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_a_loaded_index_is_bitwise_equal(tmp_path: Path) -> None:
    index = saved_index(tmp_path)
    loaded = EntityIndex.load(tmp_path, expected_fingerprint=FINGERPRINT)
    assert torch.equal(loaded.vectors, index.vectors)
    assert loaded.row_of_entity.tolist() == index.row_of_entity.tolist()
    assert loaded.fingerprint == FINGERPRINT


def test_other_weights_or_texts_make_the_index_stale(tmp_path: Path) -> None:
    saved_index(tmp_path)
    wanted = index_fingerprint(FakeEncoder(name="other weights"), FakeTexts())
    with pytest.raises(RunError, match="stale index") as caught:
        EntityIndex.load(tmp_path, expected_fingerprint=wanted)
    for words in (wanted[:12], FINGERPRINT[:12], "Delete"):
        assert words in str(caught.value)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="found none"):
        EntityIndex.load(tmp_path / "index", expected_fingerprint=FINGERPRINT)


@pytest.mark.parametrize("damage", ["cut vectors", "changed byte", "no vectors", "cut description", "other format"])
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    saved_index(tmp_path)
    vectors, description = tmp_path / VECTORS_FILE, tmp_path / DESCRIPTION_FILE
    content = vectors.read_bytes()
    if damage == "cut vectors":
        vectors.write_bytes(content[: len(content) // 2])
    elif damage == "changed byte":
        vectors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no vectors":
        vectors.unlink()
    elif damage == "cut description":
        description.write_text(description.read_text(encoding="utf-8")[:20], encoding="utf-8")
    else:
        changed = json.loads(description.read_text(encoding="utf-8")) | {"format": 99}
        description.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        EntityIndex.load(tmp_path, expected_fingerprint=FINGERPRINT)


def test_an_index_that_was_half_replaced_is_refused(tmp_path: Path) -> None:
    # Killed between the two files: the vectors are new, the description is that of the old index.
    saved_index(tmp_path)
    old = (tmp_path / DESCRIPTION_FILE).read_bytes()
    build_index(FakeEncoder(name="new weights"), FakeTexts(), 7).save(tmp_path)
    (tmp_path / DESCRIPTION_FILE).write_bytes(old)
    with pytest.raises(RunError, match="damaged"):
        EntityIndex.load(tmp_path, expected_fingerprint=FINGERPRINT)
