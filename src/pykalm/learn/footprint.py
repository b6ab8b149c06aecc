"""What a step of training takes in memory, measured on texts of the graph, and the chunks that a budget allows."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pykalm.errors import TrainingError
from pykalm.learn.batches import BatchBuilder
from pykalm.learn.losses import completion_loss_sum, dual_view_loss, kl_sum
from pykalm.learn.step import chunks_that_fit
from pykalm.memory import format_size
from pykalm.model.encoder import Encoder, pooled
from pykalm.model.likelihood import LOGITS_AT_ONCE
from pykalm.model.operations import FUNCTIONS
from pykalm.model.resident import resident_bytes
from pykalm.model.side_by_side import AHEAD
from pykalm.text.texts import IntArray
from pykalm.text.trie import RowGroup, TokenTrie, row_group

PLANNED_SHARE = 0.9
"""Share of a budget that is planned with; the rest is for gaps between allocations and the libraries' own buffers."""
GAPS = {"cpu": 2.5}
"""What the C library holds, by what tensors do: it keeps what is freed (measured 1.4 to 2.4). 1 on a GPU, in PLANNED_SHARE."""
OPTIMIZER_BYTES = 8
"""AdamW keeps two float32 moments of every weight that learns."""
SMALL, LARGE = 1, 3
"""Rows of the two measurements of a pass, whose difference is what more tokens take."""
PAIRS_SIDE = 256
"""Queries, and candidates, of the smaller of the two measurements of the contrastive loss."""
NARROW = 8
"""Width of that measurement's vectors: so few that the pairs are what counts."""
VECTOR_COPIES = 8
"""Float32 copies of all pooled vectors: by chunk, joined, as leaves, as queries and candidates, and the gradients."""
MASK_COPIES = 2
"""Byte masks of all pairs: as it is built, and on the device."""
MOST_CHUNK_TOKENS = {"cpu": 2048}
MOST_CHUNK_TOKENS_ELSEWHERE = 32768
"""More tokens in a pass make it no faster: measured on a CPU, assumed on a GPU."""


@dataclass(frozen=True)
class Footprint:
    """Hold bytes: `always` there, of which `weights_stage` only while the optimiser steps, and those that grow.

    per_token: of the graph and its gradient, by token of a pass; logits: of the largest part of a completion loss;
    similarity: of the contrastive loss and its gradient; vectors: of all pooled texts of a batch; row_tokens: the
    longest row, which no pass can be shorter than; gaps: what is held for a byte of those that come and go; at_once: passes
    that are computed side by side, where memory allows.
    """

    always: int
    weights_stage: int
    per_token: float
    logits: int
    similarity: int
    vectors: int
    row_tokens: int
    gaps: float = 1.0
    at_once: int = 1

    def one_graph(self, tokens: int) -> float:
        """Return the bytes at the worst moment of a step whose tokens are all in one graph."""
        held = self.similarity + self.vectors + self.logits + self.per_token * tokens
        return self.always + self.gaps * max(held, self.weights_stage)

    def cached(self, chunk_tokens: int) -> float:
        """Return the bytes at the worst moment of a step with gradient caching: similarities first, then chunks."""
        held = self.vectors + max(self.similarity, self.logits + self.per_token * chunk_tokens)
        return self.always + self.gaps * max(held, self.weights_stage)


@dataclass(frozen=True)
class Fit:
    """Hold the two numbers that a budget decides: see training.memory_tokens and training.chunk_tokens."""

    memory_tokens: int
    chunk_tokens: int


def fit_budget(footprint: Footprint, budget: int, *, device: torch.device) -> Fit:
    """Return the largest passes that stay within a budget of bytes. Raises TrainingError where not even a row does."""
    planned = PLANNED_SHARE * budget
    least = footprint.cached(footprint.row_tokens)
    if least > planned:
        raise TrainingError(
            f"training.memory: wanted at least {format_size(least / PLANNED_SHARE)} for one row of {footprint.row_tokens} "
            f"tokens ({format_size(footprint.always)} are there before the first text), found {format_size(budget)}. Give "
            "more, lower training.row_tokens or training.batch_size, or take a smaller model."
        )
    room = (planned - footprint.always) / footprint.gaps - footprint.vectors - footprint.logits
    most = MOST_CHUNK_TOKENS.get(device.type, MOST_CHUNK_TOKENS_ELSEWHERE)
    tokens = max(int(room / footprint.per_token) // footprint.at_once, footprint.row_tokens)
    rows = min(tokens, max(most, footprint.row_tokens)) // footprint.row_tokens
    whole = int((room - footprint.similarity) / footprint.per_token)
    return Fit(memory_tokens=max(1, whole), chunk_tokens=rows * footprint.row_tokens)


def measure_footprint(encoder: Encoder, builder: BatchBuilder, triples: IntArray, *, batch_size: int) -> Footprint:
    """Measure what training takes, on rows of the given triples' texts in train mode; leaves no gradient and no trace.

    batch_size: triples of a step, or half its directed ones, which bound the queries and candidates of its loss.
    """
    device, learned = encoder.device, list(encoder.trainable().values())
    moments = OPTIMIZER_BYTES * sum(weight.numel() for weight in learned)
    gradients = sum(weight.numel() * weight.element_size() for weight in learned)
    trie = _some_rows(encoder, builder, triples)
    queries = 2 * batch_size
    candidates = min(queries if builder.adds_inverses else 2 * queries, builder.graph.num_entities)
    was_training = encoder.training
    cuda = [device] if device.type == "cuda" else []
    # What is compiled hides its tensors from the count on a CPU; a GPU counts by itself, and FlexAttention needs it there.
    stance = "default" if cuda else "force_eager"
    with torch.random.fork_rng(devices=cuda), torch.compiler.set_stance(stance):
        try:
            encoder.train()
            _pass_and_gradient(encoder, trie, SMALL)  # what it leaves, as copies of weights, is always there
            encoder.zero_grad(set_to_none=True)
            resident = _resident_bytes(device)
            at_once = chunks_that_fit(encoder)
            waiting = AHEAD * at_once * gradients if at_once > 1 else 0
            per_token, beside = _bytes_of_a_pass(encoder, trie)
            logits = _bytes_of_logits(encoder, builder)
            similarity = _bytes_of_similarity(queries * candidates, device) if builder.explicit else 0
        finally:
            encoder.train(was_training)
            encoder.zero_grad(set_to_none=True)
            gc.collect()
    return Footprint(
        always=resident + gradients + waiting + moments + int(beside),
        weights_stage=moments,  # its temporaries are as large as what it keeps
        per_token=per_token,
        logits=logits,
        similarity=similarity,
        vectors=VECTOR_COPIES * 4 * encoder.width * (queries + candidates) if builder.explicit else 0,
        row_tokens=max(encoder.row_tokens, int(trie.row_lengths.max())),
        gaps=GAPS.get(device.type, 1.0),
        at_once=at_once,
    )


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes of tensors a piece of work held at its worst moment, beyond those that were there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveTensors() as live:
        work()
    return int(live.peak)


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add up the storages that operations make, backward ones too, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        own = FUNCTIONS.get(func)
        if own is None:
            result = func(*args, **kwargs)
        else:
            with self:  # an operation of our own: what it makes and lets go of counts too
                result = own(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given | self.live:
                self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors among some values; packed weights, which are oneDNN's, have none."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
    return [tensor.untyped_storage() for tensor in tensors]


def _resident_bytes(device: torch.device) -> int:
    """Return what the process holds now: of the GPU's memory where it computes there, else of the machine's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_reserved(device))
    return resident_bytes()


def _some_rows(encoder: Encoder, builder: BatchBuilder, triples: IntArray) -> TokenTrie:
    """Return the trie of the first triples that fill LARGE rows, or of all where they do not."""
    count = 4
    while True:
        trie = builder.build(triples[:count], np.random.default_rng(0)).trie
        if count >= len(triples) or trie.num_nodes >= (LARGE + 1) * encoder.row_tokens:
            return trie
        count *= 2


def _bytes_of_a_pass(encoder: Encoder, trie: TokenTrie) -> tuple[float, float]:
    """Return the bytes that a token of a pass takes, forward and backward, and those that a pass takes besides.

    As if rows repeated nothing, what is computed once for all that do, and every state were read: batches differ in both.
    """
    trie = replace(trie, twins=np.arange(trie.num_nodes, dtype=np.int32))
    small, large = (_longest_rows(encoder, trie, number) for number in (SMALL, LARGE))
    _pass_and_gradient(encoder, trie, SMALL)  # makes the gradients, which then are there
    low, high = (
        peak_bytes(lambda number=number: _pass_and_gradient(encoder, trie, number), encoder.device)  # type: ignore[misc]
        for number in (SMALL, LARGE)
    )
    few, many = (_computed_tokens(encoder, trie, group) for group in (small, large))
    if many == few:
        return low / few, 0.0
    per_token = (high - low) / (many - few)
    return per_token, max(0.0, low - per_token * few)


def _computed_tokens(encoder: Encoder, trie: TokenTrie, group: RowGroup) -> int:
    """Return the tokens that a pass over some rows of a trie computes, which repeat nothing."""
    return int((group.nodes >= 0).sum()) if trie.shared and encoder.unpadded else group.nodes.size


def _longest_rows(encoder: Encoder, trie: TokenTrie, number: int) -> RowGroup:
    """Return the longest rows of a trie, as many as hold the tokens of so many full ones."""
    longest = np.argsort(-trie.row_lengths, kind="stable")
    return row_group(trie, longest[: max(1, number * encoder.row_tokens // int(trie.row_lengths.max()))])


def _pass_and_gradient(encoder: Encoder, trie: TokenTrie, number: int) -> None:
    """Read so many rows and add the gradient of something to the parameters."""
    group = _longest_rows(encoder, trie, number)
    pooled(encoder(group, shared=trie.shared)).sum().backward()  # type: ignore[no-untyped-call]


def _bytes_of_logits(encoder: Encoder, builder: BatchBuilder) -> int:
    """Return the bytes of the largest part of the losses of logits that are trained, forward and backward."""
    states = torch.randn(LOGITS_AT_ONCE, encoder.width, device=encoder.device, requires_grad=True)
    targets = torch.zeros(LOGITS_AT_ONCE, dtype=torch.long, device=encoder.device)
    losses: list[Callable[[Tensor], Tensor]] = []
    if builder.completion_share:
        losses.append(lambda logits: completion_loss_sum(logits, targets))
    if len(builder.own_texts):
        log_p = torch.zeros(LOGITS_AT_ONCE, 2, device=encoder.device)
        losses.append(lambda logits: kl_sum(logits, targets[:, None], log_p))

    def work(loss: Callable[[Tensor], Tensor]) -> None:
        loss(encoder.logits(states)).backward()  # type: ignore[no-untyped-call]

    return max((peak_bytes(lambda loss=loss: work(loss), encoder.device) for loss in losses), default=0)  # type: ignore[misc]


def _bytes_of_similarity(pairs: int, device: torch.device) -> int:
    """Return the bytes of the contrastive loss of so many pairs of queries and candidates, its mask included."""

    def loss_of(side: int) -> int:
        vectors = torch.randn(2, side, NARROW, device=device, requires_grad=True)
        masked = torch.zeros(side, side, dtype=torch.bool, device=device)
        positives = torch.arange(side, device=device)[:, None].expand(-1, 2)
        log_scale = torch.zeros((), device=device, requires_grad=True)

        def work() -> None:
            dual_view_loss(
                vectors[0],
                vectors[1],
                log_scale=log_scale,
                margin=0.0,
                positives=positives,
                masked=masked,
                own_heads=positives[:, 1],
            ).backward()  # type: ignore[no-untyped-call]

        return peak_bytes(work, device)

    low, high = loss_of(PAIRS_SIDE), loss_of(2 * PAIRS_SIDE)
    per_pair = (high - 2 * low) / (2 * PAIRS_SIDE**2)  # what grows with the side alone falls out
    return int((per_pair + MASK_COPIES) * pairs)
