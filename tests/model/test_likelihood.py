"""Likelihoods of answers against separate passes of the unchanged model, and what is computed for them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pykalm.model import likelihood
from pykalm.model.encoder import Encoder
from pykalm.model.likelihood import answer_log_likelihoods
from pykalm.text.verbalize import Completions, Verbalizer
from tests.laws.common import sparing, tiny_encoder, tiny_graph, tiny_verbalizer
from tests.tiny_models import FAMILIES

# Two questions of one head, two of others, with six answers in all, one of them twice.
TRIPLES = np.array([(0, 0, 2), (0, 0, 3), (0, 1, 2), (3, 2, 4), (5, 3, 1), (0, 0, 2)])


def completions_of(verbalizer: Verbalizer) -> Completions:
    return verbalizer.completions(*TRIPLES.T)


@torch.no_grad()
def read_alone(encoder: Encoder, completions: Completions) -> list[float]:
    """Sum log p over answer and end tokens, one text a pass, as transformers computes it."""
    found = []
    for text, start in zip(completions.texts, completions.answer_starts.tolist(), strict=True):
        logits = encoder.causal_lm(input_ids=torch.from_numpy(text)[None]).logits[0].float()
        surprise = F.cross_entropy(logits[start - 1 : -1], torch.from_numpy(text[start:]), reduction="sum")
        found.append(-float(surprise))
    return found


@pytest.mark.parametrize("template", ["prefix-sharing", "published"])
def test_likelihoods_equal_separate_passes_in_all_families(template: str) -> None:
    """Rows of 32 tokens cut the trie; sums reach 100, of which float32 rounding is 1e-4 at most."""
    for family in FAMILIES:
        encoder, verbalizer = (
            tiny_encoder(family, row_tokens=32, chunk_tokens=64),
            tiny_verbalizer(tiny_graph(), template=template),
        )
        completions = completions_of(verbalizer)
        found = answer_log_likelihoods(encoder, completions)
        assert found == pytest.approx(read_alone(encoder, completions), abs=2e-4), family
        assert found[0] == found[-1]
        if family in ("llama", "gpt2", "gemma3"):
            spared = answer_log_likelihoods(sparing(encoder), completions)
            assert spared == pytest.approx(found, abs=2e-4), family


def test_every_position_before_an_answer_token_gets_its_logits_once_and_no_end_token_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, verbalizer = tiny_encoder(row_tokens=10_000, chunk_tokens=10_000), tiny_verbalizer(tiny_graph())
    completions = completions_of(verbalizer)
    read, logits_of = [], []
    forward, logits = Encoder.forward, Encoder.logits

    def spy_forward(self: Encoder, group: object, **rest: bool) -> torch.Tensor:
        read.append(int((group.nodes >= 0).sum()))  # type: ignore[attr-defined]
        return forward(self, group, **rest)  # type: ignore[arg-type]

    def spy_logits(self: Encoder, states: torch.Tensor) -> torch.Tensor:
        logits_of.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(Encoder, "forward", spy_forward)
    monkeypatch.setattr(Encoder, "logits", spy_logits)
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 7)
    answer_log_likelihoods(encoder, completions)
    prefixes, before_answers = set(), set()
    for text, start in zip(completions.texts, completions.answer_starts.tolist(), strict=True):
        prefixes |= {tuple(text[:length]) for length in range(1, len(text))}
        before_answers |= {tuple(text[:length]) for length in range(start, len(text))}
    assert sum(read) == len(prefixes)
    assert sum(logits_of) == len(before_answers)
    assert max(logits_of) <= 7


def test_slices_and_train_mode_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of two texts round otherwise, by 2e-5 at most; with dropout the model is read without it, and stays as it was."""
    verbalizer, encoder = tiny_verbalizer(tiny_graph()), tiny_encoder(dropout=0.5)
    whole = answer_log_likelihoods(encoder, completions_of(verbalizer))
    monkeypatch.setattr(likelihood, "TEXTS_AT_ONCE", 2)
    done: list[tuple[int, int]] = []
    encoder.train()
    parts = answer_log_likelihoods(encoder, completions_of(verbalizer), progress=lambda *how_far: done.append(how_far))
    assert encoder.training
    assert parts == pytest.approx(whole, abs=2e-5)
    assert [count for count, _ in done] == sorted(count for count, _ in done)
    assert done[-1][0] == done[-1][1]


def test_nothing_asked_is_nothing_answered() -> None:
    assert answer_log_likelihoods(tiny_encoder(), Completions.none()).tolist() == []
