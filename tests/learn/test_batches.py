"""Claims about batches: which triples a step sees, in which order, what is completed and what is known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pykalm import api
from pykalm.config import Config, load_config
from pykalm.errors import ConfigError
from pykalm.graph.graph import both_directions
from pykalm.graph.known import known_answers
from pykalm.learn.batches import BatchBuilder, TripleOrder
from pykalm.model.run import Run
from pykalm.text.trie import IntArray
from tests.laws.common import build_batch, tiny_encoder, tiny_graph, tiny_verbalizer


def rows(triples: IntArray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in triples.tolist()]


def numbered(count: int) -> IntArray:
    """Return triples that are told apart by their head."""
    return np.stack([np.arange(count), np.zeros(count, int), np.arange(count) + 1], axis=1)


@pytest.mark.parametrize(
    ("count", "batch_size", "steps", "last"), [(10, 4, 3, 2), (8, 4, 2, 4), (3, 9, 1, 3), (5, 1, 5, 1)]
)
def test_an_epoch_sees_every_triple_once(count: int, batch_size: int, steps: int, last: int) -> None:
    order = TripleOrder(numbered(count), batch_size, seed=1)
    assert order.steps_per_epoch == steps
    for epoch in range(3):
        batches = [order.at(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert [len(batch) for batch in batches] == [batch_size] * (steps - 1) + [last]
        assert sorted(np.concatenate(batches)[:, 0].tolist()) == list(range(count))


def test_the_order_is_a_function_of_seed_and_step_and_changes_each_epoch() -> None:
    def epoch(number: int, seed: int) -> list[tuple[int, ...]]:
        order = TripleOrder(numbered(20), 8, seed=seed)
        return rows(np.concatenate([order.at(step) for step in range(3 * number, 3 * number + 3)]))

    assert epoch(0, seed=1) == epoch(0, seed=1)
    assert epoch(2, seed=1) == epoch(2, seed=1)
    assert len({tuple(epoch(number, seed)) for number in range(3) for seed in range(3)}) == 9


@pytest.mark.parametrize(
    ("training", "apart"),
    [
        ({"batch_size": 4}, True),
        ({"batch_size": 16}, True),
        ({"batch_size": 17}, False),
        ({"batch_size": 4, "directions": "together"}, False),
        ({"batch_size": 128, "directions": "apart"}, True),
        ({"batch_size": 4, "batching": "neighbourhood"}, False),
    ],
)
def test_an_epoch_sees_both_directions_of_every_triple_once(training: dict[str, object], apart: bool) -> None:
    """Drawn apart, as in small steps, or together; as many examples to a step either way."""
    graph = tiny_graph()
    config = Config.model_validate({"graph": "people", "training": training})
    run = Run(Path("nowhere"), config, graph, tiny_encoder(), tiny_verbalizer(graph))
    order, builder = api.triple_order(run), api.batch_builder(run)
    assert config.training.draws_directions_apart is apart
    assert order.steps_per_epoch == -(-6 // config.training.batch_size)
    seen = []
    for step in range(order.steps_per_epoch):
        triples = order.at(step)
        batch = builder.build(triples, np.random.default_rng(step))
        assert batch.num_triples == min(config.training.batch_size, 6 - step * config.training.batch_size)
        seen += rows(triples if apart else both_directions(triples, graph.num_relations))
    assert sorted(seen) == sorted(rows(graph.both_directions("train")))


def order_of_a_chain(**training: object) -> TripleOrder:
    """Return the order in which a training with these settings takes 200 triples, of which each leads to the next."""
    graph = dataclasses.replace(
        tiny_graph(), splits={"train": numbered(200)}, entity_ids=tuple(map(str, range(201))),
        entity_names=tuple(map(str, range(201))), entity_descriptions=("",) * 201,
    )  # fmt: skip
    config = Config.model_validate({"graph": "people", "training": training})
    return api.triple_order(Run(Path("nowhere"), config, graph, tiny_encoder(), tiny_verbalizer(graph)))


def test_neighbourhoods_are_taken_where_the_settings_say_so() -> None:
    """Ten triples that hang together have hardly more entities than triples; of ten that do not each has two of its own."""
    for batching, fewest, most in (("neighbourhood", 11, 14), ("random", 16, 20)):
        order = order_of_a_chain(batch_size=10, batching=batching, directions="together")
        sizes = [len(np.unique(order.at(step)[:, [0, 2]])) for step in range(5)]
        assert fewest <= np.median(sizes) <= most, batching


def test_directions_that_are_drawn_apart_seldom_meet() -> None:
    """Of 200 triples in steps of 10 a triple meets its inverse in one of 20 steps, by chance."""
    order = order_of_a_chain(batch_size=10)
    met = 0
    for step in range(order.steps_per_epoch):
        heads, _, tails = order.at(step).T
        met += len(heads) - len({frozenset(pair) for pair in zip(heads.tolist(), tails.tolist(), strict=True)})
    assert met < 40  # 10 are expected, 200 where both always share a step


def test_directed_triples_are_completed_as_often_as_others() -> None:
    directed = tiny_graph().both_directions("train")
    apart = dataclasses.replace(builder(0.5), adds_inverses=False)
    drawn = [rows(apart._draw_completions(directed, np.random.default_rng(seed))) for seed in range(20)]
    assert {len(set(completed)) for completed in drawn} == {3}
    assert set().union(*drawn) == set(rows(directed))


def test_neighbourhoods_of_directed_triples_are_refused() -> None:
    with pytest.raises(ConfigError, match="directions is apart; found neighbourhood"):
        load_config(graph="umls", training={"batching": "neighbourhood", "directions": "apart"})


def builder(share: float, *, explicit: bool = True) -> BatchBuilder:
    verbalizer = tiny_verbalizer(tiny_graph())
    known = known_answers(verbalizer.graph, ["train"])
    return BatchBuilder(
        verbalizer.graph, verbalizer, known, tiny_encoder().lay_out, explicit=explicit, completion_share=share
    )


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.5, 3), (0.75, 4), (1.0, 6)])
def test_completions_are_drawn_from_the_batch_each_triple_at_most_once(share: float, count: int) -> None:
    """Six triples; in some draw each direction occurs, and never both of one triple."""
    graph = tiny_graph()
    triples = graph.triples("train")
    directed = both_directions(triples, 2)
    directions = set()
    for seed in range(20):
        drawn = builder(share)._draw_completions(directed, np.random.default_rng(seed))
        assert len(drawn) == count
        forward = [(t, r - 2, h) if r >= 2 else (h, r, t) for h, r, t in rows(drawn)]
        assert len(set(forward)) == count
        assert set(forward) <= set(rows(triples))
        directions |= {r >= 2 for _, r, _ in rows(drawn)}
    assert directions == ({False, True} if count else set())


def test_the_same_seed_draws_the_same_batch() -> None:
    triples = tiny_graph().triples("train")
    one, same, other = (builder(0.5).build(triples, np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert np.array_equal(one.trie.token_ids, same.trie.token_ids)
    assert np.array_equal(one.answer_tokens, same.answer_tokens)
    assert not np.array_equal(one.answer_tokens, other.answer_tokens)


def test_answers_are_predicted_from_the_node_before_them() -> None:
    """Spell every answer of the trie: prompt, then what follows it, then the end token."""
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    batch = build_batch(encoder, verbalizer)
    graph, decode = verbalizer.graph, verbalizer.tokenizer.decode
    answers = decode(batch.answer_tokens).split("</s>")[:-1]
    assert len(answers) == 6
    assert {answer.strip() for answer in answers} <= set(graph.entity_names)
    for node, token in zip(batch.answer_nodes, batch.answer_tokens, strict=True):
        children = np.flatnonzero(batch.trie.depths == batch.trie.depths[node] + 1)
        children = children[(children > node) & (children < batch.trie.ends[node])]
        # The end token itself is a leaf of its text, so it need not be the token of a node below.
        assert token in batch.trie.token_ids[children]


def test_without_the_contrast_only_completions_are_read() -> None:
    batch = builder(1.0, explicit=False).build(tiny_graph().triples("train"), np.random.default_rng(0))
    assert len(batch.query_nodes) == len(batch.candidate_nodes) == len(batch.positives) == 0
    assert batch.masked.shape == (0, 0)
    assert len(batch.trie.lengths) == batch.num_triples == 6


def test_entities_with_the_same_text_are_one_candidate_known_when_any_is() -> None:
    """bo and cy get one text: what is known of either is known of the text, and a positive pair counts once."""
    graph = dataclasses.replace(
        tiny_graph(), entity_names=("ada", "x", "bo", "bo", "dan", "eve"), entity_descriptions=("",) * 6
    )
    verbalizer = tiny_verbalizer(graph)
    batch = build_batch(
        tiny_encoder(), verbalizer
    )  # ada knows bo, ada knows cy, dan knows bo, bo likes cy, cy likes bo
    decode, paths = verbalizer.tokenizer.decode, batch.trie.paths
    text = {int(path[path >= 0][-1]): decode(batch.trie.token_ids[path[path >= 0]]) for path in paths}
    queries, candidates = (
        [text[node] for node in nodes] for nodes in (batch.query_nodes.tolist(), batch.candidate_nodes.tolist())
    )
    assert len(set(candidates)) == len(candidates) == 5
    masked = {(queries[i], candidates[j]) for i, j in np.argwhere(batch.masked)}
    both_ways = verbalizer.graph.both_directions("train")
    query_of = {(h, r): decode(verbalizer.query(h, r)) for h, r, _ in both_ways}
    text_of = [decode(verbalizer.candidate(entity)) for entity in range(6)]
    known = {(query_of[h, r], text_of[t]) for h, r, t in both_ways}
    assert masked == known | {(query_of[h, r], text_of[h]) for h, r, _ in both_ways}
    positives = {(queries[i], candidates[j]) for i, j in batch.positives}
    assert len(positives) == len(batch.positives)
    assert positives == known
