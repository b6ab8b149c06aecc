"""Claims about the check at the start of a run: tokens that a model lacks, and passes that it cannot share."""

import logging

import pytest
import torch

from pykalm.errors import ModelError
from pykalm.model import packing
from pykalm.model.encoder import Encoder
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer
from tests.tiny_models import tiny_model


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    encoder = Encoder(tiny_model("llama", vocab_size=50), source_fingerprint="small", precision="fp32")
    with pytest.raises(ModelError, match=r"wanted token ids below 50, found \d+. The tokenizer does not belong"):
        packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))


@pytest.mark.parametrize(("family", "shared"), [("llama", True), ("gemma3", True), ("mamba", False)])
def test_a_model_without_such_a_mask_takes_separate_passes_and_says_so(
    family: str, shared: bool, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = tiny_encoder(family)
    with caplog.at_level(logging.WARNING):
        packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert encoder.packed == shared
    assert ("separate passes" in caplog.text) == (not shared)


def test_embedding_reports_how_far_it_is_and_keeps_the_mode_and_order() -> None:
    encoder, verbalizer = tiny_encoder(row_tokens=16, chunk_tokens=32), tiny_verbalizer(tiny_graph())
    texts = verbalizer.candidates(torch.arange(6).numpy())
    seen: list[tuple[int, int]] = []
    encoder.train()
    vectors = encoder.embed(texts, progress=lambda done, total: seen.append((done, total)))
    assert encoder.training
    total = sum(map(len, texts))
    assert [whole for _, whole in seen] == [total] * len(seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 1
    assert torch.equal(encoder.embed(texts[::-1]), vectors.flip(0))
    assert encoder.embed([]).shape == (0, encoder.width)


def test_a_model_that_bends_its_logits_in_an_unknown_way_is_not_trained_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    packing.require_own_logits(encoder, verbalizer)
    logits = encoder.logits
    monkeypatch.setattr(encoder, "logits", lambda states: logits(states) * 1.01)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM changes its logits.*objective\.implicit=false"):
        packing.require_own_logits(encoder, verbalizer)
