"""Law 2: cached (chunked) gradients are the one-shot gradients, with dropout, temperature included."""

import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from pykalm.config import ObjectiveSettings
from pykalm.learn import step
from pykalm.learn.batches import Batch
from pykalm.learn.losses import completion_loss_sum, dual_view_loss, kl_sum
from pykalm.learn.step import StepLoss, joint_gradient
from pykalm.model import dropout, lora
from pykalm.model.compiled import compile_layers
from pykalm.model.encoder import Encoder, pooled
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.text.texts import IntArray
from pykalm.text.trie import TokenTrie, row_group
from tests.laws.common import (
    build_batch,
    gradients,
    largest_difference,
    replaced,
    sparing,
    tiny_encoder,
    tiny_graph,
    tiny_verbalizer,
    torch_threads,
)


def test_cached_gradients_equal_one_shot_gradients() -> None:
    """Train mode with dropout 0.3; rounding is below 1e-5, other dropout numbers move gradients by more than 0.1."""
    for chunk_tokens in (64, 160):
        encoder = tiny_encoder(dropout=0.3, row_tokens=48, chunk_tokens=chunk_tokens).train()
        batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
        assert len(batch.trie.chunks(chunk_tokens)) > 1
        one_shot_loss, one_shot = gradients(encoder, batch)
        cached_loss, cached = gradients(encoder, batch, memory_tokens=1)
        assert "log_inverse_temperature" in cached
        assert float(cached["log_inverse_temperature"].abs()) > 1e-3
        assert abs(cached_loss.total - one_shot_loss.total) < 1e-5
        assert abs(cached_loss.implicit - one_shot_loss.implicit) < 1e-5
        assert abs(cached_loss.kl - one_shot_loss.kl) < 1e-5
        assert largest_difference(cached, one_shot) < 2e-5


def test_gradients_are_those_of_one_graph_over_all_chunks() -> None:
    """Written out with PyTorch alone: every state in its place, all losses, one backward pass. Without dropout."""
    encoder = tiny_encoder(row_tokens=48, chunk_tokens=64)
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
    settings = ObjectiveSettings()
    total = plain_loss(encoder, batch, settings)
    encoder.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    wanted = {name: weight.grad.clone() for name, weight in encoder.trainable().items() if weight.grad is not None}
    for memory_tokens in (1, 1 << 20):
        encoder.zero_grad(set_to_none=True)
        loss = joint_gradient(encoder, batch, settings, memory_tokens=memory_tokens)
        found = {name: weight.grad for name, weight in encoder.trainable().items() if weight.grad is not None}
        assert abs(loss.total - float(total.detach())) < 1e-5
        assert largest_difference(found, wanted) < 2e-5


def plain_loss(encoder: Encoder, batch: Batch, settings: ObjectiveSettings) -> torch.Tensor:
    """Return L of a batch, with its graph."""
    groups = [row_group(batch.trie, rows) for rows in batch.trie.chunks(encoder.chunk_tokens)]
    assert len(groups) > 1
    nodes = np.concatenate([group.nodes.ravel() for group in groups])
    states = torch.cat([encoder(group, shared=True) for group in groups])[
        torch.from_numpy(np.argsort(nodes, kind="stable"))
    ]
    states = states[int((nodes < 0).sum()) :]  # padding comes first
    query, candidates = (pooled(states[torch.from_numpy(some)]) for some in (batch.query_nodes, batch.candidate_nodes))
    own_heads = torch.from_numpy(batch.own_heads) if settings.self_negatives == "capped" else None
    explicit = dual_view_loss(
        query, candidates, log_scale=encoder.log_inverse_temperature, margin=settings.margin,
        positives=torch.from_numpy(batch.positives), masked=torch.from_numpy(batch.masked),
        own_heads=own_heads,
    )  # fmt: skip
    answers, own = (encoder.logits(states[torch.from_numpy(some)]) for some in (batch.answer_nodes, batch.own_nodes))
    implicit = completion_loss_sum(answers, torch.from_numpy(batch.answer_tokens)) / len(answers)
    likely, log_p = torch.from_numpy(batch.own_likely.astype(np.int64)), torch.from_numpy(batch.own_log_p)
    return explicit + settings.implicit_weight * implicit + settings.kl_weight * kl_sum(own, likely, log_p) / len(own)


def test_dropout_is_on_in_that_law() -> None:
    encoder = tiny_encoder(dropout=0.3).train()
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()))
    assert largest_difference(gradients(encoder, batch, seed=0)[1], gradients(encoder, batch, seed=1)[1]) > 0.1


def test_each_objective_alone_has_its_own_gradient() -> None:
    """The parts are linear: with λ the joint gradient is explicit + λ · implicit, cached or not."""
    encoder = tiny_encoder(row_tokens=48, chunk_tokens=64)
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()))
    for memory_tokens in (1, 1 << 20):
        explicit, one, three = (
            gradients(encoder, batch, memory_tokens=memory_tokens, implicit_weight=weight)[1] for weight in (0, 1, 3)
        )
        expected = {name: explicit[name] + 3 * (one[name] - explicit[name]) for name in one}
        assert largest_difference(three, expected) < 1e-4


def test_the_first_pass_is_left_out_where_no_vector_is_learned_from() -> None:
    """Without L_exp, cached gradients read every chunk once, and are those of one graph, dropout included."""
    encoder = tiny_encoder(dropout=0.3, row_tokens=48, chunk_tokens=64).train()
    verbalizer = tiny_verbalizer(tiny_graph())
    batch = build_batch(encoder, verbalizer, explicit=False)
    one_shot_loss, one_shot = gradients(encoder, batch)
    passes, right = [], Encoder.forward

    def counted(self: Encoder, *arguments: Any, **options: Any) -> torch.Tensor:
        passes.append(1)
        return right(self, *arguments, **options)

    with replaced(Encoder, "forward", counted):
        cached_loss, cached = gradients(encoder, batch, memory_tokens=1)
    assert len(passes) == len(batch.trie.chunks(encoder.chunk_tokens)) > 1
    assert cached_loss.explicit == one_shot_loss.explicit == 0
    assert abs(cached_loss.total - one_shot_loss.total) < 1e-5
    assert largest_difference(cached, one_shot) < 2e-5


def test_chunks_side_by_side_have_the_gradient_of_one_after_the_other() -> None:
    """Dropout 0.3, in one graph and with caching; the gradients of chunks are added in another order, which is below 2e-5."""
    for spares in (False, True):
        encoder = tiny_encoder(dropout=0.3, row_tokens=48, chunk_tokens=64).train()
        batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
        encoder = sparing(encoder) if spares else encoder
        for memory_tokens in (1 << 20, 2 * encoder.chunk_tokens):
            (loss, one), (side_loss, several) = (
                gradients_on(threads, encoder, batch, memory_tokens=memory_tokens) for threads in (1, 2)
            )
            assert abs(side_loss.total - loss.total) < 1e-5
            assert several.keys() == one.keys()
            assert largest_difference(several, one) < 2e-5


def test_chunks_end_to_end_have_the_gradient_of_padded_ones_one_after_the_other() -> None:
    """Cut to equal tokens for two threads, without dropout, which goes by chunk; in one graph and with caching.

    The last layer is computed in part there, and what rows repeat once.
    """
    encoder = tiny_encoder(row_tokens=48, chunk_tokens=128).train()
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
    encoder.use_attention(MATMUL_ATTENTION)
    loss, padded = gradients_on(1, encoder, batch)
    sparing(encoder)
    cuts, right = [], TokenTrie.parts

    def noted(*arguments: Any) -> list[IntArray]:
        cuts.append(right(*arguments))
        return cuts[-1]

    with replaced(step, "LEAST_CHUNK_TOKENS", 16), replaced(TokenTrie, "parts", noted):
        for memory_tokens in (1 << 20, 256):
            other_loss, other = gradients_on(2, encoder, batch, memory_tokens=memory_tokens)
            assert abs(other_loss.total - loss.total) < 1e-5
            assert largest_difference(other, padded) < 2e-5
    assert cuts
    assert all(len(cut) % 2 == 0 for cut in cuts)


def test_dropout_does_not_depend_on_the_memory_that_lets_chunks_be_computed_at_once() -> None:
    """Two threads, dropout 0.3, chunks cut for both: with a graph of all, with two at once, and with one at a time."""
    encoder = tiny_encoder(dropout=0.3, row_tokens=48, chunk_tokens=128).train()
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
    with replaced(step, "LEAST_CHUNK_TOKENS", 16):
        rows = np.arange(len(batch.trie.row_lengths))
        one, two = (step._even_chunks(batch.trie, rows, 128, at, padded=True) for at in (1, 2))
        assert len(two) == len(one) + 1, "one more, so that both threads have as much to do"
        (_, kept), *cached = (gradients_on(2, encoder, batch, memory_tokens=tokens) for tokens in (1 << 20, 256, 1))
    for _, found in cached:
        assert largest_difference(found, kept) < 2e-5


def test_dropout_does_not_depend_on_the_order_in_which_layers_are_computed() -> None:
    """A compiler chooses the order of layers that do not depend on each other, and not the same with gradients and without."""
    encoder = tiny_encoder(dropout=0.3, row_tokens=48, chunk_tokens=64).train()
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
    loss, plain = gradients(encoder, batch)

    def up_first(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)  # type: ignore[no-any-return]

    with replaced(LlamaMLP, "forward", up_first):
        other_loss, other = gradients(encoder, batch)
    assert abs(other_loss.total - loss.total) < 1e-5
    assert largest_difference(other, plain) < 2e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_layers_have_the_gradients_of_plain_ones_with_dropout_cached_and_side_by_side() -> None:
    """The same dropout, whatever the order in which what is compiled draws it. Fused operations round otherwise, below 1e-4.

    The plain layers draw it here as compiled ones do, which would take them longer.
    """
    encoder = tiny_encoder(dropout=0.3, row_tokens=48, chunk_tokens=64).train()
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
    with replaced(lora.LoraLinear, "hashes_dropout", True):
        plain_loss, plain = gradients_on(1, encoder, batch)
    compile_layers(encoder)
    for threads, memory_tokens in ((1, 1 << 20), (1, 1), (2, 1 << 20), (2, 2 * encoder.chunk_tokens)):
        loss, compiled = gradients_on(threads, encoder, batch, memory_tokens=memory_tokens)
        assert abs(loss.total - plain_loss.total) < 1e-5
        assert largest_difference(compiled, plain) < 1e-4


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_a_compiler_that_gives_up_drops_nothing_else_in_the_second_pass() -> None:
    """One form of a layer is compiled, the next left plain, as beyond PyTorch's limits: gradients are those of one graph."""
    encoder = tiny_encoder(dropout=0.3, row_tokens=48, chunk_tokens=64).train()
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
    with torch_threads(1), torch._dynamo.config.patch(accumulated_recompile_limit=1):
        torch._dynamo.reset()  # what other tests compiled counts too
        compile_layers(encoder)
        one_shot_loss, one_shot = gradients(encoder, batch)
        cached_loss, cached = gradients(encoder, batch, memory_tokens=1)
    assert abs(cached_loss.total - one_shot_loss.total) < 1e-5
    assert largest_difference(cached, one_shot) < 1e-4


def gradients_on(
    threads: int, encoder: Encoder, batch: Batch, **settings: Any
) -> tuple[StepLoss, dict[str, torch.Tensor]]:
    """Return loss and gradients of a step with so many of PyTorch's threads, each of which then has chunks of its own."""
    with torch_threads(threads):
        assert step.chunks_that_fit(encoder) == threads
        return gradients(encoder, batch, **settings)


def second_pass_draws_other_dropout() -> AbstractContextManager[None]:
    right = step._Step._pass

    def wrong(self: step._Step, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seeds[number] += 1
        return right(self, number)

    return replaced(step._Step, "_pass", wrong)


def vectors_are_detached_from_the_temperature() -> AbstractContextManager[None]:
    """Take the temperature as a constant, as a parameter of the trainer would be. METHOD.md §7.2."""
    right = step.dual_view_loss

    def wrong(query: torch.Tensor, candidates: torch.Tensor, **rest: object) -> torch.Tensor:
        scale = rest.pop("log_scale")
        if query.is_leaf or query.grad_fn is None or not query.requires_grad:
            return right(query, candidates, log_scale=scale, **rest)  # type: ignore[arg-type]
        cached = type(query.grad_fn.next_functions[0][0]).__name__ == "AccumulateGrad"
        assert isinstance(scale, torch.Tensor)
        return right(query, candidates, log_scale=scale.detach() if cached else scale, **rest)  # type: ignore[arg-type]

    return replaced(step, "dual_view_loss", wrong)


def gradients_reach_the_wrong_chunk() -> AbstractContextManager[None]:
    """Join the chunks' vectors from the last chunk to the first, not in the order of their nodes."""
    return replaced(step, "_in_order", lambda vectors, chunks, count: torch.cat(vectors[::-1]))


def all_threads_draw_from_one_generator() -> AbstractContextManager[None]:
    return replaced(step, "drawing_from", lambda seed: nullcontext())


def dropout_goes_by_order() -> AbstractContextManager[None]:
    right = dropout._Drawing.of
    return replaced(dropout._Drawing, "of", lambda self, number: right(self, 0))


def whether_a_compiler_is_at_work_says_what_is_dropped() -> AbstractContextManager[None]:
    at_work = property(lambda self: torch.compiler.is_compiling(), lambda self, hashes: None)
    return replaced(lora.LoraLinear, "hashes_dropout", at_work)


def chunks_are_cut_for_those_that_memory_lets_be_at_once() -> AbstractContextManager[None]:
    right = step._even_chunks
    fit = step.chunks_that_fit
    asked: list[int] = []

    def noted(encoder: Encoder, memory_tokens: int | None = None) -> int:
        asked.append(fit(encoder, memory_tokens))
        return asked[-1]

    stack = ExitStack()
    stack.enter_context(replaced(step, "chunks_that_fit", noted))
    stack.enter_context(
        replaced(
            step,
            "_even_chunks",
            lambda trie, rows, most, _, **options: right(trie, rows, most, asked[-1] if asked else _, **options),
        )
    )
    return stack


def the_last_chunk_has_its_gradient_alone() -> AbstractContextManager[None]:
    def wrong(gradients: dict[torch.nn.Parameter, torch.Tensor]) -> None:
        for weight, gradient in gradients.items():
            weight.grad = gradient

    return replaced(step, "_add", wrong)


BREAKS = {
    "the second pass draws other dropout": second_pass_draws_other_dropout,
    "the cached pass forgets the temperature": vectors_are_detached_from_the_temperature,
    "gradients reach the wrong chunk": gradients_reach_the_wrong_chunk,
}
CHECKS = dict.fromkeys(BREAKS, "test_cached_gradients_equal_one_shot_gradients")
SIDE_BY_SIDE = {
    "all threads draw dropout from one generator": all_threads_draw_from_one_generator,
    "the last chunk's gradient replaces those before": the_last_chunk_has_its_gradient_alone,
}
BREAKS |= SIDE_BY_SIDE
CUT = "chunks are cut for those that memory lets be at once"
BREAKS[CUT] = chunks_are_cut_for_those_that_memory_lets_be_at_once
CHECKS[CUT] = "test_dropout_does_not_depend_on_the_memory_that_lets_chunks_be_computed_at_once"
ORDER = "dropout goes by the order in which layers are computed"
BREAKS[ORDER] = dropout_goes_by_order
CHECKS[ORDER] = "test_dropout_does_not_depend_on_the_order_in_which_layers_are_computed"
CHECKS["gradients reach the wrong chunk"] = "test_gradients_are_those_of_one_graph_over_all_chunks"
CHECKS |= dict.fromkeys(SIDE_BY_SIDE, "test_chunks_side_by_side_have_the_gradient_of_one_after_the_other")
if shutil.which("g++") is not None:
    GIVES_UP = "whether a compiler is at work says what is dropped"
    BREAKS[GIVES_UP] = whether_a_compiler_is_at_work_says_what_is_dropped
    CHECKS[GIVES_UP] = "test_a_compiler_that_gives_up_drops_nothing_else_in_the_second_pass"
