"""Training examples per second: kalm beside the published recipe and beside separate passes without padding.

An example is one triple trained in both directions, for all systems alike. A step's time includes its batch (drawn, put
into words, laid out or padded) and the optimiser's step. All systems of a graph take turns, each with other triples of the
graph at every call. Kalm takes each step once more with compiled layers where the machine can.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from pykalm.api import batch_builder
from pykalm.bench.plan import (
    BATCHINGS,
    NEIGHBOURHOOD_BATCH_FACTOR,
    SEPARATE_BATCH_SHARE,
    Workshop,
    adapters_of_peft,
    attention,
    generator,
    passes,
    separate_attention,
)
from pykalm.bench.published import PublishedRecipe, draw_step
from pykalm.bench.timing import Spread, Timed, interleaved, paired_ratio, time_call
from pykalm.errors import ModelError
from pykalm.graph.graph import IntArray
from pykalm.learn.batches import Batch, BatchBuilder, TripleOrder
from pykalm.learn.step import joint_gradient
from pykalm.model.compiled import compile_layers, left_plain, undo_compiling
from pykalm.model.encoder import Encoder
from pykalm.model.run import Run

PUBLISHED, LEAN = "published", "published_without_unused"
KALM, SEPARATE = "kalm", "separate_unpadded"
COMPILED = "compiled"
"""What a way of batching is called behind its name where layers are compiled (training.compile)."""

# METHOD.md §5, on both sides.
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.001, 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Work:
    """Say what a step did: triples trained in both directions, tokens of its passes with and without padding.

    host_seconds: the time of drawing and building the batch; batch: that of a kalm step, to count its operations later.
    """

    num_triples: float
    num_tokens: int
    num_real_tokens: int
    host_seconds: float = 0.0
    batch: Batch | None = None


@dataclass(frozen=True)
class SystemSpeed:
    """Hold the measurements of one system: fill is the share of computed tokens that are no padding."""

    examples_per_second: Spread
    tokens_per_triple: Spread
    fill: Spread
    seconds_per_step: Spread
    host_share: Spread

    @staticmethod
    def of(steps: Sequence[Timed[Work]]) -> "SystemSpeed":
        """Summarise the timed steps of a system; tokens per triple are those computed, padding included."""
        works = [step.value for step in steps]
        return SystemSpeed(
            examples_per_second=Spread.of(rates(steps)),
            tokens_per_triple=Spread.of([work.num_tokens / work.num_triples for work in works]),
            fill=Spread.of([work.num_real_tokens / work.num_tokens for work in works]),
            seconds_per_step=Spread.of([step.seconds for step in steps]),
            host_share=Spread.of([step.value.host_seconds / step.seconds for step in steps]),
        )


@dataclass(frozen=True)
class TrainingSpeed:
    """Hold the measurements of kalm with one way of batching; every ratio is taken round by round."""

    kalm: SystemSpeed
    separate_unpadded: SystemSpeed
    ratio_to_published: Spread
    ratio_to_published_without_unused: Spread
    ratio_to_separate_unpadded: Spread


@dataclass(frozen=True)
class GraphTraining:
    """Hold the measurements on one graph: the published recipe with and without what it never uses, and kalm by batching.

    compiled: the batchings once more, with compiled layers; empty where that was not measured.
    """

    published: SystemSpeed
    published_without_unused: SystemSpeed
    batchings: dict[str, TrainingSpeed]
    compiled: dict[str, TrainingSpeed]


@dataclass(frozen=True, eq=False)
class KalmSystem:
    """Take steps as `kalm train` does: with its own passes, or with separate ones without padding."""

    encoder: Encoder
    builder: BatchBuilder
    order: TripleOrder
    run: Run
    optimizer: torch.optim.Optimizer
    order_seconds: float
    packed: bool

    @staticmethod
    def build(run: Run, batching: str, *, packed: bool) -> "KalmSystem":
        """Prepare a system: the first look at an order is timed, and what it costs is spread over an epoch's steps."""
        size = run.config.training.batch_size * (NEIGHBOURHOOD_BATCH_FACTOR if batching == "neighbourhood" else 1)
        size = size if packed else max(1, size // SEPARATE_BATCH_SHARE)
        order = TripleOrder(run.graph.triples("train"), size, run.config.seed, batching)
        ordered = time_call(lambda: order.at(0), torch.device("cpu"))
        return KalmSystem(
            run.encoder, batch_builder(run), order, run, new_optimizer(run.encoder),
            ordered.seconds / order.steps_per_epoch, packed,
        )  # fmt: skip

    def __call__(self, number: int) -> Work:
        """Take the step of that number."""
        encoder = self.encoder
        if not encoder.training:  # as a training, which is not told so before every step
            encoder.train()
        with passes(encoder, packed=self.packed):
            built = time_call(lambda: self._batch(number), torch.device("cpu"))
            batch = built.value
            joint_gradient(
                encoder, batch, self.run.config.objective, memory_tokens=self.run.config.training.memory_tokens
            )
        update(encoder, self.optimizer)
        return Work(
            num_triples=batch.num_triples,
            num_tokens=round(batch.trie.num_nodes / encoder.fill(batch.trie)),
            num_real_tokens=batch.trie.num_nodes,
            host_seconds=built.seconds + self.order_seconds,
            batch=batch,
        )

    def _batch(self, number: int) -> Batch:
        triples = self.order.at(number % self.order.steps_per_epoch)
        return self.builder.build(triples, generator(self.run.config.seed, number, 1))


@dataclass(frozen=True, eq=False)
class PublishedSystem:
    """Take steps of the published recipe over all directed triples (2N, 3) of a graph.

    adapters: `adapters_of_peft`, or nullcontext for those that kalm has made faster.
    """

    recipe: PublishedRecipe
    directed: IntArray
    optimizer: torch.optim.Optimizer
    seed: int
    attention: str
    adapters: Callable[[Encoder], AbstractContextManager[None]]

    def __call__(self, number: int) -> Work:
        """Take the step of that number."""
        if not self.recipe.encoder.training:
            self.recipe.encoder.train()
        directed, completed = draw_step(self.directed, generator(self.seed, number, 2))
        with attention(self.recipe.encoder, self.attention), self.adapters(self.recipe.encoder):
            step = self.recipe.gradient(directed, completed)
        update(self.recipe.encoder, self.optimizer)
        return Work(len(directed) / 2, step.num_tokens, step.num_real_tokens)


def measure_training(workshop: Workshop, graph: str) -> GraphTraining:
    """Measure all systems on a graph in turn: the published recipe, and kalm with both ways of batching and of passes."""
    run = workshop.run(graph)
    systems: dict[str, Callable[[int], Work]] = {**published_systems(workshop, run, graph)}
    for batching in BATCHINGS:
        systems[f"{KALM} {batching}"] = KalmSystem.build(run, batching, packed=True)
        systems[f"{SEPARATE} {batching}"] = KalmSystem.build(run, batching, packed=False)
    with maybe_compiled(workshop, run.encoder) as compiled:
        taken: dict[str, Callable[[int], Work]] = {
            name: partial(take_plainly, run.encoder, system) for name, system in systems.items()
        }
        if compiled:
            taken |= {f"{KALM} {batching}, {COMPILED}": systems[f"{KALM} {batching}"] for batching in BATCHINGS}
        timed = interleaved(taken, repeats=workshop.plan.repeats, device=workshop.device)
    return GraphTraining(
        SystemSpeed.of(timed[PUBLISHED]),
        SystemSpeed.of(timed[LEAN]),
        {batching: _compare(timed, batching) for batching in BATCHINGS},
        {batching: _compare(timed, batching, f", {COMPILED}") for batching in BATCHINGS} if compiled else {},
    )


@contextmanager
def maybe_compiled(workshop: Workshop, encoder: Encoder) -> Iterator[bool]:
    """Compile the layers for a while; yields whether they are: the machine may have no compiler, the short form no time."""
    compiled = not workshop.plan.quick
    if compiled:
        try:
            compile_layers(encoder)
        except ModelError as error:
            log.warning("kalm: no figures with compiled layers: %s", error)
            compiled = False
    try:
        yield compiled
    finally:
        undo_compiling(encoder)


def take_plainly(encoder: Encoder, system: Callable[[int], Work], number: int) -> Work:
    """Take a step of a system by layers as they are without compiling."""
    with left_plain(encoder):
        return system(number)


def published_systems(workshop: Workshop, run: Run, graph: str) -> dict[str, PublishedSystem]:
    """Return the published recipe as it is, with the model's own attention and peft's own adapters, and a stronger baseline.

    That is without the passes and logits that it never uses, and with kalm's adapters and, on a CPU, attention.
    """
    directed, optimizer, words = (
        run.graph.both_directions("train"),
        new_optimizer(run.encoder),
        workshop.published_words(graph),
    )
    attentions = {PUBLISHED: workshop.own_attention, LEAN: separate_attention(run.encoder)}
    adapters: dict[str, Callable[[Encoder], AbstractContextManager[None]]] = {
        PUBLISHED: adapters_of_peft,
        LEAN: lambda encoder: nullcontext(),
    }
    recipes = {
        name: PublishedRecipe(run.encoder, words, run.config.objective, skip_unused=name == LEAN) for name in attentions
    }
    return {
        name: PublishedSystem(recipe, directed, optimizer, run.config.seed, attentions[name], adapters[name])
        for name, recipe in recipes.items()
    }


def rates(steps: Sequence[Timed[Work]]) -> list[float]:
    """Return the triples, trained in both directions, per second of every step."""
    return [step.value.num_triples / step.seconds for step in steps]


def _compare(timed: dict[str, list[Timed[Work]]], batching: str, way: str = "") -> TrainingSpeed:
    kalm, separate = timed[f"{KALM} {batching}{way}"], timed[f"{SEPARATE} {batching}"]
    ratios = [paired_ratio(rates(kalm), rates(other)) for other in (timed[PUBLISHED], timed[LEAN], separate)]
    return TrainingSpeed(SystemSpeed.of(kalm), SystemSpeed.of(separate), *ratios)


def new_optimizer(encoder: Encoder) -> torch.optim.Optimizer:
    """Return AdamW as published, for all that learns."""
    return torch.optim.AdamW(encoder.trainable().values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def update(encoder: Encoder, optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradient and take the optimiser's step, as every system does."""
    torch.nn.utils.clip_grad_norm_(encoder.trainable().values(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
