"""Claims about texts in flat arrays: they read like the lists they were made of, and join and sort as loops would."""

import numpy as np
import pytest

from pykalm.text.texts import Texts, ranges, sorted_rows


def lists(seed: int, count: int, shortest: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 3, size=generator.integers(shortest, 6)).tolist() for _ in range(count)]


def texts_of(some: list[list[int]]) -> Texts:
    return Texts.of([np.array(tokens, dtype=np.int64) for tokens in some])


def spelled(texts: Texts) -> list[list[int]]:
    return [text.tolist() for text in texts]


def test_texts_read_like_the_list_they_were_made_of() -> None:
    some = lists(0, 20)
    texts = texts_of(some)
    assert len(texts) == 20
    assert spelled(texts) == some
    assert texts.lengths.tolist() == [len(tokens) for tokens in some]
    assert texts[7].tolist() == some[7]
    assert texts[7].dtype == np.int64
    assert Texts.of(texts) is texts
    assert spelled(texts.select(np.array([3, 3, 0]))) == [some[3], some[3], some[0]]
    assert len(Texts.of([])) == 0
    for beyond in (-1, 20):
        with pytest.raises(IndexError, match=r"wanted a text in \[0, 20\)"):
            texts[beyond]


def test_chained_and_joined_texts_equal_lists_added() -> None:
    first, second = lists(1, 9), lists(2, 5)
    assert spelled(Texts.chain([texts_of(first), Texts.of([]), texts_of(second)])) == first + second
    assert spelled(Texts.chain([])) == []
    left, right = np.array([8, 0, 0, 3]), np.array([1, 1, 4, 2])
    joined = Texts.join([(texts_of(first), left), (texts_of(second), right), (texts_of(first), left)])
    assert spelled(joined) == [first[i] + second[j] + first[i] for i, j in zip(left, right, strict=True)]
    none = np.zeros(0, dtype=np.int64)
    assert spelled(Texts.join([(texts_of(first), none)])) == []


def test_padded_texts_sort_as_lists_do_and_equal_ones_stay_in_order() -> None:
    for seed in range(5):
        some = lists(seed, 60)
        assert sorted_rows(texts_of(some).padded()).tolist() == sorted(range(60), key=some.__getitem__)
    large = [[70_000, 1], [255], [256], [70_000], [65_536, 9], [0]]
    assert [large[row] for row in sorted_rows(texts_of(large).padded())] == sorted(large)
    assert texts_of([[5], [], [1, 2]]).padded().tolist() == [[5, -1], [-1, -1], [1, 2]]
    assert sorted_rows(texts_of([[], []]).padded()).tolist() == [0, 1]


def test_ranges_count_on_from_every_start() -> None:
    assert ranges(np.array([5, 2, 9]), np.array([3, 0, 2])).tolist() == [5, 6, 7, 9, 10]
    assert ranges(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []
