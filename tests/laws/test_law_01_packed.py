"""Law 1: a packed trie gives what separate passes give: embeddings, losses, gradients, in all model families."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from pykalm.graph.graph import IntArray
from pykalm.learn import batches
from pykalm.learn.batches import TripleOrder
from pykalm.learn.step import StepLoss
from pykalm.model import attention, matmul_attention, norms, packing, unpadded
from pykalm.model import encoder as encoder_module
from pykalm.model.encoder import Encoder
from pykalm.model.last_layer import can_be_narrowed, feed_forward
from pykalm.model.packing import choose_passes, packed_difference
from pykalm.text import trie as trie_module
from pykalm.text.trie import TokenTrie, build_trie, row_group
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import (
    build_batch,
    copied_gradients,
    gradients,
    largest_difference,
    replaced,
    tiny_encoder,
    tiny_graph,
    tiny_verbalizer,
)
from tests.tiny_models import FAMILIES


def read_alone(encoder: Encoder, text: np.ndarray) -> Tensor:
    """Read one text in a pass of its own, as transformers would: no mask, no padding, no positions given."""
    states: Tensor = encoder.causal_lm.base_model(input_ids=torch.from_numpy(text)[None], use_cache=False)[0]
    return F.normalize(states[0, -1], dim=-1)


def loss_by_loops(
    encoder: Encoder, verbalizer: Verbalizer, completed: list[tuple[int, int, int]], triples: IntArray | None = None,
    *, self_negatives: str = "capped", adds_inverses: bool = True,
) -> Tensor:  # fmt: skip
    """Write METHOD.md §2–4 down in loops over the training triples, or those of a batch, with λ = 1.

    self_negatives: as in the settings; adds_inverses: False where the triples are directed ones.
    """
    graph = verbalizer.graph
    train = graph.triples("train")
    chosen = train if triples is None else triples
    rows, every = (both_ways(some, graph.num_relations) for some in (chosen, train))
    rows = rows if adds_inverses else rows[: len(chosen)]
    known, τ, γ = set(every), torch.exp(-encoder.log_inverse_temperature), 0.02
    query = {(h, r): read_alone(encoder, verbalizer.query(h, r)) for h, r, _ in rows}
    entities = sorted({h for h, _, _ in rows} | {t for _, _, t in rows})
    candidate = {e: read_alone(encoder, verbalizer.candidate(e)) for e in entities}
    explicit = []
    for h, r, t in rows:
        true = (query[h, r] @ candidate[t] - γ) / τ
        tails = {(h, r, e): query[h, r] @ candidate[e] / τ for e in entities if (h, r, e) not in known}
        heads = {(*q, t): query[q] @ candidate[t] / τ for q in query if (*q, t) not in known}
        explicit += [
            -F.log_softmax(torch.stack([true, *negatives(view, τ, self_negatives)]), 0)[0] for view in (tails, heads)
        ]
    surprises = []
    for triple in completed:
        completion = verbalizer.completion(*triple)
        logits = encoder.causal_lm(input_ids=torch.from_numpy(completion.tokens)[None]).logits[0]
        for place in range(completion.answer_start, len(completion.tokens)):
            surprises.append(-F.log_softmax(logits[place - 1], -1)[int(completion.tokens[place])])
    return torch.stack(explicit).mean() + torch.stack(surprises).mean()


def negatives(scores: dict[tuple[int, int, int], Tensor], τ: Tensor, self_negatives: str) -> list[Tensor]:
    """Return what a positive is compared with, of the scores of triples: those of another head and tail, and own heads."""
    others = [score for (h, _, t), score in scores.items() if h != t]
    own = [score for (h, _, t), score in scores.items() if h == t]
    if self_negatives == "none" or (self_negatives == "capped" and not others):
        return others
    if self_negatives == "capped":
        own = [score - F.relu((score - max(others)) * τ).detach() / τ for score in own]
    return others + own


def both_ways(triples: IntArray, num_relations: int) -> list[tuple[int, int, int]]:
    rows = [(int(head), int(relation), int(tail)) for head, relation, tail in triples]
    return rows + [(tail, relation + num_relations, head) for head, relation, tail in rows]


def completed_triples(
    encoder: Encoder, verbalizer: Verbalizer, triples: IntArray | None = None, *, adds_inverses: bool = True
) -> list[tuple[int, int, int]]:
    """Return the triples whose completions `build_batch` draws, found by drawing them again."""
    drawn: list[tuple[int, int, int]] = []
    original = verbalizer.completions
    with mock.patch.object(verbalizer, "completions") as spied:
        spied.side_effect = lambda *columns: drawn.extend(zip(*columns, strict=True)) or original(*columns)
        build_batch(encoder, verbalizer, triples, adds_inverses=adds_inverses)
    return [(int(head), int(relation), int(tail)) for head, relation, tail in drawn]


def require_loops(
    encoder: Encoder,
    verbalizer: Verbalizer,
    loss: StepLoss,
    packed: dict[str, Tensor],
    triples: IntArray | None = None,
    *,
    what: tuple[str, ...],
    self_negatives: str = "capped",
    adds_inverses: bool = True,
) -> None:
    """Require the loss of a packed step, and every gradient, to be those of the loops over separate passes."""
    encoder.zero_grad()
    completed = completed_triples(encoder, verbalizer, triples, adds_inverses=adds_inverses)
    expected = loss_by_loops(
        encoder, verbalizer, completed, triples, self_negatives=self_negatives, adds_inverses=adds_inverses
    )
    expected.backward()
    assert abs(loss.total - float(expected.detach())) < 2e-5, (*what, loss.total, float(expected))
    difference = largest_difference(packed, copied_gradients(encoder))
    assert difference < 2e-4, (*what, difference)


def test_packed_trie_equals_separate_passes() -> None:
    """Float32 rounding reaches 2e-6 here, gradients included; every break moves a loss by more than 1e-2."""
    for family in FAMILIES:
        for template in ("prefix-sharing", "published"):
            encoder, verbalizer = tiny_encoder(family), tiny_verbalizer(tiny_graph(), template=template)
            loss, packed = gradients(encoder, build_batch(encoder, verbalizer))
            require_loops(encoder, verbalizer, loss, packed, what=(family, template))


def test_directed_triples_are_learned_in_their_direction_alone() -> None:
    """Half of the directed triples, some in both directions; known ones are masked all the same."""
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    directed = np.random.default_rng(2).permutation(verbalizer.graph.both_directions("train"))[:6]
    assert 0 < (directed[:, 1] >= verbalizer.graph.num_relations).sum() < 6
    batch = build_batch(encoder, verbalizer, directed, adds_inverses=False)
    assert (len(batch.positives), batch.num_triples) == (6, 3)
    loss, packed = gradients(encoder, batch)
    require_loops(encoder, verbalizer, loss, packed, directed, what=("directed",), adds_inverses=False)


def test_own_heads_count_as_the_settings_say() -> None:
    """Heads of queries are near them, so what bounds their weight makes the loss smaller, and so does leaving them out."""
    verbalizer, losses = tiny_verbalizer(tiny_graph()), []
    for way in ("among", "capped", "none"):
        encoder = tiny_encoder()
        batch = build_batch(encoder, verbalizer, masks_own_heads=way != "among")
        loss, packed = gradients(encoder, batch, self_negatives=way)
        require_loops(encoder, verbalizer, loss, packed, what=(way,), self_negatives=way)
        losses.append(loss.explicit)
    assert losses[0] > losses[1] + 0.01
    assert losses[1] > losses[2] + 0.01


def test_attention_by_matrix_products_gives_what_separate_passes_give() -> None:
    """The trie read with the faster attention, the loops with the family's own; scores are kept, rounding reaches 2e-6."""
    for family in FAMILIES:
        encoder, verbalizer = tiny_encoder(family), tiny_verbalizer(tiny_graph())
        own = encoder.attention
        for faster in encoder.faster_attentions():
            encoder.use_attention(faster)
            loss, packed = gradients(encoder, build_batch(encoder, verbalizer))
            encoder.use_attention(own)
            require_loops(encoder, verbalizer, loss, packed, what=(family, faster))


def test_rows_end_to_end_give_what_separate_passes_give() -> None:
    """Groups of rows of several lengths, which attention alone pads, with paths that several rows of a group repeat."""
    for family in WITHOUT_PADDING:
        encoder, verbalizer = tiny_encoder(family, row_tokens=48, chunk_tokens=192), tiny_verbalizer(tiny_graph())
        own = encoder.attention
        encoder.use_attention(matmul_attention.NAME)
        encoder.reads_unpadded = True
        batch = build_batch(encoder, verbalizer)
        groups = [row_group(batch.trie, rows) for rows in batch.trie.chunks(encoder.chunk_tokens)]
        assert max(len(set((group.nodes >= 0).sum(axis=1).tolist())) for group in groups) > 1
        assert any(len(unpadded.layout(group).chosen) < (group.nodes >= 0).sum() - 5 for group in groups)
        loss, packed = gradients(encoder, batch)
        encoder.use_attention(own)
        require_loops(encoder, verbalizer, loss, packed, what=(family,))


def test_a_last_layer_computed_where_it_is_read_gives_what_separate_passes_give() -> None:
    """By rows of the model's own attention, and end to end where the family can be read so."""
    for family in NARROWED:
        for end_to_end in (False, True)[: 1 + (family in WITHOUT_PADDING)]:
            encoder, verbalizer = tiny_encoder(family, row_tokens=48, chunk_tokens=192), tiny_verbalizer(tiny_graph())
            own, batch = encoder.attention, build_batch(encoder, verbalizer)
            encoder.narrows = can_be_narrowed(encoder.causal_lm)
            if end_to_end:
                encoder.use_attention(matmul_attention.NAME)
                encoder.reads_unpadded = True
            encoder.chunks_at_once()  # tries two tokens
            with tokens_of_the_last_layer(encoder) as computed:
                loss, packed = gradients(encoder, batch)
            read = {*batch.query_nodes.tolist(), *batch.candidate_nodes.tolist(), *batch.answer_nodes.tolist()}
            assert sum(computed) == len(read) < 0.7 * batch.trie.num_nodes
            encoder.narrows = False
            encoder.use_attention(own)
            require_loops(encoder, verbalizer, loss, packed, what=(family, str(end_to_end)))


def test_norms_in_one_step_give_what_separate_passes_give() -> None:
    """The trie read with them, the loops with the family's own, whose weights are not all 1 here."""
    for family in ("llama", "qwen3", "mamba"):
        encoder, verbalizer = tiny_encoder(family), tiny_verbalizer(tiny_graph())
        named = [module for module in encoder.modules() if type(module).__name__.endswith("RMSNorm")]
        for module in named:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(4))  # type: ignore[arg-type]
        norms.norms_in_one_step(encoder.causal_lm)
        taken = [module for module in encoder.modules() if isinstance(module, norms.OneStep)]
        assert len(taken) == len(named) > 2
        loss, packed = gradients(encoder, build_batch(encoder, verbalizer))
        for module in taken:
            module.give_back()
        require_loops(encoder, verbalizer, loss, packed, what=(family,))


@contextmanager
def tokens_of_the_last_layer(encoder: Encoder) -> Iterator[list[int]]:
    """Note of how many tokens the feed-forward part of the last layer is computed, pass by pass."""
    found, computed = feed_forward(encoder.causal_lm), list[int]()
    assert found is not None

    def note(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        computed.append(inputs[0].shape[-2])

    handle = found[1].register_forward_hook(note)
    yield computed
    handle.remove()


def test_the_start_check_lets_last_layers_be_computed_in_part() -> None:
    """Where the feed-forward part is no module, all is computed."""
    verbalizer, narrowed = tiny_verbalizer(tiny_graph()), set()
    for family in FAMILIES:
        encoder = tiny_encoder(family)
        choose_passes(encoder, verbalizer)
        narrowed |= {family} if encoder.narrows else set()
    assert set(NARROWED) == narrowed


def test_rows_end_to_end_are_no_other_bits_than_padded_rows() -> None:
    """In bfloat16 too: a product of more rows rounds each as before, and what padding sees is seen by padding alone."""
    encoder, verbalizer = tiny_encoder(precision="bf16", row_tokens=48, chunk_tokens=192), tiny_verbalizer(tiny_graph())
    encoder.use_attention(matmul_attention.NAME)
    trie = build_batch(encoder, verbalizer).trie
    for rows in trie.chunks(encoder.chunk_tokens):
        group, states = row_group(trie, rows), []
        for encoder.reads_unpadded in (False, True):
            states.append(encoder(group, shared=True)[torch.from_numpy(np.flatnonzero(group.nodes >= 0))])
        assert (states[0] == states[1]).all()


def test_most_families_take_the_faster_attention() -> None:
    """Falcon, say, computes attention in its own way; where the start check does not see the faster one, it is not used."""
    verbalizer, fast, end_to_end = tiny_verbalizer(tiny_graph()), set(), set()
    for family in FAMILIES:
        encoder = tiny_encoder(family)
        choose_passes(encoder, verbalizer)
        fast |= {family} if encoder.attention == matmul_attention.NAME else set()
        end_to_end |= {family} if encoder.unpadded else set()
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"} <= fast
    assert set(WITHOUT_PADDING) == end_to_end == fast


WITHOUT_PADDING = ("llama", "mistral", "mistral-sliding", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "phi")
"""Families that hand on to their attention what a pass is called with, and so read rows end to end."""

NARROWED = tuple(family for family in FAMILIES if family not in ("opt", "mamba"))
"""Families whose layers have their feed-forward part in a module."""

# ada knows all others and four know her: a hub of nine triples of fourteen, with five tails of one query.
HUB = [*((0, 0, other) for other in range(1, 6)), *((other, 1, 0) for other in range(1, 5)),
       (1, 0, 2), (1, 0, 3), (4, 1, 2), (5, 1, 2), (2, 0, 5)]  # fmt: skip


def test_packed_neighbourhood_batches_with_a_hub_equal_separate_passes() -> None:
    """Batches of 7 in rows of 32, so that the hub's texts are cut, with several positives of a query and of a tail."""
    graph = tiny_graph((*HUB, (0, 1, 5), (5, 0, 0)))
    order = TripleOrder(graph.triples("train"), 7, seed=0, batching="neighbourhood")
    several = 0
    for family in ("llama", "gpt2", "mistral-sliding"):
        for triples in (order.at(0), order.at(1)):
            encoder, verbalizer = tiny_encoder(family, row_tokens=32, chunk_tokens=64), tiny_verbalizer(graph)
            batch = build_batch(encoder, verbalizer, triples)
            several += int(np.bincount(batch.positives[:, 0]).max()) > 1 < int(np.bincount(batch.positives[:, 1]).max())
            loss, packed = gradients(encoder, batch)
            require_loops(encoder, verbalizer, loss, packed, triples, what=(family,))
    assert several


def test_the_loss_at_a_low_temperature_is_that_of_the_formula() -> None:
    """A scale kept below a bound would show: 1/τ is 33, above the start of 20, and 200, above CLIP's bound of 100."""
    for temperature in (0.03, 0.005):
        encoder, verbalizer = tiny_encoder(temperature=temperature), tiny_verbalizer(tiny_graph())
        loss, packed = gradients(encoder, build_batch(encoder, verbalizer))
        encoder.zero_grad()
        expected = loss_by_loops(encoder, verbalizer, completed_triples(encoder, verbalizer))
        expected.backward()
        assert abs(loss.total - float(expected.detach())) < 1e-5 / temperature
        assert float(packed["log_inverse_temperature"].abs()) > 1e-2
        assert largest_difference(packed, copied_gradients(encoder)) < 2e-4


def test_packed_vectors_equal_vectors_read_alone() -> None:
    """Rows of 32 tokens cut the trie many times; float32 rounding is below 2e-6."""
    graph = tiny_graph()
    for family in FAMILIES:
        encoder, verbalizer = tiny_encoder(family, row_tokens=32, chunk_tokens=64), tiny_verbalizer(graph)
        heads, relations = np.repeat(np.arange(6), 4), np.tile(np.arange(4), 6)
        texts = [*verbalizer.queries(heads, relations), *verbalizer.candidates(np.arange(6))]
        with torch.no_grad():
            alone = torch.stack([read_alone(encoder, text) for text in texts])
        assert float((encoder.embed(texts) - alone).abs().max()) < 2e-6, family


def test_start_check_takes_separate_passes_where_a_trie_is_misread() -> None:
    """The check at the start is real: it lets exact families pack, and no family with a wrong mask, in both precisions."""
    verbalizer = tiny_verbalizer(tiny_graph())
    for precision in ("fp32", "bf16"):
        for family in FAMILIES:
            encoder = tiny_encoder(family, precision=precision)
            choose_passes(encoder, verbalizer)
            assert encoder.packed == (family != "mamba"), (family, precision)
            for wrong in (siblings_see_each_other, subtree_ends_one_late):
                with wrong():
                    choose_passes(encoder, verbalizer)
                assert not encoder.packed, (family, precision, wrong.__name__)


def test_start_check_sees_a_window_that_counts_places_in_the_row() -> None:
    verbalizer = tiny_verbalizer(tiny_graph())
    for family in ("mistral-sliding", "gemma3"):
        encoder = tiny_encoder(family, precision="bf16")
        with window_counts_places_in_the_row():
            choose_passes(encoder, verbalizer)
        assert not encoder.packed, family


def test_start_check_allows_rounding_and_two_thirds_of_what_a_wrong_mask_does() -> None:
    """bfloat16 rounds by up to 0.02 here; the smallest wrong mask moves a text by 0.1."""
    verbalizer = tiny_verbalizer(tiny_graph())
    texts = packing._sample_texts(verbalizer)
    for family in FAMILIES:
        encoder = tiny_encoder(family, precision="bf16")
        if family == "mamba":
            continue
        difference, noise = packed_difference(encoder, texts)
        with subtree_ends_one_late():
            wrong, _ = packed_difference(encoder, texts)
        assert 2 * difference <= packing.largest_allowed(encoder, noise) <= wrong / 1.5, (
            family,
            difference,
            noise,
            wrong,
        )


def test_trie_paths_spell_the_texts_and_ends_bound_the_descendants() -> None:
    """Random texts over three tokens share prefixes in every way; ends are recounted by walking all pairs of paths."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 3, size=generator.integers(1, 7)) for _ in range(60)]
    for row_tokens in (6, 16, 1000):
        trie = build_trie(texts, row_tokens=row_tokens)
        prefixes = {int(node): tuple(text[: depth + 1]) for text, path in zip(texts, trie.paths, strict=True)
                    for depth, node in enumerate(path[: len(text)])}  # fmt: skip
        assert prefixes.keys() == set(range(trie.num_nodes))
        twins: dict[tuple[int, ...], set[int]] = {}
        for node, prefix in prefixes.items():
            twins.setdefault(prefix, set()).add(int(trie.twins[node]))
        assert all(len(found) == 1 and prefixes[min(found)] == prefix for prefix, found in twins.items())
        assert trie.row_lengths.max() <= row_tokens
        assert trie.row_lengths.sum() == trie.num_nodes
        sees = {(i, j) for path in trie.paths for i in path[path >= 0] for j in path[path >= 0] if j <= i}
        rows = np.searchsorted(trie.row_starts, np.arange(trie.num_nodes), side="right")
        for i in range(trie.num_nodes):
            for j in range(trie.num_nodes):
                assert ((i, j) in sees) == (j <= i < trie.ends[j] and rows[i] == rows[j])
        for text, path in zip(texts, trie.paths, strict=True):
            nodes = path[: len(text)]
            assert (trie.token_ids[nodes] == text).all()
            assert (trie.depths[nodes] == np.arange(len(text))).all()
    assert trie.num_nodes == len({tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)})


def siblings_see_each_other() -> AbstractContextManager[None]:
    """Use a plain causal mask along the row."""

    def wrong(ends: Tensor, depths: Tensor, window: int | None = None) -> Tensor:
        places = torch.arange(ends.shape[1])
        return (places[None, :] <= places[:, None]).expand(len(ends), 1, -1, -1)

    return replaced(attention, "visible", wrong)


def window_counts_places_in_the_row() -> AbstractContextManager[None]:
    """Measure a sliding window along the row, not along the text."""
    right = attention.visible

    def wrong(ends: Tensor, depths: Tensor, window: int | None = None) -> Tensor:
        places = torch.arange(ends.shape[1]).expand_as(depths)
        return right(ends, places, window)

    return replaced(attention, "visible", wrong)


def subtree_ends_one_late() -> AbstractContextManager[None]:
    right = attention.visible
    return replaced(attention, "visible", lambda ends, depths, window=None: right(ends + 1, depths, window))


def directed_triples_are_learned_both_ways() -> AbstractContextManager[None]:
    """Add the inverse of every triple, also where each direction is drawn for itself."""
    right = batches.BatchBuilder.build

    def wrong(self: batches.BatchBuilder, triples: IntArray, generator: np.random.Generator) -> batches.Batch:
        (heads, relations, tails), num_relations = triples.T, self.graph.num_relations
        inverse = np.stack([tails, (relations + num_relations) % (2 * num_relations), heads], axis=1)
        return right(self, triples if self.adds_inverses else np.concatenate([triples, inverse]), generator)

    return replaced(batches.BatchBuilder, "build", wrong)


def vectors_come_from_the_next_row() -> AbstractContextManager[None]:
    """Take what keys and values attention reads from one row too far; queries, and what goes back, are right."""
    right = unpadded._places

    def wrong(*arguments: Any) -> unpadded.Places:
        places = right(*arguments)
        return places._replace(keys=places.keys.roll(1, dims=0))

    return replaced(unpadded, "_places", wrong)


def gradients_go_back_to_the_next_head() -> AbstractContextManager[None]:
    """Hand every gradient at a key, or a value, to the one that stands after it."""
    right = unpadded._places

    def wrong(*arguments: Any) -> unpadded.Places:
        places = right(*arguments)
        return places._replace(from_keys=places.from_keys.roll(1))

    return replaced(unpadded, "_places", wrong)


def gradients_of_repeated_keys_are_lost() -> AbstractContextManager[None]:
    """Let a key learn from the first row alone that sees it."""
    right = unpadded._places

    def wrong(*arguments: Any) -> unpadded.Places:
        places = right(*arguments)
        return places._replace(into=torch.full_like(places.into, len(places.from_keys) - 1))

    return replaced(unpadded, "_places", wrong)


def equal_tokens_at_equal_depths_are_one_prefix() -> AbstractContextManager[None]:
    """Take nodes of the same token and depth for the same prefix."""

    def wrong(trie: TokenTrie, order: IntArray, shared: IntArray) -> IntArray:
        _, first, of = np.unique(trie.token_ids * 1000 + trie.depths, return_index=True, return_inverse=True)
        return first[of]

    return replaced(trie_module, "_twins", wrong)


def attention_forgets_its_scale() -> AbstractContextManager[None]:
    """Take the products of queries and keys as they are, for every head width; the registered function is replaced."""
    right = matmul_attention.matmul_attention

    def wrong(*arguments: object, scaling: float | None = None, **options: object) -> tuple[Tensor, None]:
        return right(*arguments, scaling=1.0, **options)  # type: ignore[arg-type]

    return mock.patch.dict(AttentionInterface._global_mapping, {matmul_attention.NAME: wrong})


def norms_take_the_mean_square_for_constant() -> AbstractContextManager[None]:
    """Hand back the gradient as if an input did not move the mean square that it is divided by."""

    def wrong(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        return (above * weight * inverse).to(x.dtype), None, None

    return replaced(norms._RMSNorm, "backward", staticmethod(wrong))


def own_heads_are_the_next_candidate() -> AbstractContextManager[None]:
    """Let a query's own head be the candidate after it."""
    right = batches._distinct_texts

    def wrong(*arguments: Any, **options: Any) -> Any:
        *found, masked, own = right(*arguments, **options)
        return *found, masked, np.where(own < 0, own, (own + 1) % masked.shape[1])

    return replaced(batches, "_distinct_texts", wrong)


def only_the_ends_of_texts_are_wanted() -> AbstractContextManager[None]:
    """Leave the last layer out where completions are scored."""
    return replaced(Encoder, "wanted", lambda self, ends, *others: np.unique(ends))


def the_last_layer_is_computed_a_token_early() -> AbstractContextManager[None]:
    """Compute it for the tokens that stand before those that are read."""
    right = encoder_module.narrowed_to
    return replaced(
        encoder_module, "narrowed_to", lambda places: right(None if places is None else (places - 1).clamp_min(0))
    )


BREAKS = {
    "siblings see each other": siblings_see_each_other,
    "the window counts places in the row": window_counts_places_in_the_row,
    "a subtree ends one node late": subtree_ends_one_late,
    "own heads are the next candidate": own_heads_are_the_next_candidate,
}
CHECKS = dict.fromkeys(BREAKS, "test_packed_trie_equals_separate_passes")
BREAKS["attention forgets its scale"] = attention_forgets_its_scale
for name, broken in {
    "vectors come from the next row": vectors_come_from_the_next_row,
    "gradients go back to the next head": gradients_go_back_to_the_next_head,
    "gradients of repeated keys are lost": gradients_of_repeated_keys_are_lost,
    "equal tokens at equal depths are one prefix": equal_tokens_at_equal_depths_are_one_prefix,
}.items():
    BREAKS[name], CHECKS[name] = broken, "test_rows_end_to_end_give_what_separate_passes_give"
for name, broken in {
    "only the ends of texts are wanted": only_the_ends_of_texts_are_wanted,
    "the last layer is computed a token early": the_last_layer_is_computed_a_token_early,
}.items():
    BREAKS[name] = broken
    CHECKS[name] = "test_a_last_layer_computed_where_it_is_read_gives_what_separate_passes_give"
BREAKS["directed triples are learned both ways"] = directed_triples_are_learned_both_ways
CHECKS["directed triples are learned both ways"] = "test_directed_triples_are_learned_in_their_direction_alone"
CHECKS["attention forgets its scale"] = "test_attention_by_matrix_products_gives_what_separate_passes_give"
BREAKS["norms take the mean square for constant"] = norms_take_the_mean_square_for_constant
CHECKS["norms take the mean square for constant"] = "test_norms_in_one_step_give_what_separate_passes_give"
