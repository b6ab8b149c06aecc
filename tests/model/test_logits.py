"""The logits of the completion loss are the model's own, and a family that bends them unknown to us is refused."""

import pytest
import torch

from pykalm.errors import ModelError
from pykalm.model.packing import require_own_logits
from tests.laws.common import replaced, tiny_encoder, tiny_graph, tiny_verbalizer
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_are_its_own(family: str) -> None:
    require_own_logits(tiny_encoder(family), tiny_verbalizer(tiny_graph()))


def test_soft_capped_logits_are_the_models_own() -> None:
    encoder = tiny_encoder("gemma3")
    encoder.causal_lm.config.final_logit_softcapping = 3.0
    require_own_logits(encoder, tiny_verbalizer(tiny_graph()))
    states = torch.randn(5, encoder.width) * 10
    assert float(encoder.logits(states).abs().max()) <= 3.0


def test_logits_changed_in_an_unknown_way_are_refused() -> None:
    encoder = tiny_encoder()
    wrong = replaced(type(encoder), "logits", lambda self, states: states @ torch.randn(states.shape[-1], 259))
    with wrong, pytest.raises(ModelError, match=r"objective\.implicit=false"):
        require_own_logits(encoder, tiny_verbalizer(tiny_graph()))
