"""Making batches is never the bottleneck: the processor time of ordering, wording and laying out, on real graphs."""

import time
from pathlib import Path

import numpy as np
import pytest

from pykalm.config import TextSettings
from pykalm.graph.catalogue import load_graph
from pykalm.graph.known import known_answers
from pykalm.learn.batches import BatchBuilder, TripleOrder
from pykalm.text.trie import build_trie, row_group
from pykalm.text.verbalize import Verbalizer
from tests.tiny_models import tiny_tokenizer

STEPS = 5
TOKENS_PER_SECOND = 450
"""A step of a language model of 135 million parameters on a CPU."""
SHARE = 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WN18RR", "FB15k-237", "WordNet30-full"])
def test_sampling_and_laying_out_take_less_than_three_hundredths_of_a_step(data_folder: Path, name: str) -> None:
    """Measured: 0.8 to 4 million nodes a second. Asked for are ten times the 15,000 that a step on a CPU allows.

    The start of an order is spread over its epoch.
    """
    graph = load_graph(data_folder / name)
    triples = graph.triples("train")
    builder = BatchBuilder(
        graph, Verbalizer(graph, tiny_tokenizer(), TextSettings()), known_answers(graph, ["train"]),
        lambda texts: build_trie(texts, row_tokens=128), explicit=True, completion_share=1 / 3,
    )  # fmt: skip
    builder.build(triples[:10], np.random.default_rng(0))  # tokenises every entity, once for a run
    for batching in ("random", "neighbourhood"):
        for batch_size in (128, 1024, 4096):
            order, nodes, start = TripleOrder(triples, batch_size, seed=0, batching=batching), 0, time.process_time()
            order.at(0)
            seconds = (time.process_time() - start) * STEPS / order.steps_per_epoch
            start = time.process_time()
            for step in range(1, 1 + STEPS):
                trie = builder.build(order.at(step), np.random.default_rng(step)).trie
                for rows in trie.chunks(2048):
                    row_group(trie, rows)
                nodes += trie.num_nodes
            seconds += time.process_time() - start
            assert nodes / seconds > 10 * TOKENS_PER_SECOND / SHARE, (batching, batch_size, nodes / seconds)
