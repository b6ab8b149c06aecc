"""Entities embedded per second: kalm beside a padded loop in file order, on the same texts with the same model."""

from collections.abc import Callable
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


@dataclass(frozen=True)
class EmbeddingSpeed:
    """Hold the measurements on one graph; ratio: to the loop without logits; ratio_with_logits: to that with them.

    num_entities of num_all were embedded, drawn at random and kept in file order.
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
    num_all, wanted = run.graph.num_entities, workshop.plan.entities or run.graph.num_entities
    chosen = generator(workshop.plan.seed, 3).choice(num_all, size=min(wanted, num_all), replace=False)
    texts = run.verbalizer.candidates(np.sort(chosen))
    run.encoder.eval()
    first = texts.select(np.arange(min(LOOP_BATCH, len(texts))))  # enough to warm up

    def loop(number: int, with_logits: bool) -> torch.Tensor:
        with attention(run.encoder, workshop.own_attention), adapters_of_peft(run.encoder):
            return padded_loop(run, texts if number else first, with_logits=with_logits)

    systems: dict[str, Callable[[int], torch.Tensor]] = {
        "kalm": lambda number: run.encoder.embed(texts if number else first),
        "loop": partial(loop, with_logits=False),
        "loop with logits": partial(loop, with_logits=True),
    }
    timed = interleaved(systems, repeats=min(workshop.plan.repeats, MOST_REPEATS), device=workshop.device)
    speed = {name: [len(texts) / call.seconds for call in calls] for name, calls in timed.items()}
    ours, theirs = timed["kalm"][-1].value, timed["loop"][-1].value
    return EmbeddingSpeed(
        graph=run.graph.name,
        num_entities=len(texts),
        num_all=num_all,
        entities_per_second=Spread.of(speed["kalm"]),
        loop_entities_per_second=Spread.of(speed["loop"]),
        loop_with_logits_entities_per_second=Spread.of(speed["loop with logits"]),
        ratio=paired_ratio(speed["kalm"], speed["loop"]),
        ratio_with_logits=paired_ratio(speed["kalm"], speed["loop with logits"]),
        largest_difference=float((ours - theirs).norm(dim=1).max()),
    )


@torch.no_grad()
def padded_loop(run: Run, texts: Texts, *, with_logits: bool) -> torch.Tensor:
    """Return the vectors (N, D) of texts taken 64 at a time in the order given, padded to the longest of each 64."""
    encoder, token = run.encoder, pad_token(run.verbalizer)
    parts = []
    for start in range(0, len(texts), LOOP_BATCH):
        some = texts.select(np.arange(start, min(start + LOOP_BATCH, len(texts))))
        padded = pad(some, pad_token=token, device=encoder.device)
        parts.append(pooled(last_states(encoder, padded, with_logits=with_logits)).cpu())
    return torch.cat(parts)
