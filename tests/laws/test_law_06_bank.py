"""Law 6 for the bank of negatives: the formula with old vectors; known answers in the bank change nothing."""

import copy
import dataclasses
import math
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm.config import ObjectiveSettings
from pykalm.learn import losses
from pykalm.learn.bank import EntityBank
from pykalm.learn.batches import Batch
from pykalm.learn.losses import dual_view_loss
from pykalm.model.encoder import Encoder
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import (
    build_batch,
    copied_gradients,
    gradients,
    largest_difference,
    replaced,
    tiny_encoder,
    tiny_graph,
    tiny_verbalizer,
)
from tests.laws.test_law_01_packed import read_alone

# The first step reads ada, cy, ada b and eve; the second ada, bo and dan, and asks what ada knows (cy, too) and what dan.
FIRST, SECOND = ((0, 0, 3), (1, 1, 5)), ((0, 0, 2), (4, 0, 2))
OLD = (1, 3, 5)


def bank_after_first_step(encoder: Encoder, verbalizer: Verbalizer) -> EntityBank:
    texts = verbalizer.candidates(np.arange(verbalizer.graph.num_entities))
    bank = EntityBank(texts, encoder.width, ObjectiveSettings(bank="plain"), device=encoder.device)
    gradients(encoder, build_batch(encoder, verbalizer, FIRST), bank=bank)
    return bank


def loss_by_loops(encoder: Encoder, verbalizer: Verbalizer, old: dict[int, Tensor]) -> Tensor:
    """Write L_exp of the second step down in loops; old holds the vectors of entities that it does not read."""
    graph = verbalizer.graph
    known = {tuple(row) for row in graph.both_directions("train").tolist()}
    rows = [*SECOND, *((t, r + graph.num_relations, h) for h, r, t in SECOND)]
    query = {(h, r): read_alone(encoder, verbalizer.query(h, r)) for h, r, _ in rows}
    new = {e: read_alone(encoder, verbalizer.candidate(e)) for row in rows for e in (row[0], row[2])}
    τ, γ, terms = torch.exp(-encoder.log_inverse_temperature), 0.02, []
    for h, r, t in rows:
        true = (query[h, r] @ new[t] - γ) / τ
        tails = [query[h, r] @ k / τ for e, k in {**old, **new}.items() if (h, r, e) not in known]
        heads = [query[q] @ new[t] / τ for q in query if (*q, t) not in known]
        terms += [-F.log_softmax(torch.stack([true, *others]), 0)[0] for others in (tails, heads)]
    return torch.stack(terms).mean()


def test_a_step_with_a_bank_has_the_loss_and_gradient_of_the_formula() -> None:
    """Old vectors are those of other weights. At τ = 0.5 every negative counts: one too many moves the loss by > 1e-2."""
    encoder = tiny_encoder(row_tokens=48, chunk_tokens=64, temperature=0.5)
    verbalizer = tiny_verbalizer(tiny_graph())
    bank = bank_after_first_step(encoder, verbalizer)
    old = {entity: read_alone(encoder, verbalizer.candidate(entity)).detach() for entity in OLD}
    with torch.no_grad():
        for name, parameter in encoder.trainable().items():
            parameter.mul_(1.5 if "lora_B" in name else 1)
    batch = build_batch(encoder, verbalizer, SECOND)
    encoder.zero_grad()
    expected = loss_by_loops(encoder, verbalizer, old)
    expected.backward()
    wanted = copied_gradients(encoder)
    for memory_tokens in (1, 1 << 20):
        loss, found = gradients(
            encoder, batch, memory_tokens=memory_tokens, bank=copy.deepcopy(bank), implicit_weight=0
        )
        assert abs(loss.explicit - float(expected.detach())) < 1e-5, (loss.explicit, float(expected))
        difference = largest_difference(found, wanted)
        assert difference < 1e-4, difference


def loss_of(query: Tensor, bank: Tensor) -> tuple[Tensor, ...]:
    """Return loss and gradients of three queries and four bank rows: all queries know row 1, query 2 knows row 3."""
    q, scale = query.clone().requires_grad_(), torch.tensor(math.log(4.0), requires_grad=True)
    loss = dual_view_loss(
        q, torch.eye(3), log_scale=scale, margin=0.1, positives=torch.arange(3)[:, None].expand(3, 2),
        known=torch.eye(3, dtype=torch.bool), bank=(bank, torch.tensor([[0, 1], [1, 1], [2, 1], [2, 3]])),
    )  # fmt: skip
    return loss.detach(), *torch.autograd.grad(loss, (q, scale))


def random_rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_known_answer_in_the_bank_changes_neither_loss_nor_gradient() -> None:
    """Row 1 is known by all queries and may move anywhere; row 3 along the score of query 2, which alone knows it."""
    query, bank = torch.eye(3), random_rows(4, seed=0)
    loss, query_gradient, scale_gradient = loss_of(query, bank)
    moved = bank.clone()
    moved[1] = torch.tensor([0.9, 0.8, 0.7])
    assert all(map(torch.equal, loss_of(query, moved), (loss, query_gradient, scale_gradient)))
    moved[3, 2] += 0.5
    moved_loss, moved_gradient, _ = loss_of(query, moved)
    assert torch.equal(moved_loss, loss)
    assert torch.equal(moved_gradient[2], query_gradient[2])
    moved[3, 1] = 0.9  # a negative of query 1
    assert float(loss_of(query, moved)[0] - loss) > 1e-2


def test_the_bank_is_read_in_parts_with_the_same_result() -> None:
    query, bank = random_rows(3, seed=1), random_rows(4, seed=2)
    whole = loss_of(query, bank)
    for at_once in (1, 8):
        with replaced(losses, "BANK_SCORES_AT_ONCE", at_once):  # type: ignore[arg-type]
            assert all(
                torch.allclose(part, one, atol=1e-6) for part, one in zip(loss_of(query, bank), whole, strict=True)
            )


def test_an_empty_bank_changes_nothing() -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    batch = build_batch(encoder, verbalizer)
    texts = verbalizer.candidates(np.arange(6))
    bank = EntityBank(texts, encoder.width, ObjectiveSettings(bank="plain"), device=encoder.device)
    with_bank, found = gradients(encoder, batch, bank=bank)
    without, wanted = gradients(encoder, batch)
    assert with_bank == without
    assert largest_difference(found, wanted) == 0


def known_answers_of_the_bank_are_negatives() -> AbstractContextManager[None]:
    right = EntityBank.negatives

    def wrong(self: EntityBank, batch: Batch) -> tuple[Tensor, Tensor]:
        return right(self, dataclasses.replace(batch, known_answers=batch.known_answers[:0]))

    return replaced(EntityBank, "negatives", wrong)


def candidates_count_twice() -> AbstractContextManager[None]:
    """Count the batch's own entities with their new and with their old vectors."""
    right = EntityBank.negatives

    def wrong(self: EntityBank, batch: Batch) -> tuple[Tensor, Tensor]:
        return right(self, dataclasses.replace(batch, candidate_entities=batch.candidate_entities[:0]))

    return replaced(EntityBank, "negatives", wrong)


def bank_does_not_push_the_queries() -> AbstractContextManager[None]:
    """Count the bank in the loss and leave it out of the gradient."""
    right = losses._bank_log_sum
    return replaced(losses, "_bank_log_sum", lambda query, *bank: right(query.detach(), *bank))


def masked_scores_are_lowered() -> AbstractContextManager[None]:
    """Let a known answer of the bank keep a little weight."""
    return replaced(losses, "MASKED", -1.0)  # type: ignore[arg-type]


BREAKS = {
    "known answers of the bank are negatives": known_answers_of_the_bank_are_negatives,
    "the batch's entities count twice": candidates_count_twice,
    "the bank does not push the queries": bank_does_not_push_the_queries,
    "a known answer of the bank keeps a weight": masked_scores_are_lowered,
}
CHECKS = {
    **dict.fromkeys(BREAKS, "test_a_step_with_a_bank_has_the_loss_and_gradient_of_the_formula"),
    "a known answer of the bank keeps a weight": "test_a_known_answer_in_the_bank_changes_neither_loss_nor_gradient",
}
