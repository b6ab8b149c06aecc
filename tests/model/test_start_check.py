"""Claims about the check at the start of a run: tokens that a model lacks, and passes that it cannot share."""

import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from pykalm.config import Config
from pykalm.errors import ModelError, OutOfMemoryError
from pykalm.model import last_layer, matmul_attention, packing, run, unpadded
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.settings import TrainingSettings
from pykalm.text.trie import row_group
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import replaced, tiny_encoder, tiny_graph, tiny_verbalizer
from tests.tiny_models import TOKENIZER_SIZE, tiny_model


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    encoder = Encoder(tiny_model("llama", vocab_size=50), source_fingerprint="small", precision="fp32")
    with pytest.raises(ModelError, match=r"wanted token ids below 50, found \d+. The tokenizer does not belong"):
        packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))


@pytest.mark.parametrize(("family", "shared"), [("llama", True), ("gemma3", True), ("mamba", False)])
def test_a_model_without_such_a_mask_takes_separate_passes_and_says_so(
    family: str, shared: bool, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = tiny_encoder(family)
    with caplog.at_level(logging.WARNING):
        packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert encoder.packed == shared
    assert ("separate passes" in caplog.text) == (not shared)


def the_argument_does_not_arrive() -> AbstractContextManager[None]:
    """As in families whose layers hand on to their attention what they know."""
    right = matmul_attention.matmul_attention

    def forgetful(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **{name: value for name, value in options.items() if name != unpadded.ARGUMENT})

    return mock.patch.dict(AttentionInterface._global_mapping, {matmul_attention.NAME: forgetful})


def keys_come_from_another_row() -> AbstractContextManager[None]:
    right = unpadded._places
    return replaced(unpadded, "_places", lambda *all_: (here := right(*all_))._replace(keys=here.keys.roll(1, dims=0)))


def layers_have_other_heads_than_the_config_says() -> AbstractContextManager[None]:
    right = unpadded._places
    return replaced(unpadded, "_places", lambda *found: right(*found[:3], 2 * found[3], found[4]))


def the_config_names_heads_by_layer() -> AbstractContextManager[None]:
    right = unpadded.arguments
    by_layer = SimpleNamespace(num_attention_heads=[4, 2], num_key_value_heads=2)
    return replaced(unpadded, "arguments", lambda config, *others: right(by_layer, *others))


@pytest.mark.parametrize(
    "refused",
    [the_argument_does_not_arrive, keys_come_from_another_row, layers_have_other_heads_than_the_config_says,
     the_config_names_heads_by_layer],
)  # fmt: skip
def test_a_model_that_does_not_read_rows_end_to_end_takes_padded_ones(
    refused: Callable[[], AbstractContextManager[None]],
) -> None:
    """With the faster attention as before; and what an earlier check found is forgotten."""
    for precision in ("fp32", "bf16"):
        encoder = tiny_encoder(precision=precision, row_tokens=48)
        packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
        assert encoder.unpadded
        with refused():
            packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
        assert encoder.packed
        assert encoder.attention == matmul_attention.NAME
        assert not encoder.unpadded
        encoder.embed([np.arange(3, 9), np.arange(20, 30)])


def parts_come_back_in_another_order() -> AbstractContextManager[None]:
    """As a part that looks at other tokens than its own would give them."""
    right = last_layer._widen
    return replaced(last_layer, "_widen", lambda module, inputs, output: right(module, inputs, output.flip(1)))


def parts_come_with_something_else() -> AbstractContextManager[None]:
    """As of experts that hand out whom they have asked."""
    right = last_layer._widen
    return replaced(last_layer, "_widen", lambda module, inputs, output: right(module, inputs, (output, None)))


def parts_are_given_more_than_a_state() -> AbstractContextManager[None]:
    right = last_layer._narrow
    return replaced(last_layer, "_narrow", lambda module, inputs: right(module, (*inputs, *inputs)))


@pytest.mark.parametrize(
    "refused", [parts_come_back_in_another_order, parts_come_with_something_else, parts_are_given_more_than_a_state]
)
def test_a_last_layer_that_cannot_be_computed_in_part_is_computed(
    refused: Callable[[], AbstractContextManager[None]],
) -> None:
    """Rows stay end to end, and a pass without the context is as it was."""
    for precision in ("fp32", "bf16"):
        encoder = tiny_encoder(precision=precision, row_tokens=48)
        with refused():
            packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
        assert (encoder.packed, encoder.unpadded, encoder.narrows) == (True, True, False)
        sound = tiny_encoder(precision=precision, row_tokens=48)
        packing.choose_passes(sound, tiny_verbalizer(tiny_graph()))
        assert (sound.packed, sound.unpadded, sound.narrows) == (True, True, True)


def test_a_part_that_is_wrapped_and_prepared_again_is_narrowed_once() -> None:
    """As by adapters that train a copy of it; without, the places of the inner one would be those of the outer one's input."""
    encoder, verbalizer = tiny_encoder(row_tokens=48), tiny_verbalizer(tiny_graph())
    packing.choose_passes(encoder, verbalizer)
    layer = encoder.causal_lm.model.layers[-1]
    layer.mlp = torch.nn.Sequential(layer.mlp)
    packing.choose_passes(encoder, verbalizer)
    assert encoder.narrows


def test_the_last_layer_is_computed_in_full_where_a_pass_asks_for_all_or_computes_again() -> None:
    encoder = tiny_encoder(row_tokens=48)
    packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    group = row_group(encoder.lay_out([np.arange(3, 9), np.arange(20, 30)]), np.arange(1))
    whole, part = encoder(group, shared=True), encoder(group, shared=True, wanted=np.array([7]))
    assert torch.allclose(part[7], whole[7], atol=1e-6)
    assert not torch.allclose(part[6], whole[6], atol=1e-3)
    computed: list[torch.Size] = []
    part_of_last = encoder.causal_lm.model.layers[-1].mlp
    noted = part_of_last.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape))
    nothing = encoder(group, shared=True, wanted=np.zeros(0, dtype=np.int64))
    noted.remove()
    assert computed == [(1, 1, encoder.width)]  # not every part takes no token at all
    assert nothing.shape == whole.shape
    assert torch.isfinite(nothing).all()
    encoder.causal_lm.gradient_checkpointing_enable()
    again = encoder.train()(group, shared=True, wanted=np.array([7]))
    assert torch.allclose(again, whole, atol=1e-6)
    assert encoder.wanted(np.array([3, 1]), np.array([2, 3])).tolist() == [1, 2, 3]
    encoder.pooling = "mean"
    assert encoder.wanted(np.array([3, 1])) is None


def test_rounding_is_measured_where_a_pass_holds_one_text_only() -> None:
    """Read alone twice, nothing would be rounded, and bfloat16 would be taken for a wrong mask."""
    encoder = tiny_encoder(precision="bf16", row_tokens=48, chunk_tokens=64)
    packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert encoder.packed


def test_embedding_reports_how_far_it_is_and_keeps_the_mode_and_order() -> None:
    encoder, verbalizer = tiny_encoder(row_tokens=16, chunk_tokens=32), tiny_verbalizer(tiny_graph())
    texts = verbalizer.candidates(torch.arange(6).numpy())
    seen: list[tuple[int, int]] = []
    encoder.train()
    vectors = encoder.embed(texts, progress=lambda done, total: seen.append((done, total)))
    assert encoder.training
    total = sum(map(len, texts))
    assert [whole for _, whole in seen] == [total] * len(seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 1
    assert torch.equal(encoder.embed(list(texts)[::-1]), vectors.flip(0))
    assert encoder.embed([]).shape == (0, encoder.width)


def test_a_model_that_bends_its_logits_in_an_unknown_way_is_not_trained_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    packing.require_own_logits(encoder, verbalizer)
    logits = encoder.logits
    monkeypatch.setattr(encoder, "logits", lambda states: logits(states) * 1.01)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM changes its logits.*objective\.implicit=false"):
        packing.require_own_logits(encoder, verbalizer)


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("opt", {"dropout": 0.1}),
        ("llama", {"attention_dropout": 0.3}),
    ],
)
def test_a_model_whose_config_has_dropout_is_taken_and_keeps_its_dropout_for_training(
    family: str, dropout: dict[str, float]
) -> None:
    """Their own defaults, which the tiny models of the other tests switch off."""
    model = add_adapter(tiny_model(family, vocab_size=TOKENIZER_SIZE, **dropout), rank=4)
    encoder = Encoder(model, source_fingerprint=family, precision="fp32")
    assert not any(module.training for module in encoder.modules())
    verbalizer = tiny_verbalizer(tiny_graph())
    packing.choose_passes(encoder, verbalizer)
    packing.require_own_logits(encoder, verbalizer)
    assert encoder.packed
    group = row_group(encoder.lay_out([verbalizer.query(0, 0)]), np.array([0]))
    encoder.train()
    assert not torch.equal(encoder(group, shared=True), encoder(group, shared=True))


def test_the_checked_texts_are_queries_candidates_and_completions_with_the_longest_of_many() -> None:
    """Forty triples of which one has a long head, that the few which are spread over the graph leave out."""
    rows = tuple((i % 6, 0, (i + 1 + i // 6) % 6) for i in range(40))
    graph = tiny_graph(tuple((3 if i == 11 else 0 if h == 3 else h, r, 1) for i, (h, r, _) in enumerate(rows)))
    graph = dataclasses.replace(graph, entity_names=(*graph.entity_names[:3], "cy" * 20, *graph.entity_names[4:]))
    verbalizer = tiny_verbalizer(graph)
    texts = {text.tobytes() for text in packing._sample_texts(verbalizer)}
    assert verbalizer.query(3, 0).tobytes() in texts
    assert verbalizer.candidate(3).tobytes() in texts
    assert verbalizer.completion(3, 0, 1).tokens.tobytes() in texts


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_text_longer_than_the_positions_of_a_model_is_said_at_the_start_and_when_it_is_read(family: str) -> None:
    """One token a byte; the longest text is looked for in loops, with completions and without. One position less fails."""
    verbalizer = tiny_verbalizer(tiny_graph())
    longest = {
        completions: max(
            len(text)
            for text in [
                *(verbalizer.query(head, relation) for head in range(6) for relation in range(4)),
                *verbalizer.candidates(np.arange(6)),
                *([verbalizer.completion(head, relation, tail).tokens
                   for head in range(6) for relation in range(4) for tail in range(6)] if completions else []),
            ]
        )
        for completions in (False, True)
    }  # fmt: skip
    assert longest[True] > longest[False]
    for completions in (False, True):
        for spare in (0, -1):
            positions = longest[completions] + spare
            model = tiny_model(family, vocab_size=TOKENIZER_SIZE, max_position_embeddings=positions)
            encoder = Encoder(model, source_fingerprint=family, precision="fp32")
            if spare == 0:
                packing.require_room(encoder, verbalizer, completions=completions)
            else:
                message = rf"at most {positions} tokens.*found one of {positions + 1}. Lower text.max_entity_tokens"
                with pytest.raises(ModelError, match=message):
                    packing.require_room(encoder, verbalizer, completions=completions)
                with pytest.raises(ModelError, match=message):
                    encoder.embed([np.arange(positions + 1)])


def test_an_adapter_of_another_scale_has_another_fingerprint() -> None:
    """Its weights are the same, its vectors are not."""
    adapted = [
        add_adapter(tiny_model("llama", vocab_size=TOKENIZER_SIZE), rank=4, alpha=alpha, seed=1)
        for alpha in (8, 64, 64)
    ]
    encoders = [Encoder(model, source_fingerprint="llama", precision="fp32") for model in adapted]
    eight, first, second = (encoder.fingerprint() for encoder in encoders)
    assert first == second != eight


def test_vectors_of_a_bfloat16_model_have_length_one_in_float32() -> None:
    """float32 rounds a length by 1e-7; bfloat16 would by 4e-3."""
    encoder, verbalizer = tiny_encoder(precision="bf16"), tiny_verbalizer(tiny_graph())
    vectors = encoder.embed([*verbalizer.candidates(np.arange(6)), verbalizer.query(0, 0)])
    assert vectors.dtype == torch.float32
    assert float((vectors.double().norm(dim=1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_reading_texts_without_enough_memory_says_what_to_lower(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise error

    encoder.train()
    monkeypatch.setattr(encoder, "forward", refuse)
    with pytest.raises(OutOfMemoryError, match=r"out of memory: .*Lower training\.chunk_tokens"):
        encoder.embed(verbalizer.candidates(np.arange(6)))
    assert encoder.training
    with pytest.raises(OutOfMemoryError):
        packing.choose_passes(encoder, verbalizer)


def test_another_error_while_reading_texts_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder()

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(encoder, "forward", refuse)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        encoder.embed([np.arange(3)])


@pytest.mark.parametrize(("least", "chunk", "wanted"), [(16, 256, None), (400, 512, 400), (16, 48, 48), (64, 32, 64)])
def test_a_row_holds_some_queries_of_the_graph_and_no_more_than_a_pass(
    least: int, chunk: int, wanted: int | None
) -> None:
    verbalizer = tiny_verbalizer(tiny_graph())
    encoder = tiny_encoder(row_tokens=least, chunk_tokens=chunk)
    packing.suit_rows(encoder, verbalizer)
    three = packing.QUERIES_A_ROW * mean_query(verbalizer)
    assert abs(encoder.row_tokens - three) <= packing.ROW_STEP / 2 if wanted is None else encoder.row_tokens == wanted
    assert three > 56


def test_settings_that_name_a_row_keep_it() -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    for given, widened in ((64, 64), (None, 96)):
        config = Config(graph="people", training=TrainingSettings(row_tokens=given))
        with mock.patch.object(packing, "QUERIES_A_ROW", 96 / mean_query(verbalizer)):
            run._choose_passes(encoder, verbalizer, config)
        assert encoder.row_tokens == widened


def mean_query(verbalizer: Verbalizer) -> float:
    """Return the mean tokens of the training triples' heads with their own relation and with the other one."""
    heads, relations, _ = verbalizer.graph.triples("train").T
    both = [*verbalizer.queries(heads, relations).lengths, *verbalizer.queries(heads, 1 - relations).lengths]
    return float(np.mean(both))


def test_the_noise_of_one_text_is_measured_only_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass for every text, which most starts need not wait for: tries of many texts are allowed without."""
    measured: list[int] = []

    def noise_of_one(*_: Any) -> float:
        measured.append(1)
        return 0.01

    monkeypatch.setattr(packing, "_noise_of_one", noise_of_one)
    encoder = tiny_encoder(precision="bf16")
    packing.choose_passes(encoder, tiny_verbalizer(tiny_graph()))
    assert encoder.packed
    assert not measured
    allowance = packing.Allowance(encoder, [], torch.zeros(0), noise=0.0)
    floor = packing.FLOOR[torch.bfloat16]
    assert [allowance.allows(distance) for distance in (floor, np.inf, np.nan)] == [True, False, False]
    assert not measured
    by_noise = floor + packing.NOISE_FACTOR * 0.01
    assert [allowance.allows(distance) for distance in (by_noise, 1.01 * by_noise)] == [True, False]
    assert len(measured) == 1


def test_the_noise_of_one_text_is_that_of_a_trie_with_nothing_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    encoder = tiny_encoder(precision="bf16")
    encoder.reads_unpadded, encoder.narrows = True, False

    def embed_as(encoder: Encoder, texts: list[Any], **_: Any) -> torch.Tensor:
        seen.append((encoder.reads_unpadded, encoder.narrows))
        return torch.full((len(texts), 1), 0.5)

    monkeypatch.setattr(packing, "_embed_as", embed_as)
    noise = packing._noise_of_one(encoder, [np.arange(3), np.arange(4)], torch.full((2, 1), 0.49))
    assert noise == pytest.approx(0.01)
    assert seen == [(False, False)] * 2
    assert (encoder.reads_unpadded, encoder.narrows) == (True, False)
