"""Law 3: several processes find the gradient of every parameter, and the losses, that one process finds.

Dropout is off: each process draws from seed, step and its own number, so that with dropout the gradients are others, of
the same distribution.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pykalm import processes
from pykalm.learn import step
from pykalm.learn.batches import Batch
from pykalm.learn.step import StepLoss
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.model.sharding import whole
from tests.laws.common import (
    build_batch,
    gradients,
    largest_difference,
    replaced,
    tiny_encoder,
    tiny_graph,
    tiny_verbalizer,
)
from tests.ranks import run_ranks
from tests.tiny_models import TOKENIZER_SIZE, tiny_model

# What is computed, by which way: both ways, each objective alone, every weight of a model whose output head is its own,
# a trie of one row, of which all processes but one have nothing, no vectors and no answers.
CASES: dict[str, dict[str, Any]] = {
    "one graph": {},
    "cached": {"memory_tokens": 1},
    "explicit alone": {"implicit": False},
    "implicit alone, cached": {"explicit": False, "memory_tokens": 1},
    "every weight": {"kind": "full"},
    "every weight, explicit alone, cached": {"kind": "full", "implicit": False, "memory_tokens": 1},
    "one row": {"row_tokens": 4096, "chunk_tokens": 4096},
    "one row, cached": {"row_tokens": 4096, "chunk_tokens": 4096, "memory_tokens": 1},
}


def encoder_of(kind: str = "lora", *, row_tokens: int = 56, chunk_tokens: int = 64, **_: Any) -> Encoder:
    if kind == "lora":
        return tiny_encoder(row_tokens=row_tokens, chunk_tokens=chunk_tokens).train()
    model = add_adapter(tiny_model("llama", vocab_size=TOKENIZER_SIZE), kind="full")
    encoder = Encoder(
        model, source_fingerprint="llama", precision="fp32", row_tokens=row_tokens, chunk_tokens=chunk_tokens
    )
    return encoder.train()


def batch_of(encoder: Encoder, *, explicit: bool = True, implicit: bool = True, **_: Any) -> Batch:
    return build_batch(encoder, tiny_verbalizer(tiny_graph()), explicit=explicit, share=float(implicit), own=2)


def gradients_of(case: str, *, sharded: bool) -> tuple[StepLoss, dict[str, Tensor]]:
    settings = CASES[case]
    encoder = encoder_of(**settings)
    if sharded:
        encoder.share_weights_out()
    memory_tokens = settings.get("memory_tokens", 1 << 20)
    loss, found = gradients(encoder, batch_of(encoder, **settings), memory_tokens=memory_tokens)
    return loss, {name: whole(gradient) for name, gradient in found.items()}


def every_case(damage: str | None, sharded: bool) -> dict[str, tuple[StepLoss, dict[str, Tensor]]]:
    """Return losses and gradients of every case, in a process whose code has the named damage."""
    with DAMAGES[damage]() if damage else contextlib.nullcontext():
        return {case: gradients_of(case, sharded=sharded) for case in CASES}


def require_the_gradients_of_one(count: int, *, sharded: bool = False) -> None:
    """Rounding is below 1e-5; the smallest of the breaks moves a gradient by more than a tenth of its length."""
    wanted = every_case(None, sharded=False)
    found = run_ranks(count, every_case, _damage, sharded)
    for case, (loss, gradient) in wanted.items():
        assert "log_inverse_temperature" in gradient or "implicit alone" in case
        for of_rank in found:
            rank_loss, rank_gradient = of_rank[case]
            assert rank_gradient.keys() == gradient.keys(), case
            for name in gradient:
                difference = largest_difference({name: rank_gradient[name]}, {name: gradient[name]})
                assert difference < 2e-5, f"{case}: {name} is off by {difference:.2g}"
            assert np.allclose(vars_of(rank_loss), vars_of(loss), rtol=1e-5, atol=0), case


def vars_of(loss: StepLoss) -> list[float]:
    return [loss.total, loss.explicit, loss.implicit, loss.kl]


def test_two_processes_find_the_gradient_of_one() -> None:
    require_the_gradients_of_one(2)


@pytest.mark.slow
def test_four_processes_find_the_gradient_of_one() -> None:
    require_the_gradients_of_one(4)


def test_two_processes_that_share_the_weights_out_find_the_gradient_of_one() -> None:
    """The same, with FSDP: every process holds a half of every weight."""
    require_the_gradients_of_one(2, sharded=True)


def test_the_cases_are_what_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of other sizes, several tails of a query and queries of a tail, more than one chunk in a process."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    encoder = encoder_of()
    batch = batch_of(encoder)
    owners = processes.share_out(batch.trie.row_lengths)
    tokens = np.bincount(owners, weights=batch.trie.row_lengths)
    assert len(tokens) == 2
    assert tokens[0] != tokens[1]
    assert len(batch.trie.chunks(encoder.chunk_tokens, np.flatnonzero(owners == 0))) > 1
    assert (np.bincount(batch.positives[:, 0]) > 1).any()
    assert (np.bincount(batch.positives[:, 1]) > 1).any()
    one_row = CASES["one row"]
    assert len(batch_of(encoder_of(**one_row)).trie.row_lengths) == 1
    answers_of_rows = np.bincount(owners[batch.trie.rows_of(batch.answer_nodes)])
    assert answers_of_rows[0] != answers_of_rows[1]


_damage: str | None = None
"""What is broken in the processes that the law starts; they import the code anew, so a break here would not reach them."""


def gradients_are_averaged() -> AbstractContextManager[None]:
    """Divide the sum by the number of processes, as data-parallel wrappers do."""
    right = processes.sum_in_place

    def wrong(tensors: list[Tensor]) -> None:
        right(tensors)
        for tensor in tensors[:-1]:
            tensor /= processes.count()

    return replaced(step, "sum_in_place", wrong)


def temperature_counts_for_every_process() -> AbstractContextManager[None]:
    """Sum the temperature's gradient, whole in every process, as if each had a part. METHOD.md §7.13."""
    return replaced(step, "is_main", lambda: True)


def completion_loss_is_a_mean_of_means() -> AbstractContextManager[None]:
    """Divide by the answers of the process and then by the number of processes."""
    right = step._written

    def wrong(encoder: Encoder, batch: Batch, states: Tensor, chunk: Any, **options: Any) -> Tensor:
        share = step.own_share(encoder, batch, 1 << 20)
        answers = sum(len(some.answers) for some in share.chunks)
        factor = len(batch.answer_nodes) / max(1, answers) / processes.count()
        return right(encoder, batch, states, chunk, **options) * torch.tensor([factor, 1.0])

    return replaced(step, "_written", wrong)


def vectors_come_in_the_order_of_the_processes() -> AbstractContextManager[None]:
    """Join the gathered vectors as they arrive, not in the order of their nodes."""
    right = processes.gather_rows

    def wrong(own: Tensor, owners: Any) -> Tensor:
        return right(own, owners)[torch.from_numpy(np.argsort(owners, kind="stable"))]

    return replaced(step, "gather_rows", wrong)


def local_rows_lose_their_gradient() -> AbstractContextManager[None]:
    """Use the gathered values of a process's own rows too, so that L_exp teaches the model nothing."""
    right = processes.gather_rows

    def wrong(own: Tensor, owners: Any) -> Tensor:
        return right(own, owners).detach() + 0 * own.sum()

    return replaced(step, "gather_rows", wrong)


def gradients_of_shared_weights_are_averaged() -> AbstractContextManager[None]:
    """Leave FSDP's division by the number of processes as it is by default."""
    return replaced(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)


DAMAGES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "gradients are averaged": gradients_are_averaged,
    "the temperature counts for every process": temperature_counts_for_every_process,
    "the completion loss is a mean of means": completion_loss_is_a_mean_of_means,
    "vectors come in the order of the processes": vectors_come_in_the_order_of_the_processes,
    "local rows lose their gradient": local_rows_lose_their_gradient,
    "gradients of shared weights are averaged": gradients_of_shared_weights_are_averaged,
}


def in_the_processes(damage: str) -> Callable[[], AbstractContextManager[None]]:
    """Return a break that the processes put in themselves."""

    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        global _damage
        _damage = damage
        try:
            yield
        finally:
            _damage = None

    return broken


BREAKS = {damage: in_the_processes(damage) for damage in DAMAGES}
CHECKS = {
    **dict.fromkeys(BREAKS, "test_two_processes_find_the_gradient_of_one"),
    "gradients of shared weights are averaged": "test_two_processes_that_share_the_weights_out_find_the_gradient_of_one",
}
