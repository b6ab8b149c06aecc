"""One step's loss and gradient: in one graph or by gradient caching, in one process or many, with the same result."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pykalm.config import ObjectiveSettings
from pykalm.learn.batches import Batch
from pykalm.learn.losses import completion_loss_sum, dual_view_loss, kl_sum
from pykalm.model.arrays import on_device
from pykalm.model.dropout import drawing_from
from pykalm.model.encoder import Encoder, pooled
from pykalm.model.likelihood import LOGITS_AT_ONCE, part_of
from pykalm.model.sharding import is_sharded
from pykalm.model.side_by_side import AHEAD, num_workers, side_by_side
from pykalm.processes import any_of, count, gather_rows, is_main, rank, share_out, sum_in_place
from pykalm.text.texts import IntArray
from pykalm.text.trie import RowGroup, TokenTrie, row_group

LEAST_CHUNK_TOKENS = 512
"""Fewer in a pass make matrix products slower; a small step leaves threads to its few passes instead."""
SIZES = 16
"""Sizes of a chunk that are tried, to find the smallest that needs no more chunks."""
MORE_CHUNKS = 2
"""Chunks more, for each of those at once, that are tried where padding keeps some from as many tokens as others have."""
MOST_GRADIENT_BYTES = 3 << 30
"""What gradients of chunks that are computed side by side may take until they are added."""


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
class Share:
    """Hold what this process computes of a batch: its rows in chunks, and the process (N,) of each of the N pooled nodes.

    own: those of the N that are its own; keeps_graph: whether the graph of all chunks is kept, which all processes decide
    alike; at_once: how many chunks are computed at the same time.
    """

    pooled_nodes: IntArray
    owners: IntArray
    own: IntArray
    chunks: list[_Chunk]
    keeps_graph: bool
    at_once: int


def joint_gradient(
    encoder: Encoder, batch: Batch, objective: ObjectiveSettings, *, memory_tokens: int, share: Share | None = None
) -> StepLoss:
    """Add the gradient of L = L_exp + λ · L_imp + β · L_kl to every parameter; return the losses. METHOD.md §4, §6.

    All chunks of the trie are read, then L_exp gives the gradient at their vectors, then each chunk learns from that and from
    its part of the others. A trie of more than memory_tokens nodes is read without a graph and once more to learn, so that
    memory holds memory_tokens, or a chunk, however large the batch is. Dropout draws the same numbers both times. The
    temperature takes part in both ways. On a CPU chunks are computed side by side; their gradients are added in one order.

    All processes call this with the same batch and empty gradients; each computes its share of the rows. Losses and
    gradients are in every one of them those that one process would find. METHOD.md §7.13. share: `own_share` of the batch,
    where it is known already.
    """
    share = own_share(encoder, batch, memory_tokens) if share is None else share
    seed = int(torch.randint(1 << 62, ()))
    cuda = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):  # where a chunk draws from the generator of all, it is set for it
        step = _Step(
            encoder, batch, objective, share, np.random.SeedSequence(seed).generate_state(len(share.chunks)).tolist()
        )
        explicit, written = step.take()
    _sum_over_processes(encoder, written)
    implicit, kl = written.tolist()
    total = float(explicit) + objective.implicit_weight * implicit + objective.kl_weight * kl
    return StepLoss(total, float(explicit), implicit, kl)


@dataclass(frozen=True, eq=False)
class _Step:
    """Take a step with this process's share of a batch; seeds (chunks,): what the dropout of every chunk is drawn from."""

    encoder: Encoder
    batch: Batch
    objective: ObjectiveSettings
    share: Share
    seeds: list[int]
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return L_exp and this process's parts of L_imp and L_kl (2,), whose gradients are in the parameters then."""
        chunks, at_once = range(len(self.share.chunks)), self.share.at_once
        explicit, at_vectors = torch.zeros((), device=self.encoder.device), None
        if len(self.batch.positives):  # else there is nothing to learn from vectors, and reading would be for nothing
            with torch.set_grad_enabled(self.share.keeps_graph):
                vectors = list(side_by_side(self._read, chunks, at_once=at_once))
            leaves = _in_order(vectors, self.share.chunks, len(self.share.own)).requires_grad_()
            explicit = _explicit(self.encoder, self.batch, self.objective, leaves, self.share)
            _backward(explicit)
            at_vectors = leaves.grad
        return explicit.detach(), self._learn(at_vectors)

    def _read(self, number: int) -> Tensor:
        """Return a chunk's vectors without their graph, which is kept where gradients are on."""
        states, vectors = self._pass(number)
        if torch.is_grad_enabled():
            self.kept[number] = states, vectors
        return vectors.detach()

    def _learn(self, at_vectors: Tensor | None) -> Tensor:
        """Add the gradients to the parameters; return this process's parts of L_imp and L_kl (2,).

        at_vectors (n, D): the gradient of L_exp at this process's vectors.
        """
        chunks, written = range(len(self.share.chunks)), torch.zeros(2, device=self.encoder.device)
        if self.share.at_once > 1:
            learned = side_by_side(lambda chunk: self._gradients(chunk, at_vectors), chunks, at_once=self.share.at_once)
            with closing(learned):
                for part, gradients in learned:
                    written += part
                    _add(gradients)
            return written
        whole = torch.zeros((), device=self.encoder.device)
        for chunk in chunks:
            part, total = self._loss(chunk, at_vectors)
            written += part.detach()
            whole = whole + total
            if not self.share.keeps_graph:
                _backward(whole)
                whole = torch.zeros_like(whole)
        _backward(whole)  # of a graph that is kept all at once: shared weights are let go of after a backward pass
        return written

    def _gradients(self, chunk: int, at_vectors: Tensor | None) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Return a chunk's parts of L_imp and L_kl (2,), and the gradients at the parameters."""
        part, total = self._loss(chunk, at_vectors)
        if not total.requires_grad:
            return part.detach(), {}
        learned = [
            weight for weight in self.encoder.trainable().values() if weight is not self.encoder.log_inverse_temperature
        ]
        found = torch.autograd.grad(total, learned, allow_unused=True)
        return part.detach(), {weight: own for weight, own in zip(learned, found, strict=True) if own is not None}

    def _loss(self, number: int, at_vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a chunk's parts of L_imp and L_kl (2,), and what has its whole gradient."""
        chunk = self.share.chunks[number]
        states, vectors = self.kept.pop(number) if number in self.kept else self._pass(number)
        logits_at_once = part_of(LOGITS_AT_ONCE, self.share.at_once)
        # Where a chunk's gradients are computed next, few logits can stay until then; else they are built once more.
        stay = self.share.at_once > 1 and len(chunk.answers) + len(chunk.own) <= logits_at_once
        part = _written(self.encoder, self.batch, states, chunk, logits_at_once=logits_at_once, logits_stay=stay)
        total = _weighted(part, self.objective)
        if at_vectors is not None:
            total = total + (vectors * _at(at_vectors, chunk.pooled)).sum()
        return part, total

    def _pass(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the states of a chunk and its vectors."""
        chunk, seed = self.share.chunks[number], self.seeds[number]
        if self.share.at_once == 1:
            torch.manual_seed(seed)  # of a dropout of the model's own, and of a GPU's
        # What is computed again in the backward pass finds PyTorch's own generator as it was, and no other.
        with nullcontext() if self.encoder.computes_again else drawing_from(seed):
            wanted = self.encoder.wanted(chunk.pooled_places, chunk.answer_places, chunk.own_places)
            states = self.encoder(chunk.group, shared=self.batch.trie.shared, wanted=wanted)
        return states, _vectors(self.encoder, states, chunk)


def _add(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Add gradients to those that the parameters have. Two parameters may have got the same one, so it is copied."""
    for weight, gradient in gradients.items():
        first = weight.grad is None
        weight.grad = gradient.clone(memory_format=torch.contiguous_format) if first else weight.grad.add_(gradient)  # type: ignore[union-attr]


def _weighted(written: Tensor, objective: ObjectiveSettings) -> Tensor:
    """Return λ · L_imp + β · L_kl of parts (2,)."""
    return objective.implicit_weight * written[0] + objective.kl_weight * written[1]


def own_share(encoder: Encoder, batch: Batch, memory_tokens: int) -> Share:
    """Share the rows of a batch out, so that all processes have as many tokens, and chunk those of this one."""
    trie = batch.trie
    owner_of_row = share_out(trie.row_lengths)
    shares = [np.flatnonzero(owner_of_row == process) for process in range(count())]
    keeps_graph = max(int(trie.row_lengths[rows].sum()) for rows in shares) <= memory_tokens
    at_once = chunks_that_fit(encoder, None if keeps_graph else memory_tokens)
    # Cut for all that could be at once, whether memory lets them or not: their dropout goes by chunk.
    at_most, padded = encoder.chunks_at_once(), not (trie.shared and encoder.unpadded)
    chunked = [_even_chunks(trie, rows, encoder.chunk_tokens, at_most, padded=padded) for rows in shares]
    groups = [row_group(trie, rows) for rows in chunked[rank()]]
    pooled_nodes = np.unique(np.concatenate([batch.query_nodes, batch.candidate_nodes]))
    owners = owner_of_row[trie.rows_of(pooled_nodes)]
    own = np.flatnonzero(owners == rank())
    asked = pooled_nodes[own], batch.answer_nodes, batch.own_nodes
    chunks = [_Chunk(group, *chain.from_iterable(map(group.find, asked))) for group in groups]
    # Shared weights are gathered for every pass, by all processes, so that all make as many.
    passes = max(map(len, chunked)) if is_sharded(encoder) else 1
    return Share(
        pooled_nodes,
        owners,
        own,
        chunks + [_idle_chunk(batch)] * (passes - len(chunks)),
        keeps_graph,
        at_once,
    )


def chunks_that_fit(encoder: Encoder, memory_tokens: int | None = None) -> int:
    """Return how many chunks learn at the same time, with at most memory_tokens and MOST_GRADIENT_BYTES of gradients."""
    one = AHEAD * sum(weight.numel() * weight.element_size() for weight in encoder.trainable().values())
    most = [encoder.chunks_at_once(), MOST_GRADIENT_BYTES // max(1, one)]
    most += [] if memory_tokens is None else [memory_tokens // encoder.chunk_tokens]
    return num_workers(min(most))


def _even_chunks(trie: TokenTrie, rows: IntArray, most: int, at_once: int, *, padded: bool) -> list[IntArray]:
    """Group rows into chunks of at most `most` tokens, with which those that are computed at once have as much to do.

    padded: a chunk takes as long as its tokens and its padding, else as its tokens alone.
    """
    if not len(rows):
        return []
    tokens = int(trie.row_lengths[rows].sum())
    wanted = at_once * math.ceil(tokens / (at_once * most))
    if tokens < wanted * LEAST_CHUNK_TOKENS:
        return trie.chunks(min(most, LEAST_CHUNK_TOKENS) if at_once > 1 else most, rows)
    if padded:
        sizes = np.linspace(tokens / wanted, most, SIZES).astype(int).tolist()
        tried = (trie.chunks(size, rows) for size in sizes)
        return next((chunks for chunks in tried if len(chunks) <= wanted), trie.chunks(most, rows))
    counts = range(wanted, wanted + MORE_CHUNKS * at_once + 1, at_once)
    cut = ((count, trie.parts(count, most, rows)) for count in counts)
    return next((parts for count, parts in cut if len(parts) == count), trie.parts(wanted, most, rows))


def _idle_chunk(batch: Batch) -> _Chunk:
    """Return a chunk of which nothing is asked, for a process that has no rows left."""
    nothing = np.zeros(0, dtype=np.int64)
    return _Chunk(row_group(batch.trie, np.zeros(1, dtype=np.int64)), *([nothing] * 6))


def _explicit(encoder: Encoder, batch: Batch, objective: ObjectiveSettings, own: Tensor, share: Share) -> Tensor:
    """Return L_exp from this process's vectors (n, D) and those of the others, or 0 where it is off."""
    if not len(batch.positives):
        return torch.zeros((), device=encoder.device)
    device, vectors = encoder.device, gather_rows(own, share.owners)
    rows = [on_device(np.searchsorted(share.pooled_nodes, nodes), device)
            for nodes in (batch.query_nodes, batch.candidate_nodes)]  # fmt: skip
    query, candidates = vectors[rows[0]], vectors[rows[1]]
    return dual_view_loss(
        query,
        candidates,
        log_scale=encoder.log_inverse_temperature,
        margin=objective.margin,
        views=objective.views,
        positives=on_device(batch.positives, device),
        masked=on_device(batch.masked, device),
        own_heads=on_device(batch.own_heads, device) if objective.self_negatives == "capped" else None,
    )


def _written(
    encoder: Encoder, batch: Batch, states: Tensor, chunk: _Chunk, *, logits_at_once: int, logits_stay: bool
) -> Tensor:
    """Return a chunk's parts of L_imp and L_kl (2,), each a mean over all its tokens in the batch."""
    implicit = _sum_of_logits(
        encoder, states, chunk.answer_places, completion_loss_sum, [batch.answer_tokens[chunk.answers]],
        needed=len(batch.answer_nodes) > 0, at_once=logits_at_once, stay=logits_stay,
    )  # fmt: skip
    kl = _sum_of_logits(
        encoder, states, chunk.own_places, kl_sum,
        [batch.own_likely[chunk.own].astype(np.int64), batch.own_log_p[chunk.own]], needed=len(batch.own_nodes) > 0,
        at_once=logits_at_once, stay=logits_stay,
    )  # fmt: skip
    return torch.stack([implicit / max(1, len(batch.answer_nodes)), kl / max(1, len(batch.own_nodes))])


def _sum_of_logits(
    encoder: Encoder, states: Tensor, places: IntArray, loss_sum: Callable[..., Tensor], targets: Sequence[npt.NDArray[Any]],
    *, needed: bool, at_once: int, stay: bool,
) -> Tensor:  # fmt: skip
    """Return the summed loss of the logits at some places, at_once places at a time.

    They are built, used and, unless they stay, built again. targets: arrays (T, ...) of what the loss wants beside the logits;
    needed: whether any process has such places.
    """
    if not len(places):
        return _nothing(encoder, states, with_logits=needed)
    read, wanted = _at(states, places), [on_device(target, encoder.device) for target in targets]

    def part(some_states: Tensor, *some_targets: Tensor) -> Tensor:
        return loss_sum(encoder.logits(some_states), *some_targets)

    bounds = range(0, len(places), at_once)
    pieces = [[tensor[start : start + at_once] for tensor in (read, *wanted)] for start in bounds]
    again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([(part if stay else again)(*piece) for piece in pieces]).sum()


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
    return states[on_device(places, states.device)]


def _in_order(vectors: list[Tensor], chunks: list[_Chunk], count: int) -> Tensor:
    """Return the vectors (count, D) of all chunks in the order of their pooled nodes."""
    order = np.concatenate([chunk.pooled for chunk in chunks])
    assert len(order) == count
    return _at(torch.cat(vectors), np.argsort(order))
