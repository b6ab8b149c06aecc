"""Claims about the check at the start of a run: tokens that a model lacks, and passes that it cannot share."""

import logging

import numpy as np
import pytest
import torch

from pykalm.errors import ModelError
from pykalm.model import packing
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.text.trie import row_group
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer
from tests.tiny_models import TOKENIZER_SIZE, tiny_model


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


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("opt", {"dropout": 0.1}),
        ("llama", {"attention_dropout": 0.3}),
    ],
)
def test_a_model_whose_config_has_dropout_is_taken_and_keeps_its_dropout_for_training(
    family: str, dropout: dict[str, float]
) -> None:
    """Their own defaults, which the tiny models of the other tests switch off."""
    model = add_adapter(tiny_model(family, vocab_size=TOKENIZER_SIZE, **dropout), rank=4)
    encoder = Encoder(model, source_fingerprint=family, precision="fp32")
    assert not any(module.training for module in encoder.modules())
    verbalizer = tiny_verbalizer(tiny_graph())
    packing.choose_passes(encoder, verbalizer)
    packing.require_own_logits(encoder, verbalizer)
    assert encoder.packed
    group = row_group(encoder.lay_out([verbalizer.query(0, 0)]), np.array([0]))
    encoder.train()
    assert not torch.equal(encoder(group, shared=True), encoder(group, shared=True))
