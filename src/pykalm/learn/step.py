"""One step's loss and gradient: in one graph or by gradient caching, in one process or many, with the same result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pykalm.config import ObjectiveSettings
from pykalm.learn.batches import Batch
from pykalm.learn.losses import completion_loss_sum, dual_view_loss, kl_sum
from pykalm.model.encoder import Encoder, pooled
from pykalm.model.likelihood import LOGITS_AT_ONCE
from pykalm.model.sharding import is_sharded
from pykalm.processes import any_of, count, gather_rows, is_main, rank, share_out, sum_in_place
from pykalm.text.texts import IntArray
from pykalm.text.trie import RowGroup, row_group


@dataclass(frozen=True)
class StepLoss:
    """Hold the loss of a step and its parts; a part that is off is 0. kl: nats per token."""

    total: float
    explicit: float
    implicit: float
    kl: float = 0.0


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Hold a group of rows, with what is asked of it, by number, and where in it that is.

    pooled: of the process's own pooled nodes; answers, own: of the batch's answers and places in the base model's own texts.
    """

    group: RowGroup
    pooled: IntArray
    pooled_places: IntArray
    answers: IntArray
    answer_places: IntArray
    own: IntArray
    own_places: IntArray


@dataclass(frozen=True, eq=False)
class _Share:
    """Hold what this process computes of a batch: its rows in chunks, and the process (N,) of each of the N pooled nodes.

    own: those of the N that are its own; tokens: of the largest share of all, so that all choose the same way to compute.
    """

    pooled_nodes: IntArray
    owners: IntArray
    own: IntArray
    chunks: list[_Chunk]
    tokens: int


def joint_gradient(encoder: Encoder, batch: Batch, objective: ObjectiveSettings, *, memory_tokens: int) -> StepLoss:
    """Add the gradient of L = L_exp + λ · L_imp + β · L_kl to every parameter; return the losses. METHOD.md §4, §6.

    A trie of more than memory_tokens nodes is computed twice: once without a graph, for all vectors and the gradient of
    L_exp at them, then chunk by chunk with one, so that memory holds one chunk however large the batch is. Dropout draws
    the same numbers both times. The temperature takes part in both ways.

    All processes call this with the same batch and empty gradients; each computes its share of the rows. Losses and
    gradients are in every one of them those that one process would find. METHOD.md §7.13.
    """
    share = _share(encoder, batch)
    compute = _in_one_graph if share.tokens <= memory_tokens else _cached
    explicit, written = compute(encoder, batch, objective, share)
    _sum_over_processes(encoder, written)
    implicit, kl = written.tolist()
    total = float(explicit) + objective.implicit_weight * implicit + objective.kl_weight * kl
    return StepLoss(total, float(explicit), implicit, kl)


def _in_one_graph(encoder: Encoder, batch: Batch, objective: ObjectiveSettings, share: _Share) -> tuple[Tensor, Tensor]:
    """Return L_exp and this process's parts of L_imp and L_kl (2,), after one backward pass."""
    states = [encoder(chunk.group, shared=batch.trie.shared) for chunk in share.chunks]
    vectors = [_vectors(encoder, part, chunk) for part, chunk in zip(states, share.chunks, strict=True)]
    own = _in_order(vectors, share.chunks, len(share.own))
    explicit = _explicit(encoder, batch, objective, own, share)
    parts = [_written(encoder, batch, part, chunk) for part, chunk in zip(states, share.chunks, strict=True)]
    written = sum(parts, torch.zeros(2, device=encoder.device))
    _backward(explicit + _weighted(written, objective))
    return explicit.detach(), written.detach()


def _cached(encoder: Encoder, batch: Batch, objective: ObjectiveSettings, share: _Share) -> tuple[Tensor, Tensor]:
    """Return L_exp and this process's parts of L_imp and L_kl (2,), after two passes over its chunks."""
    device, generators, vectors = encoder.device, [], []
    explicit, gradient = torch.zeros((), device=device), None
    if len(batch.positives):  # else there is nothing to learn from vectors, and the first pass would be for nothing
        for chunk in share.chunks:
            generators.append(_random_state(device))
            with torch.no_grad():
                vectors.append(_vectors(encoder, encoder(chunk.group, shared=batch.trie.shared), chunk))
        leaves = _in_order(vectors, share.chunks, len(share.own)).requires_grad_()
        explicit = _explicit(encoder, batch, objective, leaves, share)
        _backward(explicit)
        gradient = leaves.grad
    written = torch.zeros(2, device=device)
    for number, chunk in enumerate(share.chunks):
        if gradient is not None:
            _set_random_state(device, generators[number])
        states = encoder(chunk.group, shared=batch.trie.shared)
        part = _written(encoder, batch, states, chunk)
        total = _weighted(part, objective)
        if gradient is not None:
            total = total + (_vectors(encoder, states, chunk) * _at(gradient, chunk.pooled)).sum()
        _backward(total)
        written += part.detach()
    return explicit.detach(), written


def _weighted(written: Tensor, objective: ObjectiveSettings) -> Tensor:
    """Return λ · L_imp + β · L_kl of parts (2,)."""
    return objective.implicit_weight * written[0] + objective.kl_weight * written[1]


def _share(encoder: Encoder, batch: Batch) -> _Share:
    """Share the rows of a batch out, so that all processes have as many tokens, and chunk those of this one."""
    trie = batch.trie
    owner_of_row = share_out(trie.row_lengths)
    shares = [np.flatnonzero(owner_of_row == process) for process in range(count())]
    chunked = [trie.chunks(encoder.chunk_tokens, rows) for rows in shares]
    groups = [row_group(trie, rows) for rows in chunked[rank()]]
    pooled_nodes = np.unique(np.concatenate([batch.query_nodes, batch.candidate_nodes]))
    owners = owner_of_row[trie.rows_of(pooled_nodes)]
    own = np.flatnonzero(owners == rank())
    asked = pooled_nodes[own], batch.answer_nodes, batch.own_nodes
    chunks = [_Chunk(group, *chain.from_iterable(map(group.find, asked))) for group in groups]
    # Shared weights are gathered for every pass, by all processes, so that all make as many.
    passes = max(map(len, chunked)) if is_sharded(encoder) else 1
    return _Share(
        pooled_nodes,
        owners,
        own,
        chunks + [_idle_chunk(batch)] * (passes - len(chunks)),
        tokens=max(int(trie.row_lengths[rows].sum()) for rows in shares),
    )


def _idle_chunk(batch: Batch) -> _Chunk:
    """Return a chunk of which nothing is asked, for a process that has no rows left."""
    nothing = np.zeros(0, dtype=np.int64)
    return _Chunk(row_group(batch.trie, np.zeros(1, dtype=np.int64)), *([nothing] * 6))


def _explicit(encoder: Encoder, batch: Batch, objective: ObjectiveSettings, own: Tensor, share: _Share) -> Tensor:
    """Return L_exp from this process's vectors (n, D) and those of the others, or 0 where it is off."""
    if not len(batch.positives):
        return torch.zeros((), device=encoder.device)
    device, vectors = encoder.device, gather_rows(own, share.owners)
    rows = [torch.from_numpy(np.searchsorted(share.pooled_nodes, nodes)).to(device)
            for nodes in (batch.query_nodes, batch.candidate_nodes)]  # fmt: skip
    query, candidates = vectors[rows[0]], vectors[rows[1]]
    return dual_view_loss(
        query,
        candidates,
        log_scale=encoder.log_inverse_temperature,
        margin=objective.margin,
        views=objective.views,
        positives=torch.from_numpy(batch.positives).to(device),
        known=torch.from_numpy(batch.known).to(device),
    )


def _written(encoder: Encoder, batch: Batch, states: Tensor, chunk: _Chunk) -> Tensor:
    """Return a chunk's parts of L_imp and L_kl (2,), each a mean over all its tokens in the batch."""
    implicit = _sum_of_logits(
        encoder, states, chunk.answer_places, completion_loss_sum, [batch.answer_tokens[chunk.answers]],
        needed=len(batch.answer_nodes) > 0,
    )  # fmt: skip
    kl = _sum_of_logits(
        encoder, states, chunk.own_places, kl_sum,
        [batch.own_likely[chunk.own].astype(np.int64), batch.own_log_p[chunk.own]], needed=len(batch.own_nodes) > 0,
    )  # fmt: skip
    return torch.stack([implicit / max(1, len(batch.answer_nodes)), kl / max(1, len(batch.own_nodes))])


def _sum_of_logits(
    encoder: Encoder, states: Tensor, places: IntArray, loss_sum: Callable[..., Tensor], targets: Sequence[npt.NDArray[Any]],
    *, needed: bool,
) -> Tensor:  # fmt: skip
    """Return the summed loss of the logits at some places; they are built, used and built again in parts.

    targets: arrays (T, ...) of what the loss wants beside the logits; needed: whether any process has such places.
    """
    if not len(places):
        return _nothing(encoder, states, with_logits=needed)
    read, wanted = _at(states, places), [torch.from_numpy(target).to(encoder.device) for target in targets]

    def part(some_states: Tensor, *some_targets: Tensor) -> Tensor:
        return loss_sum(encoder.logits(some_states), *some_targets)

    bounds = range(0, len(places), LOGITS_AT_ONCE)
    pieces = [[tensor[start : start + LOGITS_AT_ONCE] for tensor in (read, *wanted)] for start in bounds]
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()


def _nothing(encoder: Encoder, states: Tensor, *, with_logits: bool) -> Tensor:
    """Return 0; where weights are shared out, with the same weights behind it in every process, or their sums would not fit."""
    if not (is_sharded(encoder) and states.requires_grad):
        return torch.zeros((), device=encoder.device)
    used = encoder.logits(states[:1]).sum() if with_logits else states.sum()
    return used * 0


def _sum_over_processes(encoder: Encoder, written: Tensor) -> None:
    """Sum the gradients and the parts of L_imp and L_kl over the processes.

    The temperature's gradient, which all have whole, counts once. Where weights are shared out, their gradients have been
    summed in the backward pass.
    """
    if count() == 1:
        return
    parameters = [encoder.log_inverse_temperature] if is_sharded(encoder) else list(encoder.trainable().values())
    if not is_main() and encoder.log_inverse_temperature.grad is not None:
        encoder.log_inverse_temperature.grad.zero_()
    # A parameter may have no gradient here, as the output head of a process without answers, and one elsewhere.
    has_gradient = any_of([parameter.grad is not None for parameter in parameters])
    gradients = []
    for parameter, is_there in zip(parameters, has_gradient, strict=True):
        if is_there:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    sum_in_place([*gradients, written])


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]


def _vectors(encoder: Encoder, states: Tensor, chunk: _Chunk) -> Tensor:
    return pooled(encoder.read(states, chunk.group, chunk.pooled_places))


def _at(states: Tensor, places: IntArray) -> Tensor:
    return states[torch.from_numpy(places).to(states.device)]


def _in_order(vectors: list[Tensor], chunks: list[_Chunk], count: int) -> Tensor:
    """Return the vectors (count, D) of all chunks in the order of their pooled nodes."""
    order = np.concatenate([chunk.pooled for chunk in chunks])
    assert len(order) == count
    return _at(torch.cat(vectors), np.argsort(order))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
