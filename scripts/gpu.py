"""Train on an NVIDIA GPU to the best settings known, measure on test, append the result to docs/results.md. See scripts/gpu."""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import pykalm
from pykalm.api import batch_builder, triple_order
from pykalm.bench.flops import model_cost, useful_flops
from pykalm.bench.machine import matmul_peak
from pykalm.cli import watch_training
from pykalm.config import parse_overrides
from pykalm.errors import ConfigError, KalmError
from pykalm.evaluate.links import LinkPredictionReport
from pykalm.learn.state import read_metrics
from pykalm.model.run import Run
from pykalm.terminal import say, show_progress

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS_FILE = REPOSITORY / "scripts" / "gpu.yaml"
RESULTS = REPOSITORY / "docs" / "results.md"
DRY_LIMIT = 3
"""Test triples that the dry form asks."""
WARM_STEPS = 20
"""First steps that are left out of the speed: kernels are compiled and memory is taken in them."""


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, append; return the exit code."""
    given = parse(arguments)
    try:
        settings = settings_of(given)
        if not given.dry and not torch.cuda.is_available():
            raise KalmError(
                "make gpu wanted an NVIDIA GPU, and PyTorch finds none here. Run it on a machine with one and with a CUDA "
                "build of PyTorch, try the way here with `make gpu ARGUMENTS=--dry`, or train with `kalm train`."
            )
        print(append_result(given, settings))
    except KalmError as error:
        say(f"kalm: {error}")
        return error.exit_code
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--graph", choices=["wn18rr", "fb15k-237"], default="wn18rr")
    parser.add_argument("--model", default="smollm2-135m", help="known name, hub id, folder or GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the run; runs/gpu-GRAPH by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting; may be repeated")
    parser.add_argument("--dry", action="store_true", help="two steps on a CPU and the bundled graph")
    parser.add_argument("--results", type=Path, help="where to append; docs/results.md, or RUN/results.md with --dry")
    return parser.parse_args(arguments)


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of scripts/gpu.yaml for the graph, or for the dry form, and those of the command line.

    Raises ConfigError for one that is not KEY=VALUE.
    """
    table = yaml.safe_load(SETTINGS_FILE.read_text(encoding="utf-8"))
    problems: list[str] = []
    own = {setting.key: setting.value for setting in parse_overrides(given.set, problems)}
    if problems:
        raise ConfigError("\n".join(problems))
    return {**table["all"], **table["dry" if given.dry else given.graph], "seed": given.seed, **own}


def append_result(given: argparse.Namespace, settings: dict[str, Any]) -> str:
    """Train and measure; append the section to the results and return it."""
    graph = "world" if given.dry else given.graph
    stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    out = given.out or REPOSITORY / "runs" / f"gpu-{graph}-{stamp}"
    if not given.dry and all(entry.folder is None for entry in pykalm.list_data() if entry.name == graph):
        pykalm.fetch_data(graph)
    started = time.perf_counter()
    with show_progress("training") as watch:
        run = pykalm.train(graph, out=out, model=given.model, settings=settings, watch=watch_training(watch))
    trained = time.perf_counter()
    with show_progress("evaluating") as progress:
        report = pykalm.evaluate_links(run, split="test", limit=DRY_LIMIT if given.dry else None, progress=progress)
    minutes = [(trained - started) / 60, (time.perf_counter() - trained) / 60]
    text = section(given, settings, run, report, minutes)
    target = given.results or (out / "results.md" if given.dry else RESULTS)
    with target.open("a", encoding="utf-8") as file:
        file.write(text)
    say(f"Appended to {target}; the run is in {out}.")
    return text


def section(
    given: argparse.Namespace, settings: dict[str, Any], run: Run, report: LinkPredictionReport, minutes: list[float]
) -> str:
    """Write the result with all that it belongs to."""
    metrics, mean = read_metrics(run.path), report.mean
    steady = metrics[WARM_STEPS:] or metrics
    speeds = {
        key: statistics.median(line[key] for line in steady) for key in ("examples_per_second", "tokens_per_second")
    }
    device = run.encoder.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    best = [line["valid_mrr"] for line in metrics if line.get("valid_mrr") is not None]
    options = [
        f"--graph {given.graph}" if not given.dry else "--dry",
        *(f"--set {shlex.quote(one)}" for one in given.set),
    ]
    command = f'make gpu ARGUMENTS="{" ".join(options)} --model {given.model} --seed {run.config.seed}"'
    asked = f"{len(report.triples):,} test triples, both directions, all {run.graph.num_entities:,} entities, filtered"
    return f"""
## {datetime.date.today()} · {run.graph.name} on {name}{" (dry: shows that it runs, nothing else)" * given.dry}

`{command}`: {given.model}, seed {run.config.seed}, {len(metrics)} steps, torch {torch.__version__}, attention
{run.encoder.attention}. {asked}.

| MR | MRR | H@1 | H@3 | H@10 | training, min | test, min | examples/s | tokens/s | utilisation |
|---|---|---|---|---|---|---|---|---|---|
| {mean.mr:.1f} | {mean.mrr:.3f} | {mean.hits_at_1:.3f} | {mean.hits_at_3:.3f} | {mean.hits_at_10:.3f} | {minutes[0]:.1f} \
| {minutes[1]:.1f} | {speeds["examples_per_second"]:.1f} | {speeds["tokens_per_second"]:.0f} \
| {utilisation(run, speeds["examples_per_second"]):.1%} |

Valid MRR: {", ".join(f"{mrr:.3f}" for mrr in best)}. Speeds are medians after the first {WARM_STEPS} steps;
utilisation is useful model FLOPs of the first batch, at that speed, over the best bf16 matrix product measured here.
Settings: `{json.dumps(settings)}`
"""


def utilisation(run: Run, examples_per_second: float) -> float:
    """Return the useful operations per second of training over those of the fastest matrix product of this device."""
    batch = batch_builder(run).build(triple_order(run).at(0), np.random.default_rng(0))
    flops = useful_flops(model_cost(run.encoder), batch) * examples_per_second / batch.num_triples
    return flops / matmul_peak(run.encoder.device, width=run.encoder.width)


if __name__ == "__main__":
    sys.exit(main())
