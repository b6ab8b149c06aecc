"""What measures of language and geometry must hold: every token is counted once, behind its own tokens only; the loss of
Theorem 1 has its positive once; k equal orthogonal directions have rank k, and a vector is no pair with itself."""

import math
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from pykalm.evaluate import asymptotics, geometry, perplexity
from pykalm.evaluate.asymptotics import measure_asymptotics
from pykalm.evaluate.corpora import Corpus, Document
from pykalm.evaluate.geometry import measure_geometry
from pykalm.evaluate.perplexity import Window, measure_perplexity
from tests.laws.common import replaced, tiny_encoder
from tests.tiny_models import tiny_tokenizer

TEXT = "a text of some forty bytes, which is read in windows"


@torch.no_grad()
def test_every_token_is_counted_once_behind_its_own_tokens() -> None:
    """The windows of 8 that move by 5, against one pass for every token; float32 sums agree to 1e-6, relative."""
    encoder, tokens = tiny_encoder(), tiny_tokenizer()(TEXT)["input_ids"]
    found = measure_perplexity(encoder, tiny_tokenizer(), Corpus("one", (Document(TEXT),)), window=8, stride=5)
    total, end = 0.0, 8
    for place, token in enumerate(tokens):
        end = end if place < end else min(end + 5, len(tokens))
        before = [1, *tokens][max(0, end - 8) : place + 1]
        total += float(encoder.causal_lm(input_ids=torch.tensor([before])).logits[0, -1].log_softmax(0)[token])
    assert found.num_tokens == len(tokens)
    assert abs(found.log_likelihood / total - 1) < 1e-6


def test_with_all_others_the_loss_has_every_member_of_the_population_once() -> None:
    """Then L(M − 1) − log(M − 1) is the limit and log(M / (M − 1)), whatever the vectors; equal to 1e-9 in float64."""
    query, candidates = (torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)))
                         for seed in (0, 1))  # fmt: skip
    pairs = np.array([[0, 3], [1, 3], [2, 0], [2, 1]])
    found = measure_asymptotics(query, candidates, pairs, temperature=0.1)
    assert abs(found.normalised_loss[-1] - found.limit - math.log(9 / 8)) < 1e-9


def test_k_equal_orthogonal_directions_have_rank_k() -> None:
    """Rank exact to rounding, also where each direction comes twice; different directions lie √2 apart: uniformity −4."""
    for count in (2, 5):
        assert abs(measure_geometry(torch.eye(7)[:count].repeat(2, 1)).effective_rank - count) < 1e-9
        assert abs(measure_geometry(torch.eye(7)[:count]).uniformity + 4) < 1e-9
    assert abs(measure_geometry(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])).top_eigenvalue_share - 0.75) < 1e-9


def windows_count_all_that_they_predict() -> AbstractContextManager[None]:
    right = perplexity.cut_windows

    def wrong(tokens: Any, prefix: int, **rest: Any) -> list[Window]:
        read = np.concatenate([[prefix], tokens])
        windows = right(tokens, prefix, **rest)
        ends = np.cumsum([len(window.targets) for window in windows])
        return [Window(w.inputs, read[end - len(w.inputs) + 1 : end + 1]) for w, end in zip(windows, ends, strict=True)]

    return replaced(perplexity, "cut_windows", wrong)


def tokens_are_seen_before_they_are_predicted() -> AbstractContextManager[None]:
    right = perplexity.cut_windows

    def wrong(tokens: Any, prefix: int, **rest: Any) -> list[Window]:
        return [Window(np.append(w.inputs[1:], w.targets[-1]), w.targets) for w in right(tokens, prefix, **rest)]

    return replaced(perplexity, "cut_windows", wrong)


def windows_begin_anew() -> AbstractContextManager[None]:
    right = perplexity.cut_windows

    def wrong(tokens: Any, prefix: int, *, window: int, stride: int) -> list[Window]:
        return right(tokens, prefix, window=stride, stride=stride)

    return replaced(perplexity, "cut_windows", wrong)


def the_positive_is_counted_twice() -> AbstractContextManager[None]:
    def wrong(shuffled: Any, own: Any, place: Any, num_negatives: Any) -> Any:
        return torch.logaddexp(shuffled.logcumsumexp(dim=1)[:, torch.tensor(num_negatives)], own)

    return replaced(asymptotics, "_log_sums", wrong)


def the_positive_may_be_missing() -> AbstractContextManager[None]:
    def wrong(shuffled: Any, own: Any, place: Any, num_negatives: Any) -> Any:
        return shuffled.logcumsumexp(dim=1)[:, torch.tensor(num_negatives) - 1]

    return replaced(asymptotics, "_log_sums", wrong)


def eigenvalues_are_squared() -> AbstractContextManager[None]:
    right = geometry.spectrum

    def wrong(vectors: Any) -> Any:
        return right(vectors) ** 2 / (right(vectors) ** 2).sum()

    return replaced(geometry, "spectrum", wrong)


def vectors_are_centred() -> AbstractContextManager[None]:
    right = geometry.spectrum
    return replaced(geometry, "spectrum", lambda vectors: right(vectors - vectors.mean(dim=0)))


def a_vector_and_itself_are_a_pair() -> AbstractContextManager[None]:
    def wrong(vectors: Any, **_: Any) -> float:
        return math.log(float(torch.exp(-2 * torch.cdist(vectors.double(), vectors.double()) ** 2).mean()))

    return replaced(geometry, "uniformity", wrong)


COUNTED = "test_every_token_is_counted_once_behind_its_own_tokens"
POSITIVE = "test_with_all_others_the_loss_has_every_member_of_the_population_once"
RANK = "test_k_equal_orthogonal_directions_have_rank_k"
BREAKS = {
    "windows count all that they predict": windows_count_all_that_they_predict,
    "tokens are seen before they are predicted": tokens_are_seen_before_they_are_predicted,
    "windows begin anew": windows_begin_anew,
    "the positive is counted twice": the_positive_is_counted_twice,
    "the positive may be missing": the_positive_may_be_missing,
    "eigenvalues are squared": eigenvalues_are_squared,
    "vectors are centred": vectors_are_centred,
    "a vector and itself are a pair": a_vector_and_itself_are_a_pair,
}
CHECKS = dict.fromkeys(list(BREAKS)[:3], COUNTED) | dict.fromkeys(list(BREAKS)[3:5], POSITIVE)
CHECKS |= dict.fromkeys(list(BREAKS)[5:], RANK)
