"""Claims about the count of useful operations: it is PyTorch's own count where both count the same."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pykalm.bench.flops import model_cost, useful_flops
from pykalm.bench.plan import adapters_of_peft
from pykalm.model.adapters import add_adapter
from pykalm.model.attention import FLEX
from pykalm.model.encoder import Encoder
from pykalm.model.last_layer import can_be_narrowed, narrowed_to
from pykalm.text.trie import build_trie
from tests.laws.common import build_batch, tiny_encoder, tiny_graph, tiny_verbalizer
from tests.tiny_models import tiny_model

LENGTH = 12


def adapted(family: str, targets: str) -> Encoder:
    """Return an encoder whose attention is written as plain matrix products, which PyTorch counts on every device."""
    model = add_adapter(tiny_model(family), rank=4, targets=targets)  # type: ignore[arg-type]
    encoder = Encoder(model, source_fingerprint="", precision="fp32")
    encoder.causal_lm.set_attn_implementation("eager")
    return encoder


@pytest.mark.parametrize("targets", ["auto", "mlp"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi"])
def test_the_count_is_pytorchs_but_for_unseen_tokens(family: str, targets: str) -> None:
    encoder = adapted(family, targets)
    cost = model_cost(encoder)
    text = torch.arange(LENGTH)[None] + 3
    with adapters_of_peft(
        encoder
    ):  # in products that PyTorch counts: it overlooks those that add to their result in place
        with FlopCounterMode(display=False) as forward:
            states = encoder.causal_lm.base_model(input_ids=text, use_cache=False)[0]
        with FlopCounterMode(display=False) as backward:
            states.sum().backward()
    # A plain product of T × T scores counts the tokens that are masked too: T · T instead of T · (T + 1) / 2.
    square = LENGTH * LENGTH
    assert forward.get_total_flops() == LENGTH * cost.token_forward + square * cost.seen_forward
    assert backward.get_total_flops() == LENGTH * cost.token_backward + square * cost.seen_backward


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_a_token_whose_state_is_not_read_costs_less_by_what_pytorch_counts_less(family: str) -> None:
    """Of 12 tokens two are read, forward and backward."""
    encoder, places = adapted(family, "auto"), torch.tensor([4, LENGTH - 1])
    cost = model_cost(encoder)
    assert can_be_narrowed(encoder.causal_lm)
    counts = []
    for read in (None, places):
        with adapters_of_peft(encoder), narrowed_to(read), FlopCounterMode(display=False) as counted:
            states = encoder.causal_lm.base_model(input_ids=torch.arange(LENGTH)[None] + 3, use_cache=False)[0]
            states[:, places].sum().backward()
        counts.append(counted.get_total_flops())
    assert counts[0] - counts[1] == (LENGTH - len(places)) * (cost.unread_forward + cost.unread_backward) > 0


def test_the_count_does_not_depend_on_the_attention_in_use() -> None:
    """FlexAttention has no gradient on a CPU, and is made for longer rows than the two tokens of the count."""
    encoder = tiny_encoder()
    wanted = model_cost(encoder)
    encoder.use_attention(FLEX)
    assert model_cost(encoder) == wanted
    assert encoder.attention == FLEX


def test_the_logits_are_counted_at_positions_with_loss_only() -> None:
    encoder = adapted("llama", "mlp")
    cost = model_cost(encoder)
    states = torch.randn(5, encoder.width, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        encoder.logits(states).sum().backward()
    assert counted.get_total_flops() == 5 * (cost.logits_forward + cost.logits_backward)


def test_below_the_lowest_adapter_nothing_is_counted_backward() -> None:
    """One layer, adapters on the feed-forward part only: no gradient for attention, none for the inputs of up and gate."""
    base = tiny_model("llama", num_hidden_layers=1)
    encoder = Encoder(add_adapter(base, rank=4, targets="mlp"), source_fingerprint="", precision="fp32")
    cost = model_cost(encoder)
    assert cost.seen_backward == 0
    width, inner, rank = 32, 64, 4
    down = 2 * inner * width
    # up and gate: A's weight, B's weight and input; down: A and B, weight and input each.
    adapters = 2 * (2 * width * rank + 2 * 2 * rank * inner) + 2 * (2 * inner * rank + 2 * rank * width)
    assert cost.token_backward == down + adapters


def test_a_path_that_is_repeated_in_another_row_counts_once() -> None:
    """In rows that are cut, and where every text has a row of its own."""
    texts = [np.array([5, 6, 7]), np.array([5, 6, 8]), np.array([5, 9]), np.array([4]), np.array([5, 6, 8])]
    whole, cut, alone = (
        build_trie(texts, row_tokens=row, share=share) for row, share in ((64, True), (3, True), (3, False))
    )
    assert len(np.unique(whole.twins)) == whole.num_nodes == 6
    for trie in (cut, alone):
        assert trie.num_nodes > 6
        assert sorted(trie.depths[np.unique(trie.twins)]) == [0, 0, 1, 1, 2, 2]


def test_a_batch_needs_its_distinct_prefixes_once_and_logits_where_loss_is() -> None:
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    batch = build_batch(encoder, verbalizer)
    cost = model_cost(encoder)
    builder_texts = _texts(encoder, verbalizer)
    prefixes = {tuple(text[: end + 1]) for text in builder_texts for end in range(len(text))}
    seen = sum(map(len, prefixes))
    logits = len(set(batch.answer_nodes.tolist()))
    vectors = np.concatenate([batch.query_nodes, batch.candidate_nodes])
    unread = len(prefixes) - len({*vectors.tolist(), *batch.answer_nodes.tolist()})
    assert useful_flops(cost, batch) == cost.step(len(prefixes), seen, logits, unread)
    per_token = cost.token_forward + cost.token_backward
    per_seen = cost.seen_forward + cost.seen_backward
    per_logit = cost.logits_forward + cost.logits_backward
    per_unread = cost.unread_forward + cost.unread_backward
    whole = len(prefixes) * per_token + seen * per_seen + logits * per_logit
    assert useful_flops(cost, batch) == whole - unread * per_unread < whole


def test_what_a_batch_needs_does_not_depend_on_its_rows() -> None:
    """In one row, in rows that repeat much, and with a row for every text; texts of the base model's are read too."""
    counts = []
    for settings in ({"row_tokens": 1000}, {"row_tokens": 24}, {"row_tokens": 64}, {"packed": False}):
        encoder = tiny_encoder(chunk_tokens=1000)
        for name, value in settings.items():
            setattr(encoder, name, value)
        batch = build_batch(encoder, tiny_verbalizer(tiny_graph()), own=2)
        counts.append(useful_flops(model_cost(encoder), batch))
    assert len(set(counts)) == 1
    nobody_reads = dataclasses.replace(batch, own_nodes=batch.own_nodes[:0])
    assert useful_flops(model_cost(encoder), nobody_reads) < counts[0]


def _texts(encoder: Encoder, verbalizer: object) -> list[list[int]]:
    """Return the texts of the batch of all training triples, as the builder lays them out."""
    trie = build_batch(encoder, verbalizer).trie  # type: ignore[arg-type]
    return [trie.token_ids[trie.paths[i, :length]].tolist() for i, length in enumerate(trie.lengths)]
