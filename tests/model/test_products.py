"""Claims about the scores of queries and vectors: float32, and the same bits however both are cut and whoever computes."""

import pytest
import torch

from pykalm.model import products as module
from pykalm.model.products import exact_float32, products
from tests.laws.common import replaced

with_onednn = pytest.mark.skipif(not module.has_onednn(), reason="no products of oneDNN on this processor")


def drawn(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


@with_onednn
@pytest.mark.parametrize("width", [1, 16, 100, 577, 4096])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_bits_do_not_depend_on_how_queries_and_vectors_are_cut(width: int, threads: int) -> None:
    query, vectors, before = drawn(256, width), drawn(500, width), torch.get_num_threads()
    whole = products(query, vectors)
    torch.set_num_threads(threads)
    try:
        for queries in (1, 15, 16, 17, 100, 255):
            for columns in (1, 3, 16, 64, 333):
                part = products(query[1 : 1 + queries], vectors[7 : 7 + columns])
                assert torch.equal(part, whole[1 : 1 + queries, 7 : 7 + columns]), (queries, columns)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("queries", "columns"), [(1, 1), (3, 40), (40, 3), (64, 100)])
def test_scores_are_inner_products_in_float32(onednn: bool, queries: int, columns: int) -> None:
    query, vectors = drawn(queries, 576), drawn(columns + 1, 576)[1:]
    with replaced(module, "has_onednn", lambda: onednn and torch.backends.mkldnn.is_available()):
        found = products(query.requires_grad_(), vectors.T.contiguous().T)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), query.detach().double() @ vectors.double().T, rtol=0, atol=3e-4)


def test_no_vectors_have_no_scores() -> None:
    assert products(drawn(3, 5), torch.empty(0, 5)).shape == (3, 0)
    assert products(torch.empty(0, 5), drawn(3, 5)).shape == (0, 3)


def test_a_faster_format_that_was_allowed_is_not_used() -> None:
    """Whether a processor would take it or not: oneDNN is told not to, and autocast is off."""
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with exact_float32():
                assert backend.fp32_precision == "ieee"
                assert (torch.ones(1, 300) @ torch.ones(300, 1)).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("onednn", [True, False])
def test_scores_have_no_gradient(onednn: bool) -> None:
    with replaced(module, "has_onednn", lambda: onednn and torch.backends.mkldnn.is_available()):
        assert not products(drawn(20, 8).requires_grad_(), drawn(30, 8)).requires_grad


def test_few_queries_leave_the_vectors_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One question about a million entities: their vectors are not copied for it."""
    padded: list[int] = []
    pad = torch.nn.functional.pad
    monkeypatch.setattr(module.F, "pad", lambda rows, by: padded.append(len(rows)) or pad(rows, by))
    assert products(drawn(1, 8), drawn(500, 8)).shape == (1, 500)
    assert padded == [1]
