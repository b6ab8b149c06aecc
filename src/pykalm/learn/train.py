"""The training loop: batches in, gradients of both objectives, steps, evaluations, saves. One page."""

import contextlib
import logging
import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pykalm.config import Config
from pykalm.errors import ModelError, ProcessError, TrainingError
from pykalm.learn.ahead import built_ahead
from pykalm.learn.batches import Batch, BatchBuilder, TripleOrder
from pykalm.learn.clipping import clip_gradients
from pykalm.learn.state import MetricsLog, Progress, load_state, save_state
from pykalm.learn.step import Share, StepLoss, joint_gradient, own_share
from pykalm.learn.tracking import tracking
from pykalm.memory import explained_memory
from pykalm.model.encoder import Encoder
from pykalm.processes import any_of, gather, is_main, on_main, rank

log = logging.getLogger(__name__)

MEMORY_REMEDY = (
    "Lower training.memory_tokens (gradient caching sets in, same result), then training.chunk_tokens, or give --memory, "
    "which decides both: less of it where the run has one. The last save is whole: go on with --resume --set "
    "training.memory_tokens=..., or with --resume --memory ..."
)


@dataclass(frozen=True)
class StepReport:
    """Tell how training goes: losses of the step, speed, time left; valid_mrr where the step ended in an evaluation.

    fill: the share of the computed tokens that are not padding.
    """

    step: int
    num_steps: int
    epoch: float
    loss: float
    explicit: float
    implicit: float
    kl: float
    temperature: float
    learning_rate: float
    gradient_norm: float
    examples_per_second: float
    tokens_per_second: float
    fill: float
    seconds_left: float
    valid_mrr: float | None = None


@dataclass(frozen=True, eq=False)
class Trainer:
    """Hold what a training needs.

    validate: returns the valid MRR of the encoder as it is, or None is given where the graph has no valid split;
    fingerprints: of what must not change between a stop and a resume;
    before_steps: is called with this once all that was saved is there, if steps are left;
    save_best: puts the weights where the run's users find them; watch: is told of every step.
    Of several processes all run it, with the same contents; the main one alone writes and calls watch.
    """

    encoder: Encoder
    builder: BatchBuilder
    order: TripleOrder
    config: Config
    folder: Path
    save_best: Callable[[Progress], None]
    fingerprints: dict[str, str]
    validate: Callable[[], float] | None = None
    watch: Callable[[StepReport], None] = lambda report: None
    before_steps: Callable[["Trainer"], None] = lambda trainer: None

    @property
    def num_steps(self) -> int:
        """Return how many steps the settings ask for."""
        training = self.config.training
        steps = math.ceil(training.epochs * self.order.steps_per_epoch)
        return min(steps, training.max_steps or steps)

    def num_tokens(self) -> int:
        """Return about how many tokens all steps read together, by those of the first."""
        return self.num_steps * self._batch(0).trie.num_nodes

    def run(self) -> Progress:
        """Train to the end, or until patience runs out, from the last save on where there is one.

        Raises TrainingError on a loss or gradient that is no number, and when memory runs out; KeyboardInterrupt after
        a Ctrl-C, once the step is done and saved.
        """
        training, parameters = self.config.training, self.encoder.trainable()
        evaluate_every = training.evaluate_every or self.order.steps_per_epoch
        with (
            tracking(self.config, self.folder) as track,
            _one_interrupt() as interrupted,
            explained_memory(MEMORY_REMEDY, kind=TrainingError),
        ):
            optimizer = _optimizer(parameters, self.config)
            progress = load_state(self.folder, parameters, optimizer, self.fingerprints)
            if progress.step:
                log.warning("kalm: goes on after step %d of %d.", progress.step, self.num_steps)
            self._require_the_same_everywhere(progress)
            if progress.step < self.num_steps and not progress.finished:
                self.before_steps(self)
            metrics, speed = on_main(lambda: MetricsLog(self.folder, step=progress.step)), _Speed()
            self.encoder.train()
            with built_ahead(self._build, self.num_steps, start=progress.step, device=self.encoder.device) as batch_at:
                while progress.step < self.num_steps and not progress.finished:
                    speed.start()
                    batch, share = batch_at(progress.step)
                    loss, norm = self._learn(batch, share, optimizer, progress)
                    progress.step += 1
                    speed.stop()
                    due = progress.step % evaluate_every == 0 or progress.step == self.num_steps
                    mrr = self._evaluate(progress) if due else None
                    report = self._report(progress, batch, loss, norm, speed, mrr)
                    if is_main():
                        metrics.write(**vars(report))
                        track(vars(report))
                    progress.finished = progress.finished or progress.step == self.num_steps
                    # Asked once, in all processes: an interrupt after the save is for the next step.
                    (stopped,) = any_of([interrupted.is_set()])
                    if due or (training.save_every and progress.step % training.save_every == 0) or stopped:
                        save_state(self.folder, parameters, optimizer, progress, self.fingerprints)
                    if is_main():
                        self.watch(report)
                    if stopped:
                        raise KeyboardInterrupt
        return progress

    def _learn(
        self, batch: Batch, share: Share, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> tuple[StepLoss, float]:
        """Take a step; return its losses and the norm of its gradient. Raises TrainingError where one is no number."""
        step, training = progress.step, self.config.training
        with _step_randomness(self.config.seed, step, self.encoder.device):
            loss = joint_gradient(
                self.encoder, batch, self.config.objective, memory_tokens=training.memory_tokens, share=share
            )
        norm = clip_gradients(self.encoder.trainable().values(), training.clip_norm)
        _require_numbers(loss, norm, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = self._rate(step)
        optimizer.step()
        optimizer.zero_grad()
        _require_temperature(self.encoder.temperature(), step, progress)
        return loss, norm

    def _rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return learning_rate(step, self.num_steps, self.config)

    def _batch(self, step: int) -> Batch:
        """Return the batch of a step, a function of seed and step alone."""
        return self.builder.build(self.order.at(step), np.random.default_rng([self.config.seed, step, 1]))

    def _build(self, step: int) -> tuple[Batch, Share]:
        """Return the batch of a step and this process's share of it."""
        batch = self._batch(step)
        return batch, own_share(self.encoder, batch, self.config.training.memory_tokens)

    def _require_the_same_everywhere(self, progress: Progress) -> None:
        """Raise ProcessError where another process has other content or another step, as from a folder that is not shared."""
        found = gather({**self.fingerprints, "last save": f"step {progress.step}"})
        for what, mine in found[0].items():
            if others := {process[what] for process in found} - {mine}:
                raise ProcessError(
                    f"{what}: wanted the same in all processes, found {mine[:12]} in the main one and "
                    f"{', '.join(sorted(other[:12] for other in others))} elsewhere. All machines need the same graph, "
                    "model and run folder, under the same paths."
                )

    def _evaluate(self, progress: Progress) -> float | None:
        """Evaluate on valid; keep the weights when they are the best so far, or the last where there is no valid."""
        try:
            mrr = self.validate() if self.validate else None
        except ModelError as error:
            raise TrainingError(f"step {progress.step}: {error} {_advice(progress)}") from error
        self.encoder.train()
        if mrr is None or progress.best_mrr is None or mrr > progress.best_mrr:
            progress.best_mrr, progress.best_step, progress.waited = mrr, progress.step, 0
            self.save_best(progress)
        else:
            progress.waited += 1
            patience = self.config.training.patience
            progress.finished = patience is not None and progress.waited >= patience
        return mrr

    def _report(
        self, progress: Progress, batch: Batch, loss: StepLoss, norm: float, speed: "_Speed", mrr: float | None
    ) -> StepReport:
        seconds = speed.seconds_per_step()
        return StepReport(
            step=progress.step,
            num_steps=self.num_steps,
            epoch=progress.step / self.order.steps_per_epoch,
            loss=loss.total,
            explicit=loss.explicit,
            implicit=loss.implicit,
            kl=loss.kl,
            temperature=self.encoder.temperature(),
            learning_rate=self._rate(progress.step - 1),
            gradient_norm=norm,
            examples_per_second=batch.num_triples / speed.last,
            tokens_per_second=batch.trie.num_nodes / speed.last,
            fill=self.encoder.fill(batch.trie),
            seconds_left=seconds * (self.num_steps - progress.step),
            valid_mrr=mrr,
        )


def learning_rate(step: int, num_steps: int, config: Config) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then constant, or down to 0 by cosine or line."""
    training = config.training
    warmup = math.ceil(training.warmup_share * num_steps)
    if step < warmup:
        return config.highest_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    shares = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return config.highest_rate * shares[training.schedule]


def _optimizer(parameters: dict[str, nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Return AdamW; vectors and the temperature are not decayed towards 0."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    others = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = {parameter.device.type for parameter in parameters.values()} == {"cuda"}  # one kernel for many weights
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.highest_rate, fused=fused or None
    )


def _require_numbers(loss: StepLoss, norm: float, step: int, progress: Progress) -> None:
    """Raise TrainingError before a step that would spoil the weights."""
    if math.isfinite(loss.total) and math.isfinite(norm):
        return
    raise TrainingError(
        f"step {step + 1}: wanted a finite loss, found loss {loss.total} (explicit {loss.explicit}, implicit "
        f"{loss.implicit}, KL {loss.kl}) and gradient norm {norm}. {_advice(progress)}"
    )


def _require_temperature(temperature: float, step: int, progress: Progress) -> None:
    """Raise TrainingError after a step that threw τ out of what can be computed with, before it is used or saved."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise TrainingError(
            f"step {step + 1}: wanted a temperature above 0 and finite, found {temperature}. {_advice(progress)}"
        )


def _advice(progress: Progress) -> str:
    kept = (
        "nothing was saved yet"
        if progress.best_step is None
        else f"the checkpoint of step {progress.best_step} is whole"
    )
    return f"Lower training.learning_rate or raise training.warmup_share in a new run; {kept}."


@contextlib.contextmanager
def _step_randomness(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Make dropout a function of seed, step and process, so that a resumed run draws what an uninterrupted one would."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1)[0]))
        yield


@contextlib.contextmanager
def _one_interrupt() -> Iterator[threading.Event]:
    """Note a Ctrl-C or a polite kill instead of stopping in the middle of a step; a second one stops at once."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: object) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()
        log.warning("kalm: stops once this step is done and saved; a second time stops at once.")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Speed:
    """Time the steps without their evaluations."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=20)
        self.last = math.nan

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.last = time.perf_counter() - self.started
        self.recent.append(self.last)

    def seconds_per_step(self) -> float:
        return statistics.median(self.recent)
