"""Claims about the published baseline: it computes METHOD.md §2-3 on its batch, and what it never uses changes nothing."""

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from pykalm.bench.plan import adapters_of_peft
from pykalm.bench.published import BATCH_SIZE, COMPLETIONS, PublishedRecipe, PublishedStep, draw_step
from pykalm.config import ObjectiveSettings
from pykalm.model.dropout import Dropout
from pykalm.model.encoder import Encoder
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import copied_gradients, largest_difference, tiny_encoder, tiny_graph, tiny_verbalizer

OBJECTIVE = ObjectiveSettings(implicit_weight=1.0)
TOLERANCE = 1e-4  # relative, float32, another grouping of the sums; a pass or a loss left out moves a gradient by 0.1


@pytest.fixture
def words() -> Verbalizer:
    return tiny_verbalizer(tiny_graph(), template="published")


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    directed = tiny_graph().both_directions("train")
    return directed[:8], directed[[1, 3, 9]]


def published(encoder: Encoder, words: Verbalizer, batch: tuple[np.ndarray, np.ndarray], **how: bool) -> PublishedStep:
    encoder.zero_grad()
    return PublishedRecipe(encoder, words, OBJECTIVE, **how).gradient(*batch)


def vector(encoder: Encoder, text: np.ndarray) -> Tensor:
    """Return the unit vector of one text, read alone."""
    states = encoder.causal_lm.base_model(input_ids=torch.from_numpy(text)[None])[0][0, -1]
    return states / states.norm()


def loss_by_hand(encoder: Encoder, words: Verbalizer, directed: np.ndarray, completed: np.ndarray) -> Tensor:
    """Return L_exp + L_imp in loops over single texts."""
    query = [vector(encoder, words.query(int(h), int(r))) for h, r, _ in directed]
    tails = [vector(encoder, words.candidate(int(t))) for _, _, t in directed]
    terms = []
    for i in range(len(query)):
        positive = (query[i] @ tails[i] - OBJECTIVE.margin) / OBJECTIVE.temperature
        row = [positive if j == i else query[i] @ tails[j] / OBJECTIVE.temperature for j in range(len(query))]
        column = [positive if j == i else query[j] @ tails[i] / OBJECTIVE.temperature for j in range(len(query))]
        terms += [torch.stack(side).logsumexp(0) - positive for side in (row, column)]
    written = []
    for h, r, t in completed.tolist():
        completion = words.completion(h, r, t)
        logits = encoder.causal_lm(input_ids=torch.from_numpy(completion.tokens)[None]).logits[0]
        for place in range(completion.answer_start, len(completion.tokens)):
            written.append(-logits[place - 1].log_softmax(0)[completion.tokens[place]])
    return torch.stack(terms).mean() + torch.stack(written).mean()


def test_the_gradient_is_that_of_a_loss_written_by_hand(
    words: Verbalizer, batch: tuple[np.ndarray, np.ndarray]
) -> None:
    encoder = tiny_encoder()
    step = published(encoder, words, batch)
    found = copied_gradients(encoder)
    encoder.zero_grad()
    wanted = loss_by_hand(encoder, words, *batch)
    wanted.backward()
    assert step.loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert largest_difference(found, copied_gradients(encoder)) < TOLERANCE


def test_what_is_never_used_changes_no_gradient(words: Verbalizer, batch: tuple[np.ndarray, np.ndarray]) -> None:
    encoder = tiny_encoder()
    whole = published(encoder, words, batch)
    gradients = copied_gradients(encoder)
    lean = published(encoder, words, batch, skip_unused=True)
    assert lean.loss == whole.loss
    assert largest_difference(copied_gradients(encoder), gradients) == 0.0
    assert lean.num_tokens < whole.num_tokens


def test_every_pass_is_padded_to_its_longest_text(words: Verbalizer, batch: tuple[np.ndarray, np.ndarray]) -> None:
    directed, completed = batch
    passes = [
        [words.query(int(h), int(r)) for h, r, _ in directed],
        [words.candidate(int(t)) for t in directed[:, 2]],
        [words.candidate(int(h)) for h in directed[:, 0]],
        [words.completion(*row).tokens for row in completed.tolist()],
    ]
    step = published(tiny_encoder(), words, batch)
    assert step.num_tokens == sum(len(texts) * max(map(len, texts)) for texts in passes)
    assert step.num_real_tokens == sum(len(text) for texts in passes for text in texts)


def test_a_step_draws_24_directed_triples_and_completes_4_of_them() -> None:
    directed = np.arange(300).reshape(100, 3)
    drawn, completed = draw_step(directed, np.random.default_rng(0))
    assert (BATCH_SIZE, COMPLETIONS) == (24, 4)
    assert len(np.unique(drawn[:, 0])) == 24
    assert len(completed) == 4
    assert set(completed[:, 0].tolist()) <= set(drawn[:, 0].tolist())


def test_adapters_are_those_of_peft_for_a_while_only(words: Verbalizer) -> None:
    """PyTorch's dropout and the cast to float32 inside; afterwards those that kalm has put there, the same objects."""
    encoder = tiny_encoder(dropout=0.3).train()
    layers = [layer for layer in encoder.modules() if isinstance(layer, LoraLayer)]
    before = [layer.lora_dropout["default"] for layer in layers]
    assert all(isinstance(dropout, Dropout) for dropout in before)
    with adapters_of_peft(encoder):
        inside = [layer.lora_dropout["default"] for layer in layers]
        assert all(type(dropout) is torch.nn.Dropout and dropout.training and dropout.p == 0.3 for dropout in inside)
        assert all(layer.cast_input_dtype_enabled for layer in layers)
    assert [layer.lora_dropout["default"] for layer in layers] == before
    assert not any(layer.cast_input_dtype_enabled for layer in layers)
