"""Compare what systems learn, not how fast they are: at equal examples, or at equal training time.

    sh scripts/quality examples --out DIR      # published recipe and kalm on exactly the same triples, test MRR
    sh scripts/quality time --out DIR          # the same and neighbourhoods, valid MRR against time
    sh scripts/quality show --out DIR          # tables and a figure of what is there

Several sizes and rates, `--batch-size 12,64,128 --rate 1e-3,2e-3`, are tried in all combinations.

Every trial is a process of its own with one thread and a file in DIR; what is there is not run again. Time is processor
time of the steps, batches and optimiser included and evaluations not, so that two trials may run side by side. Names
only, LoRA r 8 on the feed-forward part, dropout 0.05, AdamW at 1e-3 unless said: a tenth of warm-up, then cosine to 0, by
the share of the budget used.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bank import EntityBank
from matplotlib.figure import Figure

from pykalm.api import batch_builder, triple_order
from pykalm.bench.published import BATCH_SIZE, COMPLETIONS, PublishedRecipe
from pykalm.bench.training import new_optimizer
from pykalm.config import AdapterSettings, Config, ObjectiveSettings, TextSettings, TrainingSettings
from pykalm.evaluate.links import evaluate_links, validation_mrr
from pykalm.files import replace_file
from pykalm.graph.catalogue import load_graph
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.subgraph import sample_for_validation
from pykalm.learn.batches import TripleOrder
from pykalm.learn.step import joint_gradient
from pykalm.model.run import Run, build_run, load_base
from pykalm.settings import automatic_rate

PUBLISHED = "published"
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "random": {},
    "neighbourhood": {"training": {"batching": "neighbourhood"}},
    "together": {"training": {"directions": "together"}},
    "apart": {"training": {"directions": "apart"}},
    "among": {"objective": {"self_negatives": "among"}, "training": {"directions": "together"}},
    "none": {"objective": {"self_negatives": "none"}, "training": {"directions": "together"}},
}
"""What each of kalm's systems changes in the default settings; the last two are compared with `together`."""
BANKS: dict[str, dict[str, Any]] = {"bank": {}, "young-bank": {"age": 8}, "momentum-bank": {"momentum": 0.5}}
"""Neighbourhoods with vectors of earlier steps as further negatives, and of which kind (scripts/bank.py)."""
WAYS |= dict.fromkeys(BANKS, WAYS["neighbourhood"])
SYSTEMS = {PUBLISHED, *WAYS}
EXAMPLES, TIME = ("random", PUBLISHED), ("random", "neighbourhood", PUBLISHED)
SMALL_BATCH = BATCH_SIZE // 2
"""Triples of a step at equal examples: both directions of them are as many examples as a published step has."""
TIMED_BATCH = 64
"""Triples of a step of kalm at equal time; the published recipe takes its own, SMALL_BATCH."""
RATE, WARM_UP = 1e-3, 0.1
DASHES = {SMALL_BATCH: "--", TIMED_BATCH: "-", 128: ":"}
"""Lines by the triples of a step."""
COLOURS = {
    "random": "#2a6f97",
    "neighbourhood": "#d97706",
    "together": "#5b8c5a",
    "apart": "#a44a3f",
    "among": "#8a8a8a",
    "none": "#b08bbb",
    PUBLISHED: "#4a4a4a",
    "bank": "#8e3b8a",
    "young-bank": "#c06c9b",
    "momentum-bank": "#6f5aa8",
}


@dataclass(frozen=True)
class Trial:
    """Say what is tried: exactly one of triples and seconds is the budget."""

    graph: str
    system: str
    seed: int
    batch_size: int
    rate: float = RATE
    triples: int | None = None
    seconds: float | None = None
    evaluations: int = 4

    @property
    def file(self) -> str:
        """Return the name of its file."""
        kind = "examples" if self.triples else "time"
        rate = "" if self.rate == RATE else f".{self.rate:g}"
        return f"{kind}.{Path(self.graph).name}.{self.system}.{self.batch_size}{rate}.{self.seed}.json"


@dataclass
class Outcome:
    """Hold what came out: points are (seconds, triples seen, valid MRR), test is that of equal examples only."""

    trial: Trial
    steps: int = 0
    triples: float = 0
    seconds: float = 0
    points: list[tuple[float, float, float]] = field(default_factory=list)
    test: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Run what is missing, or show what is there."""
    given = parse()
    if given.command == "show":
        return show(given.out)
    given.out.mkdir(parents=True, exist_ok=True)
    trials = [trial for trial in dict.fromkeys(planned(given)) if not (given.out / trial.file).exists()]
    with ProcessPoolExecutor(given.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(run, trial, given.out) for trial in trials]):
            print(done.result(), flush=True)
    show(given.out)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["examples", "time", "show"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graphs", default="codex-s,wn18rr-v1")
    parser.add_argument("--systems", help=f"examples: {','.join(EXAMPLES)}; time: {','.join(TIME)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--triples", type=int, default=1024, help="budget of `examples`")
    parser.add_argument("--seconds", type=float, default=120, help="budget of `time`")
    parser.add_argument(
        "--batch-size",
        type=sizes,
        default=(),
        help=f"triples of a step; by default {SMALL_BATCH} for `examples` and the published recipe, else {TIMED_BATCH}",
    )
    parser.add_argument(
        "--rate", type=rates, default=(RATE,), help="highest learning rate of AdamW; `auto` is that of `kalm train`"
    )
    parser.add_argument("--processes", type=int, default=2, help="trials side by side")
    return parser.parse_args()


def sizes(text: str) -> tuple[int, ...]:
    """Read numbers of triples, with commas between them."""
    found = tuple(map(int, text.split(",")))
    if min(found) < 1:
        raise ValueError(text)
    return found


def rates(text: str) -> tuple[float | None, ...]:
    """Read learning rates, with commas between them; `auto` is None."""
    found = tuple(None if part.strip() == "auto" else float(part) for part in text.split(","))
    if not all(rate is None or 0 < rate < math.inf for rate in found):
        raise ValueError(text)
    return found


def planned(given: argparse.Namespace) -> Iterator[Trial]:
    """Yield the trials, all systems of a seed together, so that a stop leaves fair pairs."""
    by_examples = given.command == "examples"
    systems = given.systems.split(",") if given.systems else EXAMPLES if by_examples else TIME
    if unknown := set(systems) - SYSTEMS:
        raise SystemExit(f"quality: wanted some of {', '.join(sorted(SYSTEMS))}, found {', '.join(sorted(unknown))}.")
    budget: dict[str, Any] = {"triples": given.triples} if by_examples else {"seconds": given.seconds}
    for seed, graph, system in product(map(int, given.seeds.split(",")), given.graphs.split(","), systems):
        own = SMALL_BATCH if by_examples or system == PUBLISHED else TIMED_BATCH
        for size, rate in product(given.batch_size or (own,), given.rate):
            yield Trial(graph, system, seed, size, automatic_rate("lora", size) if rate is None else rate, **budget)


def run(trial: Trial, out: Path) -> str:
    """Train and measure in this process; write the outcome and return a line about it."""
    torch.set_num_threads(1)
    torch.manual_seed(trial.seed)
    prepared = prepare(trial)
    outcome = train(trial, prepared)
    if trial.triples:
        report, _ = evaluate_links(prepared.graph, prepared.encoder, prepared.verbalizer)
        outcome.test = report.mean.to_dict()
    text = json.dumps(asdict(outcome), indent=1)
    replace_file(out / trial.file, lambda file: file.write_text(text + "\n", encoding="utf-8"))
    reached = outcome.test.get("mrr", outcome.points[-1][2])
    return f"{trial.file}: {outcome.steps} steps, {outcome.triples:.0f} triples, {outcome.seconds:.0f} s, MRR {reached:.3f}"


def prepare(trial: Trial) -> Run:
    """Return a run that is nowhere on disk, with new adapters."""
    published = trial.system == PUBLISHED
    way = WAYS.get(trial.system, {})
    config = Config(
        graph=trial.graph,
        seed=trial.seed,
        text=TextSettings(descriptions=False, template="published" if published else "prefix-sharing"),
        adapter=AdapterSettings(rank=8, alpha=16, dropout=0.05, targets="mlp"),
        objective=ObjectiveSettings(
            completion_share=COMPLETIONS / SMALL_BATCH,
            learn_temperature=not published,
            kl_weight=0,
            **way.get("objective", {}),
        ),
        training=TrainingSettings(batch_size=trial.batch_size, device="cpu", **way.get("training", {})),
    )
    return build_run(Path("quality"), config, load_graph(trial.graph), load_base(config), temperature=0.05)


def train(trial: Trial, prepared: Run) -> Outcome:
    """Train until the budget is used, with evaluations on valid in between."""
    encoder, outcome = prepared.encoder, Outcome(trial)
    valid = sample_for_validation(prepared.graph, triples=150, entities=1000, seed=0)
    optimizer, step = new_optimizer(encoder), steps(trial, prepared)
    due = [(number + 1) / trial.evaluations for number in range(trial.evaluations)] if trial.seconds else [1.0]
    while due:
        used = share(trial, outcome)
        if used >= due[0]:
            mrr = validation_mrr(valid, encoder, prepared.verbalizer.for_graph(valid))
            outcome.points.append((outcome.seconds, outcome.triples, mrr))
            due = [later for later in due if later > used]
            continue
        encoder.train()
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(used, trial)
        outcome.triples += next(step)
        torch.nn.utils.clip_grad_norm_(encoder.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        outcome.seconds += time.process_time() - started
        outcome.steps += 1
    return outcome


def steps(trial: Trial, prepared: Run) -> Iterator[float]:
    """Leave the gradient of step after step in the encoder; yield the triples, in both directions, of each."""
    learned = learned_graph(trial, prepared.graph)
    if trial.system == PUBLISHED:
        return published_steps(trial, prepared, learned)
    return own_steps(trial, prepared, triple_order(replace(prepared, graph=learned)))


def learned_graph(trial: Trial, graph: KnowledgeGraph) -> KnowledgeGraph:
    """Return a graph with the training triples of a trial alone."""
    if trial.triples is None:
        return graph
    drawn = np.random.default_rng([trial.seed, 9]).permutation(graph.triples("train"))[: trial.triples]
    return replace(graph, splits={**graph.splits, "train": drawn})


def published_steps(trial: Trial, prepared: Run, learned: KnowledgeGraph) -> Iterator[float]:
    """Take steps of the published recipe, 24 directed triples each where a step of kalm has 12 triples."""
    recipe = PublishedRecipe(prepared.encoder, prepared.verbalizer, prepared.config.objective, skip_unused=True)
    size, both = 2 * trial.batch_size, learned.both_directions("train")
    for epoch in range(10**9):
        directed = np.random.default_rng([trial.seed, epoch]).permutation(both)
        for start in range(0, len(directed), size):
            chosen = directed[start : start + size]
            recipe.gradient(chosen, chosen[: max(1, len(chosen) * COMPLETIONS // BATCH_SIZE)])
            yield len(chosen) / 2


def own_steps(trial: Trial, prepared: Run, order: TripleOrder) -> Iterator[float]:
    """Take steps as `kalm train` does; masked is what the whole graph holds."""
    builder = batch_builder(prepared)
    kind = BANKS.get(trial.system)
    bank = None if kind is None else EntityBank(builder, prepared.encoder.width, **kind)
    for number in range(10**9):
        triples = order.at(number)
        batch = builder.build(triples, np.random.default_rng([trial.seed, number, 1]))
        with nullcontext() if bank is None else bank.beside(batch, triples):
            joint_gradient(prepared.encoder, batch, prepared.config.objective, memory_tokens=1 << 20)
        yield batch.num_triples


def share(trial: Trial, outcome: Outcome) -> float:
    """Return the share of the budget that is used."""
    return outcome.triples / trial.triples if trial.triples else outcome.seconds / (trial.seconds or math.inf)


def learning_rate(used: float, trial: Trial) -> float:
    """Return the rate at a share of the budget; a first step has a rate above 0."""
    if used < WARM_UP:
        return trial.rate * max(used, WARM_UP / 10) / WARM_UP
    return trial.rate * (1 + math.cos(math.pi * (used - WARM_UP) / (1 - WARM_UP))) / 2


def show(out: Path) -> None:
    """Print a line per graph and system with the spread over seeds, and draw valid MRR against time."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(out.glob("*.json")):
        outcome = json.loads(file.read_text(encoding="utf-8"))
        kind, trial = file.name.split(".")[0], outcome["trial"]
        system = f"{trial['system']}, {trial['batch_size']}"
        if (rate := trial.get("rate", RATE)) != RATE:
            system += f", {rate:g}"
        found.setdefault(f"{kind} {trial['graph']}", {}).setdefault(system, []).append(outcome)
    print(f"{'budget, graph':24} {'system, of a step':24} {'seeds':>5} {'triples':>8} {'CPU s':>6} {'MRR':>6} each")
    for name, systems in found.items():
        for system, outcomes in systems.items():
            reached = [o["test"].get("mrr", o["points"][-1][2]) for o in outcomes]
            triples, seconds = (statistics.mean(o[key] for o in outcomes) for key in ("triples", "seconds"))
            each = " ".join(f"{mrr:.3f}" for mrr in reached)
            print(
                f"{name:24} {system:24} {len(outcomes):5} {triples:8.0f} {seconds:6.0f} {statistics.mean(reached):6.3f} {each}"
            )
    if timed := {name.removeprefix("time "): systems for name, systems in found.items() if name.startswith("time")}:
        draw(timed, out / "quality.png")


def final_mrr(outcomes: list[dict[str, Any]]) -> float:
    """Return the mean valid MRR at the end of some trials."""
    return statistics.mean(outcome["points"][-1][2] for outcome in outcomes)


def draw(graphs: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Draw valid MRR against training time, a panel for each graph: seeds as thin lines, their mean as a thick one."""
    figure = Figure(figsize=(5.2 * len(graphs), 5.6), layout="constrained", facecolor="white")
    for panel, (graph, systems) in zip(figure.subplots(1, len(graphs), squeeze=False)[0], graphs.items(), strict=True):
        for label, outcomes in sorted(systems.items(), key=lambda item: -final_mrr(item[1])):
            system, size = label.split(", ")[:2]
            colour, dash = COLOURS[system], DASHES.get(int(size), "-")
            curves = [np.array(outcome["points"]) for outcome in outcomes]
            for curve in curves:
                panel.plot(curve[:, 0], curve[:, 2], dash, color=colour, linewidth=0.7, alpha=0.5)
            mean = np.mean(curves, axis=0)
            panel.plot(mean[:, 0], mean[:, 2], dash, color=colour, linewidth=2.0, marker="o", markersize=4,
                       label=f"{final_mrr(outcomes):.3f}  {label}")  # fmt: skip
        panel.set_title(graph, fontsize=11, loc="left", fontweight="bold")
        panel.set_xlabel("training time (processor seconds, one thread)")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(color="#e8e8e8", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(
            title="at the end: system, triples of a step, rate", fontsize=8.5, title_fontsize=8.5, alignment="left",
            loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False, handlelength=3.2,
        )  # fmt: skip
    figure.axes[0].set_ylabel("valid MRR (150 triples, 1,000 candidates)")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    main()
