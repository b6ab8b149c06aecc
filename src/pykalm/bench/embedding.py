"""Entities embedded per second: kalm beside a padded loop in file order, of all texts of a graph, with the same model.

Of a large graph each takes a sample of its own way through all texts: kalm some rows of the trie of all, in which texts share
what they begin with as they do when all are embedded, the loop some of its padded batches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pykalm.bench.plan import Workshop, adapters_of_peft, attention, generator
from pykalm.bench.published import last_states, pad, pad_token
from pykalm.bench.timing import Spread, interleaved, paired_ratio
from pykalm.model.encoder import pooled
from pykalm.model.run import Run
from pykalm.text.texts import Texts

LOOP_BATCH = 64
MOST_REPEATS = 3
OURS = 4
"""Entities of kalm's sample for one of the loop's: about as long to embed, and in so many passes that a last one that is not
full, or that one thread waits for, counts for as little as it does among all."""


@dataclass(frozen=True)
class EmbeddingSpeed:
    """Hold the measurements on one graph; ratio: to the loop without logits; ratio_with_logits: to that with them.

    num_entities of num_all were embedded by kalm, fewer by the loop. largest_difference: between the vectors that both give
    the first batch of the loop's.
    """

    graph: str
    num_entities: int
    num_all: int
    entities_per_second: Spread
    loop_entities_per_second: Spread
    loop_with_logits_entities_per_second: Spread
    ratio: Spread
    ratio_with_logits: Spread
    largest_difference: float


def measure_embedding(workshop: Workshop, graph: str) -> EmbeddingSpeed:
    """Measure the embedding of a graph's entity texts, or of as many as the plan says."""
    run = workshop.run(graph)
    texts = run.verbalizer.candidates(np.arange(run.graph.num_entities))
    wanted = min(workshop.plan.entities or len(texts), len(texts))
    ours, theirs = (
        _rows_sample(run, texts, min(OURS * wanted, len(texts)), workshop.plan.seed),
        _batches_sample(texts, wanted, workshop.plan.seed),
    )
    run.encoder.eval()

    def loop(number: int, with_logits: bool) -> torch.Tensor:
        with attention(run.encoder, workshop.own_attention), adapters_of_peft(run.encoder):
            return padded_loop(run, theirs if number else theirs[:1], with_logits=with_logits)

    systems: dict[str, Callable[[int], torch.Tensor]] = {
        "kalm": lambda number: run.encoder.embed(ours if number else theirs[0]),  # the first call warms up
        "loop": partial(loop, with_logits=False),
        "loop with logits": partial(loop, with_logits=True),
    }
    timed = interleaved(systems, repeats=min(workshop.plan.repeats, MOST_REPEATS), device=workshop.device)
    num_looped = sum(map(len, theirs))
    speed = {
        name: [(len(ours) if name == "kalm" else num_looped) / call.seconds for call in calls]
        for name, calls in timed.items()
    }
    difference = run.encoder.embed(theirs[0]) - timed["loop"][-1].value[: len(theirs[0])]
    return EmbeddingSpeed(
        graph=run.graph.name,
        num_entities=len(ours),
        num_all=len(texts),
        entities_per_second=Spread.of(speed["kalm"]),
        loop_entities_per_second=Spread.of(speed["loop"]),
        loop_with_logits_entities_per_second=Spread.of(speed["loop with logits"]),
        ratio=paired_ratio(speed["kalm"], speed["loop"]),
        ratio_with_logits=paired_ratio(speed["kalm"], speed["loop with logits"]),
        largest_difference=float(difference.norm(dim=1).max()),
    )


def _rows_sample(run: Run, texts: Texts, wanted: int, seed: int) -> Texts:
    """Return the texts that end in rows drawn from the trie of all, about as many as wanted."""
    if wanted == len(texts):
        return texts
    trie = run.encoder.lay_out(texts)
    row_of_text = trie.rows_of(trie.last_nodes())
    rows = generator(seed, 3).permutation(len(trie.row_lengths))
    enough = np.cumsum(np.bincount(row_of_text, minlength=len(rows))[rows]) >= wanted
    return texts.select(np.flatnonzero(np.isin(row_of_text, rows[: int(np.argmax(enough)) + 1])))


def _batches_sample(texts: Texts, wanted: int, seed: int) -> list[Texts]:
    """Return batches drawn from those of the loop, LOOP_BATCH texts in file order each, about as many texts as wanted."""
    starts = np.arange(0, len(texts), LOOP_BATCH)
    chosen = generator(seed, 4).permutation(starts)[: math.ceil(wanted / LOOP_BATCH)]
    return [texts.select(np.arange(start, min(start + LOOP_BATCH, len(texts)))) for start in np.sort(chosen)]


@torch.no_grad()
def padded_loop(run: Run, batches: Sequence[Texts], *, with_logits: bool) -> torch.Tensor:
    """Return the vectors (N, D) of texts, each batch padded to its longest."""
    encoder, token, parts = run.encoder, pad_token(run.verbalizer), []
    for texts in batches:
        padded = pad(texts, pad_token=token, device=encoder.device)
        parts.append(pooled(last_states(encoder, padded, with_logits=with_logits)).cpu())
    return torch.cat(parts)
