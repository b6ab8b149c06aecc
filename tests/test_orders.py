"""Orders of an epoch: every triple once, a function of the seed; neighbourhoods are connected and spread hubs."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from pykalm.learn.batches import TripleOrder
from pykalm.learn.orders import ORDERS, TRIPLES_PER_ENTITY, _incidence, neighbourhood_order
from pykalm.text.texts import IntArray


def random_triples(seed: int, *, triples: int, entities: int) -> IntArray:
    generator = np.random.default_rng(seed)
    heads, tails = generator.integers(entities, size=(2, triples))
    return np.unique(np.stack([heads, generator.integers(3, size=triples), tails], axis=1), axis=0)


def neighbourhoods(triples: IntArray, batch_size: int, seed: int = 0) -> list[IntArray]:
    """Return the triples of every batch."""
    return [triples[rows] for rows in neighbourhood_order(triples, np.random.default_rng(seed), batch_size)]


def star_with_chains(leaves: int, length: int) -> IntArray:
    """Return a hub with many leaves, each the start of a chain: a share 1 / (length + 1) of the triples is the hub's."""
    star = [(0, 0, leaf) for leaf in range(1, leaves + 1)]
    chains = [(leaf + leaves * i, 1, leaf + leaves * (i + 1)) for leaf in range(1, leaves + 1) for i in range(length)]
    return np.array(star + chains)


def test_every_order_holds_every_triple_once_and_depends_on_the_seed_alone() -> None:
    """Loops, repeated triples and entities without triples among them."""
    for seed in range(5):
        triples = random_triples(seed, triples=300, entities=80)
        triples = np.concatenate([triples, triples[:5], [[3, 0, 3], [3, 1, 3], [90, 2, 90]]])
        for order in ORDERS.values():
            first, again, other = (list(order(triples, np.random.default_rng(s), 32)) for s in (seed, seed, seed + 1))
            assert [len(rows) for rows in first[:-1]] == [32] * (len(triples) // 32)
            assert np.array_equal(np.sort(np.concatenate(first)), np.arange(len(triples)))
            assert np.array_equal(np.concatenate(first), np.concatenate(again))
            assert not np.array_equal(np.concatenate(first), np.concatenate(other))


def test_a_neighbourhood_of_a_connected_graph_is_one_piece() -> None:
    """A ring of 64: while three quarters are left, a batch of 8 is a path, so it touches 9 entities."""
    ring = np.stack([np.arange(64), np.zeros(64, dtype=np.int64), (np.arange(64) + 1) % 64], axis=1)
    assert [len(np.unique(batch[:, [0, 2]])) for batch in neighbourhoods(ring, 8)[:2]] == [9, 9]


def test_a_new_entity_brings_its_triples_with_the_entities_of_the_batch() -> None:
    """Cliques of 6 in a chain, 15 triples each: a batch of 15 that grows by breadth alone would reach beyond its clique."""
    pairs = [(a, b) for a in range(6) for b in range(a)]
    triples = np.array([(6 * clique + a, 0, 6 * clique + b) for clique in range(20) for a, b in pairs])
    links = np.array([(6 * clique, 1, 6 * clique + 6) for clique in range(19)])
    first = neighbourhoods(np.concatenate([triples, links]), 15)[0]
    assert len(np.unique(first[:, [0, 2]])) <= 8


def test_the_triples_of_an_entity_stand_by_relation_and_direction() -> None:
    """Against a loop over every entity: a kind that has ended does not come again, and nothing is lost."""
    triples = random_triples(3, triples=200, entities=12)
    incident, others, offsets = _incidence(triples, np.random.default_rng(0))
    for entity in range(12):
        rows, ends = (part[offsets[entity] : offsets[entity + 1]] for part in (incident, others))
        wanted = Counter((r, t) for h, r, t in triples.tolist() if h == entity)
        wanted += Counter((r + 3, h) for h, r, t in triples.tolist() if t == entity)
        kinds = [
            (int(triples[row, 1]) + 3 * int(triples[row, 0] != entity), int(end))
            for row, end in zip(rows, ends, strict=True)
        ]
        loops = sum(h == t == entity for h, _, t in triples.tolist())
        if not loops:
            assert Counter(kinds) == wanted
        changes = sum(a[0] != b[0] for a, b in pairwise(kinds))
        assert changes <= len({kind for kind, _ in kinds}) - 1 + 2 * loops


def test_hubs_are_spread_over_batches_and_not_left_to_the_end() -> None:
    """A fifth of 1,000 triples is a hub's. A batch of 64 holds 26 of them, twice that share, or fewer, to the last."""
    triples = star_with_chains(200, 4)
    batches = neighbourhoods(triples, 64)
    most = np.ceil(2 * 64 * 200 / len(triples))
    assert max((batch[:, 0] == 0).sum() for batch in batches[:-2]) <= most
    assert min((batch[:, 0] == 0).sum() for batch in batches[:5]) > 0


def test_no_entity_fills_a_batch_while_there_are_others() -> None:
    triples = random_triples(1, triples=4000, entities=600)
    for batch in neighbourhoods(triples, 128)[:-3]:
        # A piece starts from a random triple whatever its entities hold already.
        assert np.bincount(batch[:, [0, 2]].ravel()).max() <= TRIPLES_PER_ENTITY + 2


def test_a_graph_of_one_hub_is_no_trouble() -> None:
    star = np.stack([np.zeros(500, int), np.arange(500) % 7, np.arange(500) + 1], axis=1)
    batches = neighbourhoods(star, 64)
    assert sorted(np.concatenate(batches)[:, 2].tolist()) == list(range(1, 501))


def test_order_is_resumable_in_mid_epoch() -> None:
    """Asking for step 25 first gives what asking for all steps before it gives; so does going back."""
    triples = random_triples(0, triples=300, entities=80)
    for batching in ORDERS:
        whole, resumed = (TripleOrder(triples, 32, seed=4, batching=batching) for _ in range(2))
        steps = [whole.at(step) for step in range(26)]
        for step in (25, 3, 21, 20):
            assert np.array_equal(resumed.at(step), steps[step])


@pytest.mark.slow
def test_the_time_of_an_order_grows_with_the_triples_also_around_hubs() -> None:
    """Four times the triples, half of them two hubs', may take six times as long (linear would be four; quadratic 16)."""

    def seconds(count: int) -> float:
        generator = np.random.default_rng(0)
        hubs = np.stack([np.arange(count) % 2, np.arange(count) % 5, generator.permutation(count) + 2], axis=1)
        others = np.stack(
            [generator.permutation(count) + 2, np.zeros(count, int), generator.permutation(count) + 2], axis=1
        )
        triples, times = np.concatenate([hubs, others]), []
        for _ in range(3):
            start = time.process_time()
            neighbourhoods(triples, 256)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(40_000) < 6 * seconds(10_000)
