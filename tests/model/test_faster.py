"""Claims about what makes a pass faster and changes nothing: dropout's numbers, attention by products, compiled layers."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from pykalm.errors import ModelError
from pykalm.model import compiled, unpadded
from pykalm.model.compiled import compile_layers
from pykalm.model.dropout import Dropout
from pykalm.model.layers import find_layers
from pykalm.model.matmul_attention import NAME, matmul_attention
from pykalm.text.trie import build_trie, row_group
from tests.laws.common import (
    build_batch,
    gradients,
    hands_nothing_on,
    largest_difference,
    tiny_encoder,
    tiny_graph,
    tiny_verbalizer,
)
from tests.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype: torch.dtype) -> None:
    """Of 2^20 numbers 5 % are dropped, give or take 0.1 % (five deviations); the rest are divided by 0.95."""
    torch.manual_seed(0)
    x = torch.ones(1 << 20, dtype=dtype, requires_grad=True)
    y = Dropout(0.05).train()(x)
    assert abs(float((y == 0).float().mean()) - 0.05) < 1e-3
    assert torch.allclose(y[y != 0].float(), torch.tensor(1 / 0.95), rtol=4e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_is_a_function_of_the_seed_and_nothing_in_evaluation() -> None:
    dropout, x = Dropout(0.3).train(), torch.randn(7, 33)
    torch.manual_seed(5)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(5)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert torch.isfinite(Dropout(1 - 1e-9).train()(x)).all(), "one in 65,536 is the least that is kept"


def test_attention_by_products_equals_the_fused_kernel_with_grouped_heads_and_a_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(2))
    sees = torch.rand(2, 1, 5, 5, generator=generator) < 0.5
    sees |= torch.eye(5, dtype=torch.bool)
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    module = torch.nn.Linear(1, 1).eval()
    found, _ = matmul_attention(module, query, key, value, added, scaling=0.3)
    repeated = (part.repeat_interleave(2, dim=1) for part in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=sees, scale=0.3)
    assert torch.allclose(found, wanted.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("length", [31, 32, 40, 41, 63, 122])
def test_keys_that_fill_vectors_up_are_seen_by_none(length: int) -> None:
    """In bfloat16, vectors and gradients, within its rounding of float32, in which nothing is filled up."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    sees = torch.rand(2, 1, length, length, generator=generator) < 0.3
    sees |= torch.eye(length, dtype=torch.bool)
    module, results = torch.nn.Linear(1, 1).eval(), []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [part.to(dtype).requires_grad_() for part in given]
        added = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        found, _ = matmul_attention(module, *inputs, added, scaling=0.3)
        gradients_found = torch.autograd.grad(found.float().square().sum(), inputs)
        results.append([found.detach(), *gradients_found])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.shape == exact.shape
        assert float((rounded.float() - exact).norm() / exact.norm()) < 0.02


def test_attention_by_products_stays_finite_where_padding_at_the_left_sees_nothing() -> None:
    """Float32 weights computed in bfloat16: the mask that transformers makes is float32, and its least number is none there."""
    model = tiny_model("llama").eval()
    texts, real = torch.arange(16).reshape(2, 8) + 3, torch.ones(2, 8, dtype=torch.long)
    real[0, :3] = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(input_ids=texts, attention_mask=real).logits
        model.set_attn_implementation(NAME)
        found = model(input_ids=texts, attention_mask=real).logits
    assert torch.allclose(found[real == 1], wanted[real == 1], atol=0.1)


def test_rows_end_to_end_are_attended_to_as_padded_rows_are_with_dropout_and_without() -> None:
    """Rows of 40 and 37, four heads for two; dropout of the weights draws the same numbers for both. Gradients too."""
    trie = build_trie(
        [np.arange(number, number + length) for number, length in ((0, 40), (50, 30), (90, 7))], row_tokens=40
    )
    group, generator = row_group(trie, np.arange(2)), torch.Generator().manual_seed(0)
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    given = unpadded.arguments(config, group, unpadded.layout(group), torch.float32)
    places, inside = given[unpadded.ARGUMENT], torch.from_numpy(np.flatnonzero(group.nodes >= 0))
    parts = [torch.randn(1, heads, 77, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    padded = [
        unpadded.by_row(part, where).view(2, -1, 40, 8)
        for part, where in zip(parts, (places.queries, places.keys, places.keys), strict=True)
    ]
    for dropout in (0.0, 0.5):
        results = []
        for query, mask, options in (
            (parts, given["attention_mask"], {unpadded.ARGUMENT: places}),
            (padded, given["attention_mask"].view(2, 1, 40, 40), {}),
        ):
            torch.manual_seed(0)
            mixed, _ = matmul_attention(torch.nn.Linear(1, 1), *query, mask, dropout=dropout, **options)
            results.append(mixed.reshape(-1, 4, 8)[... if options else inside])
        assert torch.equal(*results)
        found = [torch.autograd.grad(mixed.square().sum(), parts, retain_graph=True) for mixed in results]
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


def test_attention_by_products_refuses_what_it_does_not_compute() -> None:
    part = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="softcap not computed here"):
        matmul_attention(torch.nn.Linear(1, 1), part, part, part, None, softcap=30.0)


def test_the_layers_of_every_family_are_found() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        assert [len(stack) for _, stack in find_layers(model)] == [model.config.num_hidden_layers], family


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_dropouts_of_equal_inputs_draw_other_numbers() -> None:
    """A compiler that takes two calls that look alike for one would drop the same elements in both."""
    one, other, x = Dropout(0.5).train(), Dropout(0.5).train(), torch.ones(64, 64)
    first, second = torch.compile(lambda x: (one(x), other(x)), fullgraph=True)(x)
    assert 0.3 < float((first == second).float().mean()) < 0.7


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_layers_give_the_same_gradients() -> None:
    """Float32; fused operations round otherwise, by less than 1e-4 of a gradient's length."""
    encoder = tiny_encoder(row_tokens=48).train()
    batch = build_batch(encoder, tiny_verbalizer(tiny_graph()))
    plain_loss, plain = gradients(encoder, batch)
    compile_layers(encoder)
    loss, compiled = gradients(encoder, batch)
    assert abs(loss.total - plain_loss.total) < 1e-5
    assert largest_difference(compiled, plain) < 1e-4
    group = row_group(batch.trie, np.array([0]))
    assert encoder(group, shared=True).shape == (group.token_ids.size, encoder.width)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_compiled_dropout_is_a_function_of_the_seed() -> None:
    """Gradient caching and a resumed run draw again what was drawn; a compiler may draw other numbers than PyTorch."""
    dropout, x = Dropout(0.3).train(), torch.randn(7, 33)
    dropout.compile(dynamic=True)
    torch.manual_seed(5)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(5)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_a_machine_that_cannot_compile_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TorchDynamoException("no working C++ compiler found")

    encoder = tiny_encoder().train()
    monkeypatch.setattr(compiled, "_passes_and_gradient", refuse)
    with pytest.raises(
        ModelError, match=r"training\.compile: wanted to compile.*no working C\+\+.*training\.compile=false"
    ):
        compile_layers(encoder)
    assert encoder.training


def test_compilation_is_tried_in_the_precision_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are float32 beside weights in bfloat16: outside autocast they do not go together."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    compile_layers(tiny_encoder(precision="bf16"))


@pytest.mark.parametrize("learns", [True, False])
def test_attention_computes_float32_weights_in_bfloat16_and_learns_from_them(learns: bool) -> None:
    """Queries are float32 there, and autocast ends before the gradient; a fused kernel's is within the rounding of both."""
    model = tiny_model("llama").train()
    tokens, found = torch.arange(16).reshape(2, 8) + 3, []
    model.model.embed_tokens.weight.requires_grad_(learns)
    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model(input_ids=tokens)[0]
        states.float().square().sum().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.1


def test_a_mask_that_learns_has_its_gradient() -> None:
    """As in families whose mask is computed from their values; against the fused kernel."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    above = torch.randn(2, 5, 3, 8, generator=generator)
    masks = [torch.zeros(2, 1, 5, 5).requires_grad_() for _ in range(2)]
    found, _ = matmul_attention(torch.nn.Linear(1, 1), query, key, value, masks[0], scaling=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=masks[1], scale=0.3)
    (found * above).sum().backward()
    (wanted.transpose(1, 2) * above).sum().backward()
    assert torch.allclose(masks[0].grad, masks[1].grad, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_several_rows_see_learn_from_all_of_them(dtype: torch.dtype) -> None:
    """Four texts of 35 tokens, of which the first 20 are the same, in rows of 40; against plain attention of prefixes."""
    texts = [
        *(np.concatenate([np.arange(20), 100 * number + np.arange(15)]) for number in range(1, 5)),
        np.arange(900, 930),
    ]
    trie = build_trie(texts, row_tokens=40)
    group = row_group(trie, np.arange(len(trie.row_lengths)))
    where, config = unpadded.layout(group), SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    given = unpadded.arguments(config, group, where, dtype)
    count = len(where.chosen)
    assert (count, trie.num_nodes) == (110, 170)
    rows, columns = np.divmod(where.chosen, group.ends.shape[1])
    sees = torch.zeros(count, count, dtype=torch.bool)
    for token, (row, column) in enumerate(zip(rows, columns, strict=True)):
        seen = np.flatnonzero(group.ends[row, : column + 1] > column)
        sees[token, where.of[row * group.ends.shape[1] + seen]] = True
    assert sees.sum(1).tolist() == (group.depths.ravel()[where.chosen] + 1).tolist()

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, count, 4, 8, generator=generator)
    plain = [torch.randn(1, heads, count, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    query, key, value = plain[0], *(part.repeat_interleave(2, dim=1) for part in plain[1:])
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=sees).transpose(1, 2)
    (wanted * weights).sum().backward()
    parts = [part.detach().to(dtype).requires_grad_() for part in plain]
    options = {unpadded.ARGUMENT: given[unpadded.ARGUMENT]}
    found, _ = matmul_attention(torch.nn.Linear(1, 1), *parts, given["attention_mask"], **options)
    (found.float() * weights).sum().backward()
    for one, other in zip(
        [wanted, *(part.grad for part in plain)], [found, *(part.grad for part in parts)], strict=True
    ):
        assert float((one - other).norm() / one.norm()) < (1e-5 if dtype == torch.float32 else 0.02)
    single = row_group(trie, np.array([0]))
    alone = unpadded.arguments(config, single, unpadded.layout(single), dtype)[unpadded.ARGUMENT]
    assert len(alone.repeats) == len(alone.into) == 2  # so that a row which repeats nothing is no form of its own


def test_attention_that_nothing_depends_on_moves_nothing_and_no_zeros_are_made_for_its_weights() -> None:
    parts = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    mixed = matmul_attention(torch.nn.Linear(1, 1), *parts, None)[0]
    nothing = torch.autograd.grad(hands_nothing_on(mixed).sum(), parts, allow_unused=True, retain_graph=True)
    assert nothing == (None, None, None)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(mixed, parts, torch.ones_like(mixed))
    assert "aten::zeros" not in {event.name for event in profile.events() or []}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_is_told_what_the_operations_return(dtype: torch.dtype) -> None:
    """Values of another width, a mask, keys that are no whole vectors, rows end to end; LoRA with dropout and without."""
    query, key = torch.randn(2, 4, 40, 8, dtype=dtype), torch.randn(2, 2, 40, 8, dtype=dtype)
    value, mask = torch.randn(2, 2, 40, 6, dtype=dtype), torch.zeros(2, 1, 40, 40, dtype=dtype)
    parts = [part.requires_grad_() for part in (query, key, value)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.kalm.attend.default, (*parts, mask, *[None] * 7), test_utils=checks)
    inside = np.arange(40) < np.array([40, 33])[:, None]
    missing = unpadded.missing_lanes(40, dtype)
    end_to_end = [torch.randn(1, *part.shape[1:], dtype=dtype) for part in (query, key, value)]
    chained = [torch.cat([part, part], dim=2)[:, :, : inside.sum()].requires_grad_() for part in end_to_end]
    by_query = torch.zeros(1, 1, 80, 40 + missing, dtype=dtype)
    where = unpadded.Layout(np.flatnonzero(inside), np.where(inside, inside.cumsum().reshape(2, 40) - 1, 0).ravel())
    places = unpadded._places(inside, where, missing, 4, 2)
    torch.library.opcheck(torch.ops.kalm.attend.default, (*chained, by_query, *places), test_utils=checks)
    x, weight = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True), torch.randn(6, 8, dtype=dtype)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((2, 8), (6, 2)))
    small = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 8), (2, 6)))
    for number, p in ((None, 0.0), (torch.tensor(3), 0.3)):
        arguments = (x, weight, None, a, b, number, 2.0, p)
        torch.library.opcheck(torch.ops.kalm.lora_product.default, arguments, test_utils=checks)
    kept = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    torch.library.opcheck(
        torch.ops.kalm.lora_product_beside.default, (x, kept, weight, None, *small), test_utils=checks
    )
    torch.library.opcheck(torch.ops.kalm.random_words.default, (x.detach(), torch.tensor(3)), test_utils=checks[:1])


def test_what_is_kept_compiled_is_kept_under_the_sources_of_all_our_operations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch looks into none of them, and would call a new version as it called the old one."""
    package = Path(compiled.__file__).parents[1]
    with_operations = {file for file in package.rglob("*.py") if "\n@operation(" in file.read_text(encoding="utf-8")}
    assert with_operations == {Path(str(module.__file__)) for module in compiled.WITH_OPERATIONS}

    def kept_under(source: str) -> str:
        (tmp_path / "operations.py").write_text(source, encoding="utf-8")
        compiled._operations.cache_clear()
        return str(compiled._options(torch.device("cpu"))["options"]["aot_inductor.metadata"])

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "WITH_OPERATIONS", [SimpleNamespace(__file__=str(tmp_path / "operations.py"))])
        assert kept_under("one") == kept_under("one") != kept_under("another")
    compiled._operations.cache_clear()


def test_a_layer_is_compiled_in_as_many_forms_in_a_thread_of_its_own() -> None:
    """PyTorch's own limit is 8; what is set is a thread's own in newer versions. Forms beyond it run as they are."""
    forms: list[int] = []

    def counted(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        forms.append(1)
        return graph

    doubled = torch.compile(lambda x: x * 2, backend=counted, dynamic=False, **compiled._limit())
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: [doubled(torch.ones(size)) for size in range(2, 14)]).result()
    assert len(forms) == 12


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
def test_nothing_is_compiled_any_more_for_the_first_rows_of_a_training() -> None:
    """Rows of several lengths, padded or end to end, with and without a gradient: all that is tried beforehand."""
    verbalizer = tiny_verbalizer(tiny_graph())
    for reads_unpadded in (False, True):
        encoder = tiny_encoder(precision="bf16", dropout=0.3, row_tokens=64, chunk_tokens=256)
        encoder.use_attention(NAME)
        encoder.reads_unpadded = reads_unpadded
        torch._dynamo.reset()
        compile_layers(encoder)
        trie, before = build_batch(encoder, verbalizer).trie, counters["stats"]["unique_graphs"]
        rows = trie.chunks(encoder.chunk_tokens)[0]
        assert len(set(trie.row_lengths[rows].tolist())) > 1
        compiled._passes_and_gradient(encoder.train(), [row_group(trie, rows)])
        assert counters["stats"]["unique_graphs"] == before > 0, reads_unpadded


def test_gradient_checkpointing_and_compiled_layers_do_not_go_together() -> None:
    encoder = tiny_encoder(dropout=0.3)
    encoder.causal_lm.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match=r"training\.compile: .*gradient checkpointing"):
        compile_layers(encoder)
    assert not encoder.training


def test_whatever_a_compiler_raises_leaves_the_layers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("expected size 8==12")

    encoder = tiny_encoder()
    monkeypatch.setattr(compiled, "_passes_and_gradient", refuse)
    with pytest.raises(ModelError, match=r"AssertionError: expected size 8==12.*training\.compile=false"):
        compile_layers(encoder)
    assert not any(layer._compiled_call_impl for _, stack in find_layers(encoder.causal_lm) for layer in stack)
