"""Geometry against cases worked out by hand and five-line loops: equal, orthogonal and opposed vectors, a circle."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pykalm.errors import ModelError, UsageError
from pykalm.evaluate import geometry
from pykalm.evaluate.geometry import alignment, mean_cosine, measure_geometry, spectrum, uniformity


def random_rows(count: int, width: int = 8, seed: int = 0) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.nn.functional.normalize(rows, dim=1)


def test_equal_vectors_fill_one_direction() -> None:
    found = measure_geometry(torch.tensor([[0.6, 0.8, 0.0]] * 5))
    assert found.mean_cosine == pytest.approx(1)
    assert found.uniformity == pytest.approx(0, abs=1e-6)
    assert found.top_eigenvalue_share == pytest.approx(1)
    assert found.effective_rank == pytest.approx(1)
    assert found.spectrum.tolist() == pytest.approx([1, 0, 0], abs=1e-9)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_effective_rank_of_k_orthogonal_vectors_is_k(count: int) -> None:
    """Each repeated twice, in a wider space; different vectors have distance √2, equal ones 0."""
    rows = torch.eye(9)[:count].repeat(2, 1)
    found = measure_geometry(rows)
    pairs, equal = count * 2 * (count * 2 - 1), count * 2
    assert found.effective_rank == pytest.approx(count)
    assert found.top_eigenvalue_share == pytest.approx(1 / count)
    assert found.mean_cosine == pytest.approx(equal / pairs)
    assert found.uniformity == pytest.approx(math.log((equal + (pairs - equal) * math.exp(-4)) / pairs))


def test_vectors_round_a_circle_have_rank_two_and_mean_cosine_below_zero() -> None:
    """n directions that add up to nothing: their cosines add up to −n over n (n − 1) pairs."""
    angles = torch.arange(12) * (2 * math.pi / 12)
    found = measure_geometry(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert found.effective_rank == pytest.approx(2)
    assert found.mean_cosine == pytest.approx(-1 / 11, abs=1e-6)
    distances = [2 - 2 * math.cos(2 * math.pi * step / 12) for step in range(1, 12)]
    assert found.uniformity == pytest.approx(math.log(sum(math.exp(-2 * d) for d in distances) / 11), abs=1e-6)


def test_alignment_is_nought_for_the_same_two_across_and_four_for_the_opposite() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    answers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert [alignment(rows[i : i + 1], answers[i : i + 1]) for i in range(3)] == pytest.approx([0, 2, 4])
    assert alignment(rows, answers) == pytest.approx(2)


def test_measures_equal_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "PRODUCTS_AT_ONCE", 50)  # four rows at once, and a rest of one
    rows = random_rows(13)
    cosines, weights = [], []
    for i in range(13):
        for j in range(13):
            if i != j:
                cosines.append(float(rows[i].double() @ rows[j].double()))
                weights.append(math.exp(-2 * float((rows[i].double() - rows[j].double()).square().sum())))
    assert mean_cosine(rows) == pytest.approx(np.mean(cosines), rel=1e-12)
    assert uniformity(rows) == pytest.approx(math.log(np.mean(weights)), rel=1e-12)


@pytest.mark.parametrize("count", [3, 20])
def test_the_spectrum_is_that_of_the_gram_matrix_and_of_singular_values(count: int) -> None:
    rows = torch.nn.functional.normalize(random_rows(count).double(), dim=1)
    gram = np.linalg.eigvalsh((rows @ rows.T).numpy())[::-1][: min(count, 8)]
    squares = np.linalg.svd(rows.numpy(), compute_uv=False) ** 2
    assert spectrum(rows) == pytest.approx(gram / count, abs=1e-12)
    assert spectrum(rows) == pytest.approx(squares / count, abs=1e-12)
    assert float(spectrum(rows).sum()) == pytest.approx(1)


def test_too_few_or_broken_vectors_are_refused() -> None:
    with pytest.raises(UsageError, match="at least two"):
        measure_geometry(torch.ones(1, 3))
    with pytest.raises(ModelError, match="finite"):
        measure_geometry(torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]))
