"""One step's loss and gradient: in one graph where it fits, else by gradient caching, with the same result."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pykalm.config import ObjectiveSettings
from pykalm.learn.batches import Batch
from pykalm.learn.losses import completion_loss_sum, dual_view_loss
from pykalm.model.encoder import Encoder, pooled
from pykalm.text.texts import IntArray
from pykalm.text.trie import RowGroup, row_group

LOGITS_AT_ONCE = 256
"""Answer positions whose logits (V wide, float32) are held at the same time."""


@dataclass(frozen=True)
class StepLoss:
    """Hold the loss of a step and its two parts; a part that is off is 0."""

    total: float
    explicit: float
    implicit: float


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Hold a group of rows, with the pooled nodes and the answers that lie in it and where in the group they are."""

    group: RowGroup
    pooled: IntArray
    pooled_places: IntArray
    answers: IntArray
    answer_places: IntArray


def joint_gradient(encoder: Encoder, batch: Batch, objective: ObjectiveSettings, *, memory_tokens: int) -> StepLoss:
    """Add the gradient of L = L_exp + λ · L_imp to every parameter; return the losses. METHOD.md §4, §6.

    A trie of more than memory_tokens nodes is computed twice: once without a graph, for all vectors and the gradient of
    L_exp at them, then chunk by chunk with one, so that memory holds one chunk however large the batch is. Dropout draws
    the same numbers both times. The temperature takes part in both ways.
    """
    pooled_nodes = np.unique(np.concatenate([batch.query_nodes, batch.candidate_nodes]))
    chunks = _chunks(encoder, batch, pooled_nodes)
    if batch.trie.num_nodes <= memory_tokens:
        return _in_one_graph(encoder, batch, objective, chunks, pooled_nodes)
    return _cached(encoder, batch, objective, chunks, pooled_nodes)


def _in_one_graph(
    encoder: Encoder, batch: Batch, objective: ObjectiveSettings, chunks: list[_Chunk], pooled_nodes: IntArray
) -> StepLoss:
    states = [encoder(chunk.group, shared=batch.trie.shared) for chunk in chunks]
    vectors = [pooled(_at(part, chunk.pooled_places)) for part, chunk in zip(states, chunks, strict=True)]
    explicit = _explicit(encoder, batch, objective, _in_order(vectors, chunks, len(pooled_nodes)), pooled_nodes)
    sums = [_implicit_sum(encoder, batch, part, chunk) for part, chunk in zip(states, chunks, strict=True)]
    implicit = torch.stack(sums).sum() / max(1, len(batch.answer_nodes))
    total = explicit + objective.implicit_weight * implicit
    total.backward()  # type: ignore[no-untyped-call]
    return StepLoss(*(float(part.detach()) for part in (total, explicit, implicit)))


def _cached(
    encoder: Encoder, batch: Batch, objective: ObjectiveSettings, chunks: list[_Chunk], pooled_nodes: IntArray
) -> StepLoss:
    device = encoder.device
    generators, vectors = [], []
    explicit, gradient = torch.zeros((), device=device), None
    if len(batch.positives):  # else there is nothing to learn from vectors, and the first pass would be for nothing
        for chunk in chunks:
            generators.append(_random_state(device))
            with torch.no_grad():
                vectors.append(pooled(_at(encoder(chunk.group, shared=batch.trie.shared), chunk.pooled_places)))
        leaves = _in_order(vectors, chunks, len(pooled_nodes)).requires_grad_()
        explicit = _explicit(encoder, batch, objective, leaves, pooled_nodes)
        explicit.backward()  # type: ignore[no-untyped-call]
        gradient = leaves.grad
    implicit, count = 0.0, max(1, len(batch.answer_nodes))
    for number, chunk in enumerate(chunks):
        if gradient is not None:
            _set_random_state(device, generators[number])
        states = encoder(chunk.group, shared=batch.trie.shared)
        chunk_implicit = _implicit_sum(encoder, batch, states, chunk) / count
        total = objective.implicit_weight * chunk_implicit
        if gradient is not None:
            vector = pooled(_at(states, chunk.pooled_places))
            total = total + (vector * gradient[torch.from_numpy(chunk.pooled).to(device)]).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        implicit += float(chunk_implicit.detach())
    return StepLoss(float(explicit.detach()) + objective.implicit_weight * implicit, float(explicit.detach()), implicit)


def _chunks(encoder: Encoder, batch: Batch, pooled_nodes: IntArray) -> list[_Chunk]:
    groups = [row_group(batch.trie, rows) for rows in batch.trie.chunks(encoder.chunk_tokens)]
    return [_Chunk(group, *group.find(pooled_nodes), *group.find(batch.answer_nodes)) for group in groups]


def _explicit(
    encoder: Encoder, batch: Batch, objective: ObjectiveSettings, vectors: Tensor, pooled_nodes: IntArray
) -> Tensor:
    """Return L_exp from the vectors of the pooled nodes, or 0 where it is off."""
    if not len(batch.positives):
        return torch.zeros((), device=encoder.device)
    device = encoder.device
    rows = [torch.from_numpy(np.searchsorted(pooled_nodes, nodes)).to(device)
            for nodes in (batch.query_nodes, batch.candidate_nodes)]  # fmt: skip
    return dual_view_loss(
        vectors[rows[0]],
        vectors[rows[1]],
        log_scale=encoder.log_inverse_temperature,
        margin=objective.margin,
        positives=torch.from_numpy(batch.positives).to(device),
        known=torch.from_numpy(batch.known).to(device),
    )


def _implicit_sum(encoder: Encoder, batch: Batch, states: Tensor, chunk: _Chunk) -> Tensor:
    """Return the summed completion loss of a chunk's answers; their logits are built, used and built again in parts."""
    if not len(chunk.answers):
        return torch.zeros((), device=encoder.device)
    read = _at(states, chunk.answer_places)
    targets = torch.from_numpy(batch.answer_tokens[chunk.answers]).to(encoder.device)

    def part(some_states: Tensor, some_targets: Tensor) -> Tensor:
        return completion_loss_sum(encoder.logits(some_states), some_targets)

    sums = [
        checkpoint(
            part, read[start : start + LOGITS_AT_ONCE], targets[start : start + LOGITS_AT_ONCE], use_reentrant=False
        )
        for start in range(0, len(targets), LOGITS_AT_ONCE)
    ]
    return torch.stack(sums).sum()


def _at(states: Tensor, places: IntArray) -> Tensor:
    return states[torch.from_numpy(places).to(states.device)]


def _in_order(vectors: list[Tensor], chunks: list[_Chunk], count: int) -> Tensor:
    """Return the vectors (count, D) of all chunks in the order of the pooled nodes."""
    order = np.concatenate([chunk.pooled for chunk in chunks])
    assert len(order) == count
    back = torch.from_numpy(np.argsort(order)).to(vectors[0].device)
    return torch.cat(vectors)[back]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
