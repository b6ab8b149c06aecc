"""Perplexity against a five-line loop over tokens, whatever the window, the stride and the batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pykalm.errors import ModelError, UsageError
from pykalm.evaluate import perplexity
from pykalm.evaluate.corpora import Corpus, Document
from pykalm.evaluate.perplexity import WINDOW, cut_windows, measure_perplexity
from pykalm.model.encoder import Encoder
from tests.laws.common import tiny_encoder
from tests.tiny_models import tiny_tokenizer

TEXTS = ("The first text goes on for a while, and then it ends.", "Two", "A third one: é, ü and 10 bytes.")
CORPUS = Corpus("three", tuple(Document(text) for text in TEXTS))
BEGIN = 1


def loop(encoder: Encoder, tokens: list[int], window: int, stride: int) -> float:
    """Return Σ log p, every token read behind as many tokens as its window holds, on its own."""
    model, total, end = encoder.causal_lm, 0.0, min(window, len(tokens))
    for place, token in enumerate(tokens):
        end = end if place < end else min(end + stride, len(tokens))
        before = [BEGIN, *tokens][max(0, end - window) : place + 1]
        logits = model(input_ids=torch.tensor([before])).logits[0, -1].double()
        total += float(logits.log_softmax(dim=0)[token])
    return total


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 3), (8, 1), (20, 7), (512, None), (53, 53)])
@torch.no_grad()
def test_likelihood_equals_a_loop_over_tokens(window: int, stride: int | None) -> None:
    encoder, tokenizer = tiny_encoder(chunk_tokens=40), tiny_tokenizer()
    found = measure_perplexity(encoder, tokenizer, CORPUS, window=window, stride=stride)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = sum(loop(encoder, tokens, window, stride or window) for tokens in ids)
    assert found.log_likelihood == pytest.approx(expected, rel=1e-6)  # a token read one place off moves it by 1e-2
    assert found.num_tokens == found.num_bytes == len("".join(TEXTS).encode())
    assert found.num_words == 12 + 1 + 8
    result = found.to_dict()
    for unit, count in (("word", 21), ("token", found.num_tokens), ("byte", found.num_bytes)):
        assert result[unit] == pytest.approx(math.exp(-expected / count), rel=1e-5)
    assert (result["window"], result["stride"], result["num_documents"]) == (window, stride or window, 3)


@pytest.mark.parametrize("length", [1, 4, 5, 9, 23])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_every_token_is_predicted_once_from_a_window_of_its_own(length: int, stride: int) -> None:
    tokens = np.arange(100, 100 + length)
    windows = cut_windows(tokens, 7, window=4, stride=stride)
    assert np.concatenate([window.targets for window in windows]).tolist() == tokens.tolist()
    everything = [7, *tokens.tolist()]
    for window in windows:
        assert 1 <= len(window.targets) <= len(window.inputs) <= 4
        last = everything.index(int(window.targets[-1]))
        assert window.inputs.tolist() == everything[max(0, last - 4) : last]
    assert all(len(window.targets) == stride for window in windows[1:-1])


def test_batches_and_slices_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_perplexity(tiny_encoder(chunk_tokens=4096), tiny_tokenizer(), CORPUS, window=16, stride=8)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 1000)
    parts = measure_perplexity(tiny_encoder(chunk_tokens=16), tiny_tokenizer(), CORPUS, window=16, stride=8)
    assert parts.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-6)


def test_a_longer_memory_is_used() -> None:
    """The same tokens behind other windows have other likelihoods: the stride counts."""
    encoder = tiny_encoder()
    found = {
        stride: measure_perplexity(encoder, tiny_tokenizer(), CORPUS, window=8, stride=stride).log_likelihood
        for stride in (1, 8)
    }
    assert abs(found[1] / found[8] - 1) > 1e-3


def test_a_limit_reads_the_beginning_in_whole_words() -> None:
    """A byte is a token: 53 of the first text, 3 of the second, then "A third" of the third."""
    found = measure_perplexity(tiny_encoder(), tiny_tokenizer(), CORPUS, window=16, limit_tokens=65)
    cut = Corpus("cut", (*CORPUS.documents[:2], Document("A third")))
    assert found == measure_perplexity(tiny_encoder(), tiny_tokenizer(), cut, window=16)
    assert found.num_tokens == 53 + 3 + 7
    with pytest.raises(UsageError, match="one word"):
        measure_perplexity(tiny_encoder(), tiny_tokenizer(), CORPUS, limit_tokens=2)


def test_defaults_fit_the_model_and_what_does_not_is_refused() -> None:
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()  # 512 positions
    assert measure_perplexity(encoder, tokenizer, CORPUS).to_dict()["window"] == 512 < WINDOW
    for window, stride in ((513, None), (8, 9), (8, 0), (0, None)):
        with pytest.raises(UsageError, match="wanted"):
            measure_perplexity(encoder, tokenizer, CORPUS, window=window, stride=stride)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="begin or end token"):
        measure_perplexity(encoder, tokenizer, CORPUS)


def test_a_likelihood_that_is_no_number_raises() -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.causal_lm.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="three: wanted likelihoods that are numbers"):
        measure_perplexity(encoder, tiny_tokenizer(), CORPUS)


def test_dropout_and_gradients_are_off_and_the_mode_is_kept() -> None:
    encoder = tiny_encoder(dropout=0.5).train()
    first, again = (measure_perplexity(encoder, tiny_tokenizer(), CORPUS, window=16) for _ in range(2))
    assert first == again
    assert encoder.training


def test_a_perplexity_beyond_any_number_is_none() -> None:
    """A text without white space, as Chinese is written, is one word: e to the likelihood of all of it is no number."""
    corpus = Corpus("long", (Document("字" * 400),))
    result = measure_perplexity(tiny_encoder(), tiny_tokenizer(), corpus).to_dict()
    assert result["word"] is None
    assert result["token"] > 1


def test_progress_reaches_the_number_of_tokens() -> None:
    told: list[tuple[int, int]] = []
    measure_perplexity(
        tiny_encoder(), tiny_tokenizer(), CORPUS, window=8, progress=lambda done, total: told.append((done, total))
    )
    total = len("".join(TEXTS).encode())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_path_of_a_text_may_be_given(tmp_path: Path) -> None:
    from pykalm.evaluate.corpora import read_corpus

    (tmp_path / "note.txt").write_text(TEXTS[0], encoding="utf-8")
    found = measure_perplexity(tiny_encoder(), tiny_tokenizer(), read_corpus(tmp_path / "note.txt"))
    alone = Corpus("alone", (Document(TEXTS[0]),))
    assert found == measure_perplexity(tiny_encoder(), tiny_tokenizer(), alone)
