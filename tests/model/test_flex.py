"""Claims about FlexAttention: its rule, its blocks and what a model computes with it are those of the mask of SDPA."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import transformers.integrations.flex_attention as flex_of_transformers
from torch import Tensor
from torch.nn.attention import flex_attention

from pykalm.model import packing
from pykalm.model.attention import BLOCK, FLEX, padded_to_blocks, trie_attention, visible, visible_blocks
from pykalm.model.encoder import Encoder
from pykalm.model.packing import choose_passes
from pykalm.text.trie import TokenTrie, build_trie, row_group
from tests.laws.common import build_batch, gradients, largest_difference, tiny_encoder, tiny_graph, tiny_verbalizer

NO_GPU = "needs an NVIDIA GPU: PyTorch has FlexAttention's compiled backward for CUDA only"
FAMILIES = ("llama", "mistral-sliding", "qwen3", "gemma3")


def random_trie(seed: int, *, row_tokens: int) -> TokenTrie:
    """Return texts over three tokens, which share prefixes in every way, and a few long ones that fill blocks."""
    generator = np.random.default_rng(seed)
    short = [generator.integers(0, 3, size=generator.integers(1, 60)) for _ in range(30)]
    stem = generator.integers(0, 3, size=200)
    return build_trie([*short, *(np.append(stem, [i, i]) for i in range(40))], row_tokens=row_tokens)


def tensors(trie: TokenTrie) -> tuple[Tensor, Tensor, Tensor]:
    group = row_group(trie, np.arange(len(trie.row_lengths)))
    return tuple(torch.from_numpy(part) for part in (group.token_ids, group.depths, group.ends))  # type: ignore[return-value]


@pytest.mark.parametrize("window", [None, 1, 9, 150])
@pytest.mark.parametrize("seed", range(4))
def test_the_rule_and_the_blocks_are_the_mask(seed: int, window: int | None) -> None:
    """Against a loop over the texts' paths: every block with a seen pair is listed, every full one has no unseen pair."""
    trie = random_trie(seed, row_tokens=384)
    token_ids, depths, ends = tensors(trie)
    blocks_needed = max(-(-ends.shape[1] // BLOCK), seed * 2)
    _, depths, ends = padded_to_blocks(token_ids, depths, ends, width=blocks_needed * BLOCK)
    rows, tokens = ends.shape
    assert tokens % BLOCK == 0
    expected = torch.eye(tokens, dtype=torch.bool).repeat(rows, 1, 1)  # padding sees itself
    row_of = np.searchsorted(trie.row_starts, np.arange(trie.num_nodes), side="right") - 1
    for path, length in zip(trie.paths, trie.lengths, strict=True):
        for place, node in enumerate(path[:length]):
            seen = path[max(0, place + 1 - (window or length)) : place + 1] - trie.row_starts[row_of[node]]
            expected[row_of[node], node - trie.row_starts[row_of[node]], seen] = True
    assert torch.equal(visible(ends, depths, window)[:, 0], expected)

    blocks, index = visible_blocks(ends, depths, window), torch.arange(tokens)
    row = torch.arange(rows)[:, None, None]
    assert torch.equal(blocks.mask_mod(row, row * 0, index[None, :, None], index[None, None, :]), expected)
    by_block = expected.view(rows, tokens // BLOCK, BLOCK, -1, BLOCK).transpose(2, 3)
    partly, full = (
        listed(blocks.kv_num_blocks, blocks.kv_indices),
        listed(blocks.full_kv_num_blocks, blocks.full_kv_indices),
    )
    assert not (partly & full).any()
    assert torch.equal(partly | full, by_block.any(-1).any(-1) | partly)
    if window is None:
        assert torch.equal(partly | full, by_block.any(-1).any(-1)), "no block is computed for nothing"
        assert torch.equal(full, by_block.all(-1).all(-1))
    else:
        assert by_block.all(-1).all(-1)[full].all()


def listed(counts: Tensor | None, numbers: Tensor | None) -> Tensor:
    """Return (rows, N, N), True where a block is among the first `counts` of its list."""
    assert counts is not None
    assert numbers is not None
    found = torch.zeros(counts.shape[0], counts.shape[2], numbers.shape[-1], dtype=torch.bool)
    for row in range(found.shape[0]):
        for query in range(found.shape[1]):
            found[row, query, numbers[row, 0, query, : counts[row, 0, query]].long()] = True
    return found


@contextmanager
def flex_without_compiling() -> Iterator[None]:
    """Compute FlexAttention by its own reference on the CPU, which has gradients; the compiled one has none there."""

    def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: object) -> Tensor:
        return flex_attention.flex_attention(query, key, value, **options)  # type: ignore[arg-type,return-value]

    with (
        mock.patch.object(flex_attention, "_validate_device"),
        mock.patch.object(flex_of_transformers, "compile_friendly_flex_attention", plain),
    ):
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_by_flex_attention_are_those_of_sdpa(family: str) -> None:
    """Law 1 for FlexAttention's rule, through transformers, windows included; rounding is below 1e-5."""
    verbalizer = tiny_verbalizer(tiny_graph())
    encoder = tiny_encoder(family, row_tokens=150)
    batch = build_batch(encoder, verbalizer)
    wanted_loss, wanted = gradients(encoder, batch)
    encoder.use_attention(FLEX)
    with flex_without_compiling():
        loss, found = gradients(encoder, batch)
    assert abs(loss.total - wanted_loss.total) < 1e-5
    assert largest_difference(found, wanted) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_vectors_by_compiled_flex_attention_are_those_of_sdpa(family: str) -> None:
    """The compiled kernel of the CPU skips blocks; texts fill several of them. Rounding is below 1e-5."""
    encoder = tiny_encoder(family, row_tokens=384, chunk_tokens=1200)
    texts = [*map(np.asarray, [path[:n] % 100 + 3 for path, n in [(np.arange(200), 150 + i) for i in range(40)]])]
    wanted = encoder.embed(texts)
    encoder.use_attention(FLEX)
    assert float((encoder.embed(texts) - wanted).abs().max()) < 1e-5


def test_compiled_groups_of_rows_are_as_wide_as_the_rows_of_a_training() -> None:
    """A form of another width would be compiled for itself, in the middle of a training; one text alone stays short."""
    encoder = tiny_encoder(row_tokens=384, chunk_tokens=1000)
    encoder.use_attention(FLEX)
    texts = [np.full(length, number) for number, length in enumerate((250, 240, 30))]
    for compiled, width in ((False, 256), (True, 384)):
        encoder.is_compiled, wide = compiled, mock.Mock(side_effect=trie_attention)
        with flex_without_compiling(), mock.patch("pykalm.model.encoder.trie_attention", wide), torch.no_grad():
            for some in (texts[:2], texts[2:]):
                trie = build_trie(some, row_tokens=encoder.row_tokens)
                encoder(row_group(trie, np.arange(len(trie.row_lengths))), shared=True)
                computed = int(np.prod(wide.call_args.args[1].shape))
                assert encoder.fill(trie) == trie.num_nodes / computed
        assert [tuple(call.args[1].shape) for call in wide.call_args_list] == [(2, width), (1, BLOCK)]


def test_a_device_without_cuda_takes_another_attention_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_encoder(attention="flex")
    choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert (encoder.attention, encoder.packed) == ("sdpa", True)
    assert "training.attention=flex needs CUDA" in caplog.text


def offered(encoder: Encoder) -> AbstractContextManager[object]:
    """Let the start check try FlexAttention first, as on CUDA."""
    return mock.patch.object(encoder, "faster_attentions", return_value=[FLEX])


def test_the_start_check_keeps_flex_attention_that_is_exact() -> None:
    encoder = tiny_encoder()
    with flex_without_compiling(), offered(encoder):
        choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert (encoder.attention, encoder.packed) == (FLEX, True)


def test_the_start_check_leaves_flex_attention_that_reads_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    def causal(ends: Tensor, depths: Tensor, window: int | None = None) -> flex_attention.BlockMask:
        tokens = ends.shape[1]
        return visible_blocks(torch.full_like(ends, tokens), depths, window)

    encoder = tiny_encoder()
    with flex_without_compiling(), offered(encoder), mock.patch("pykalm.model.attention.visible_blocks", causal):
        choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert (encoder.attention, encoder.packed) == ("sdpa", True)
    assert "does not read a token trie exactly by FlexAttention" in caplog.text


def test_the_start_check_leaves_flex_attention_that_learns_otherwise() -> None:
    """On a CPU PyTorch refuses the gradient; and a gradient that is off by more than rounding is seen."""
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    encoder.use_attention(FLEX)
    texts = packing._sample_texts(verbalizer)
    assert not packing._learns_like(encoder, "sdpa", texts)
    with flex_without_compiling():
        assert packing._learns_like(encoder, "sdpa", texts)
        with mock.patch.dict(packing.GRADIENT_TOLERANCE, {torch.float32: -1.0}), offered(encoder):
            assert not packing._learns_like(encoder, "sdpa", texts)
            encoder.use_attention("sdpa")
            choose_passes(encoder, verbalizer)
    assert (encoder.attention, encoder.packed) == ("sdpa", True)


def test_the_start_check_leaves_flex_attention_to_models_whose_attention_has_dropout() -> None:
    """FlexAttention refuses it, in train mode only: found at the first step it would be the end of the training."""
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    for module in encoder.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with flex_without_compiling(), offered(encoder):
        choose_passes(encoder, verbalizer)
    assert (encoder.attention, encoder.packed, encoder.training) == ("sdpa", True, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_on_a_gpu_are_those_of_sdpa(family: str) -> None:
    """Compiled, forward and backward; float32 matrix products on a GPU round to 1e-3 at most."""
    verbalizer = tiny_verbalizer(tiny_graph())
    encoder = tiny_encoder(family, row_tokens=150).cuda()
    batch = build_batch(encoder, verbalizer)
    wanted_loss, wanted = gradients(encoder, batch)
    encoder.use_attention(FLEX)
    loss, found = gradients(encoder, batch)
    assert abs(loss.total - wanted_loss.total) < 1e-3
    assert largest_difference(found, wanted) < 5e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_the_start_check_chooses_flex_attention_on_a_gpu() -> None:
    encoder = tiny_encoder(precision="bf16").cuda()
    choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert (encoder.attention, encoder.packed) == (FLEX, True)
