"""Mean pooling: the vector is the mean over a text's own tokens, trained as it is measured, and kept with the run."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm import api
from pykalm.model.encoder import Encoder
from pykalm.model.index import index_fingerprint
from pykalm.model.packing import choose_passes
from pykalm.model.pooling import POOLINGS
from pykalm.model.run import load_run
from pykalm.text.trie import build_trie, row_group
from tests.laws import test_law_01_packed as law_01
from tests.laws.common import build_batch, gradients, largest_difference, tiny_encoder, tiny_graph, tiny_verbalizer
from tests.learn.workshop import SETTINGS
from tests.tiny_models import save_tiny_model


def mean_alone(encoder: Encoder, text: np.ndarray) -> Tensor:
    """Return the mean state of one text in a pass of its own."""
    states: Tensor = encoder.causal_lm.base_model(input_ids=torch.from_numpy(text)[None], use_cache=False)[0]
    return F.normalize(states[0].mean(dim=0), dim=0)


def test_the_paths_of_a_group_spell_the_texts() -> None:
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 3, size=generator.integers(1, 7)) for _ in range(40)]
    for share in (True, False):
        trie = build_trie(texts, row_tokens=9, share=share)
        for rows in trie.chunks(30):
            group = row_group(trie, rows)
            which, places = group.find(trie.last_nodes())
            tokens, starts = group.paths_to(places)
            for number, text in enumerate(which.tolist()):
                spelled = group.token_ids.ravel()[tokens[starts[number] : starts[number + 1]]]
                assert spelled.tolist() == texts[text].tolist()
            assert starts[-1] == len(tokens)


def test_every_pooling_of_no_text_is_empty() -> None:
    group = row_group(build_trie([np.array([1, 2])], row_tokens=4), np.array([0]))
    for pooling in POOLINGS.values():
        assert pooling(torch.ones(2, 5), group, np.zeros(0, dtype=np.int64)).shape == (0, 5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mamba"])
def test_a_step_with_mean_pooling_equals_separate_passes(family: str) -> None:
    """Losses and gradients of the whole step, against loops, as in law 1; chunks of 64 tokens with cached gradients too."""
    encoder, verbalizer = (
        tiny_encoder(family, pooling="mean", row_tokens=48, chunk_tokens=64),
        tiny_verbalizer(tiny_graph()),
    )
    loss, packed = gradients(encoder, build_batch(encoder, verbalizer))
    cached_loss, cached = gradients(encoder, build_batch(encoder, verbalizer), memory_tokens=1)
    assert cached_loss.total == pytest.approx(loss.total, abs=1e-5)
    assert largest_difference(cached, packed) < 2e-4
    with mock.patch.object(law_01, "read_alone", mean_alone):
        law_01.require_loops(encoder, verbalizer, loss, packed, what=(family,))


def test_vectors_in_bfloat16_are_means_in_float32() -> None:
    """The states are bfloat16; a mean of 20 of them in bfloat16 would be off by 1e-3 and more."""
    encoder = tiny_encoder(precision="bf16", pooling="mean")
    text = np.arange(3, 40)
    trie = encoder.lay_out([text])
    with torch.no_grad():
        states = encoder(row_group(trie, np.array([0])), shared=True)
    expected = F.normalize(states.float().mean(dim=0), dim=0)
    assert float((encoder.embed([text])[0] - expected).abs().max()) < 1e-6


def test_the_start_check_reads_last_tokens_whatever_is_pooled() -> None:
    """A wrong mask moves a mean less than a last state; it is seen all the same."""
    encoder, verbalizer = tiny_encoder(precision="bf16", pooling="mean"), tiny_verbalizer(tiny_graph())
    choose_passes(encoder, verbalizer)
    assert (encoder.packed, encoder.pooling) == (True, "mean")
    with law_01.subtree_ends_one_late():
        choose_passes(encoder, verbalizer)
    assert (encoder.packed, encoder.pooling) == (False, "mean")


def test_indexes_of_two_poolings_are_not_mistaken_for_each_other() -> None:
    last, mean, verbalizer = tiny_encoder(), tiny_encoder(pooling="mean"), tiny_verbalizer(tiny_graph())
    assert index_fingerprint(last, verbalizer) != index_fingerprint(mean, verbalizer)
    # Texts are the same tokens; so an index made before there was a choice stays fresh.
    assert tiny_verbalizer(tiny_graph(), pooling="mean").fingerprint() == verbalizer.fingerprint()


def test_a_run_keeps_its_pooling(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    settings = {**SETTINGS, "text.pooling": "mean", "training.batch_size": 2, "training.max_steps": 1}
    run = api.train(tiny_graph(), out=tmp_path / "run", model=model, settings=settings)
    assert json.loads((run.adapter_folder / "alignment.json").read_text(encoding="utf-8"))["pooling"] == "mean"
    again = load_run(tmp_path / "run", graph=tiny_graph())
    before, after = (opened.encoder.embed(opened.verbalizer.candidates(np.arange(6))) for opened in (run, again))
    assert again.encoder.pooling == "mean"
    assert torch.equal(after, before)
    again.encoder.pooling = "last"
    assert float((again.encoder.embed(again.verbalizer.candidates(np.arange(6))) - before).norm()) > 0.1
