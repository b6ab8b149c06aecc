"""Orders of an epoch: every triple once, a function of the seed; neighbourhoods are connected and spread hubs."""

import numpy as np

from pykalm.learn.batches import TripleOrder
from pykalm.learn.orders import ORDERS, TRIPLES_PER_VISIT, neighbourhood_order


def random_triples(seed: int, *, triples: int, entities: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    heads, tails = generator.integers(entities, size=(2, triples))
    return np.unique(np.stack([heads, generator.integers(3, size=triples), tails], axis=1), axis=0)


def test_every_order_holds_every_triple_once_and_depends_on_the_seed_alone() -> None:
    for seed in range(5):
        triples = random_triples(seed, triples=300, entities=80)
        for order in ORDERS.values():
            first, again, other = (order(triples, np.random.default_rng(s), 32) for s in (seed, seed, seed + 1))
            assert np.array_equal(np.sort(first), np.arange(len(triples)))
            assert np.array_equal(first, again)
            assert not np.array_equal(first, other)


def test_a_neighbourhood_of_a_connected_graph_is_one_piece() -> None:
    """A ring of 64: while three quarters are left, a batch of 8 is a path, so it touches 9 entities (or 10, two paths)."""
    ring = np.stack([np.arange(64), np.zeros(64, dtype=np.int64), (np.arange(64) + 1) % 64], axis=1)
    order = neighbourhood_order(ring, np.random.default_rng(0), 8)
    assert [len(np.unique(ring[order[i : i + 8]][:, [0, 2]])) for i in (0, 8)] == [9, 9]


def test_hubs_are_spread_over_batches() -> None:
    """A star of 200 around one hub, each leaf with a chain of 4: a batch of 32 holds more than the hub's triples."""
    star = [(0, 0, leaf) for leaf in range(1, 201)]
    chains = [(leaf + 200 * i, 1, leaf + 200 * (i + 1)) for leaf in range(1, 201) for i in range(4)]
    triples = np.array(star + chains)
    order = neighbourhood_order(triples, np.random.default_rng(0), 32)
    hub_triples = [(triples[order[i : i + 32]][:, 0] == 0).sum() for i in range(0, 320, 32)]
    assert max(hub_triples) < 32
    assert min(hub_triples) <= 2 * TRIPLES_PER_VISIT


def test_order_is_resumable_in_mid_epoch() -> None:
    """Asking for step 25 first gives what asking for all steps before it gives."""
    triples = random_triples(0, triples=300, entities=80)
    for batching in ORDERS:
        whole, resumed = (TripleOrder(triples, 32, seed=4, batching=batching) for _ in range(2))
        steps = [whole.at(step) for step in range(26)]
        assert np.array_equal(resumed.at(25), steps[25])
