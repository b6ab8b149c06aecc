"""Ablations: the same training with one setting changed at a time, several seeds each, one table. docs/compare.md.

OUT/VARIANT/seed-N is a run folder like any other; OUT/ablation.json holds what was measured. What is there already is not
trained again, so a stopped sweep goes on where it was, and variants and seeds may be added.
"""

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pykalm.api import evaluate_links, train
from pykalm.config import Config
from pykalm.errors import ConfigError, UsageError
from pykalm.evaluate.bootstrap import METRICS
from pykalm.evaluate.completion_loss import completion_loss
from pykalm.evaluate.links import choose_triples
from pykalm.files import replace_file
from pykalm.graph.catalogue import load_graph
from pykalm.learn.train import StepReport
from pykalm.model.encoder import Progress
from pykalm.model.run import Run
from pykalm.processes import join, on_main
from pykalm.resolve import resolve_settings
from pykalm.terminal import say

Settings = Mapping[str, Any]

VARIANTS: dict[str, Settings] = {
    "reference": {},
    "explicit-only": {"objective.implicit": False},
    "implicit-only": {"objective.explicit": False},
    "lambda-0.1": {"objective.implicit_weight": 0.1},
    "lambda-1": {"objective.implicit_weight": 1.0},
    "no-kl": {"objective.kl_weight": 0.0},
    "kl": {"objective.kl_weight": 1.0},
    "fixed-temperature": {"objective.learn_temperature": False},
    "no-margin": {"objective.margin": 0.0},
    "self-negatives-among": {"objective.self_negatives": "among"},
    "no-self-negatives": {"objective.self_negatives": "none"},
    "directions-together": {"training.directions": "together"},
    "directions-apart": {"training.directions": "apart"},
    "query-view": {"objective.views": "query"},
    "candidate-view": {"objective.views": "candidate"},
    "mean-pooling": {"text.pooling": "mean"},
    "published-template": {"text.template": "published"},
    "prefix-sharing-template": {"text.template": "prefix-sharing"},
    "names-only": {"text.descriptions": False},
    "with-descriptions": {"text.descriptions": True},
}
"""What each variant changes in the settings that all share."""

SPLITS = ("valid", "test")
RECORD = Path("results") / "ablation.json"


def run_ablation(
    graph: str | Path | None = None,
    *,
    out: str | Path,
    model: str | Path | None = None,
    config: Config | None = None,
    settings: Settings | None = None,
    variants: Sequence[str] | Mapping[str, Settings] | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    split: str = "test",
    watch: Callable[[StepReport], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train every variant with every seed, measure each on valid and test, and return figures with their spread.

    The shared settings are config, then graph, model, settings and steps (training.max_steps); the first variant is what
    the others are compared with. variants: names of VARIANTS, by default those that change something, or settings of
    your own by name. split: the one whose figures are summed up. Raises UsageError for variants, seeds or a split that
    cannot be, GraphError where the graph has no triples there, ConfigError where a run in `out` was begun with other
    settings, and what `train` raises.
    """
    given = {"graph": graph, "model": model, "training.max_steps": steps}
    shared = {**(settings or {}), **{key: value for key, value in given.items() if value is not None}}
    reference = resolve_settings(config, shared, None, is_loaded=False)
    reference = reference.with_training(learning_rate=reference.highest_rate)  # one of all variants and of later calls
    chosen = _choose(variants, reference)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds: wanted one or more distinct numbers, found {list(seeds)}.")
    if split not in SPLITS:
        raise UsageError(f"split: wanted {' or '.join(SPLITS)}, found {split!r}.")
    choose_triples(load_graph(reference.graph), split, None, 0)  # before hours of training
    join(reference.training.device)
    runs: list[dict[str, Any]] = []
    jobs = [(name, seed) for seed in seeds for name in chosen]  # so that a part of the sweep has all variants
    for number, (name, seed) in enumerate(jobs, start=1):
        say(f"{name}, seed {seed} ({number} of {len(jobs)})")
        wanted = resolve_settings(reference, {**chosen[name], "seed": seed}, None, is_loaded=False)
        record = _measured(Path(out) / name / f"seed-{seed}", wanted, watch, progress)
        runs.append({"variant": name, **record})
        result = _summary(reference, chosen, runs, split=split, seeds=seeds)
        on_main(partial(_write, Path(out) / "ablation.json", result))
    return result


def _choose(variants: Sequence[str] | Mapping[str, Settings] | None, reference: Config) -> dict[str, Settings]:
    """Return the settings that each variant changes; raises UsageError for a name that is unknown or changes nothing."""

    def changes(settings: Settings) -> bool:
        return resolve_settings(reference, settings, None, is_loaded=False).settled() != reference.settled()

    def can_change(settings: Settings) -> bool:
        with contextlib.suppress(ConfigError):  # neighbourhoods cannot be drawn apart
            return changes(settings)
        return False

    if variants is None:
        return {name: settings for name, settings in VARIANTS.items() if not settings or can_change(settings)}
    if not isinstance(variants, Mapping):
        if unknown := [name for name in variants if name not in VARIANTS]:
            raise UsageError(f"variants: wanted some of {', '.join(VARIANTS)}; found {', '.join(unknown)}.")
        variants = {name: VARIANTS[name] for name in variants}
    if idle := [name for name, settings in variants.items() if settings and not changes(settings)]:
        raise UsageError(
            f"variants: wanted changes, found that {', '.join(idle)} changes nothing in the shared settings. Leave it out."
        )
    if not variants:
        raise UsageError(f"variants: wanted one at least, found none. Known: {', '.join(VARIANTS)}.")
    return dict(variants)


def _measured(
    folder: Path, config: Config, watch: Callable[[StepReport], None] | None, progress: Progress | None
) -> dict[str, Any]:
    """Return what one run was measured at, trained and measured now as far as it has not been."""
    begun = on_main(lambda: (folder / "config.yaml").is_file())
    if begun:
        resolve_settings(config, {}, folder, is_loaded=False)  # raises where other settings made it
        record: dict[str, Any] | None = on_main(lambda: _read_record(folder))
        if record is not None:
            return record
    run = train(out=folder, config=config, resume=begun, watch=watch, progress=progress)
    splits = {split: _figures(run, split, progress) for split in SPLITS if len(run.graph.splits.get(split, ()))}
    record = {"seed": config.seed, "run": f"{folder.parent.name}/{folder.name}", "splits": splits}
    on_main(partial(_write, folder / RECORD, record))
    return record


def _write(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_file(file, lambda draft: draft.write_text(text, encoding="utf-8"))


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Return what was written when a run had been trained and measured, or None."""
    file = folder / RECORD
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _figures(run: Run, split: str, progress: Progress | None) -> dict[str, float | None]:
    """Measure link prediction and, where answers can end, the loss of completing the triples of a split."""
    metrics = evaluate_links(run, split=split, progress=progress).mean.to_dict()
    can_end = run.verbalizer.tokenizer.eos_token_id is not None
    loss = completion_loss(run.graph, run.encoder, run.verbalizer, split=split) if can_end else None
    return {**metrics, "answer_loss": loss}


def _summary(
    reference: Config,
    chosen: Mapping[str, Settings],
    runs: Sequence[dict[str, Any]],
    *,
    split: str,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Return shared settings, all single figures, and by variant the mean and standard deviation over what is there."""
    training = reference.training
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} epochs"
    first = {run["seed"]: run["splits"][split]["mrr"] for run in runs if run["variant"] == next(iter(chosen))}
    variants = {}
    for name, settings in chosen.items():
        own = [run for run in runs if run["variant"] == name]
        figures = {
            figure: _spread([run["splits"][split][figure] for run in own]) for figure in (*METRICS, "answer_loss")
        }
        figures["mrr_difference"] = _spread([run["splits"][split]["mrr"] - first[run["seed"]] for run in own])
        variants[name] = {"settings": dict(settings), "figures": figures}
    return {
        "graph": reference.graph,
        "model": reference.model,
        "split": split,
        "seeds": list(seeds),
        "budget": f"{length} of {training.batch_size} triples",
        "shared": reference.model_dump(mode="json", exclude={"seed"}),
        "variants": variants,
        "runs": list(runs),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Return mean, standard deviation (of a sample, None for one) and number of the values that there are."""
    numbers = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "deviation": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "count": len(numbers),
    }
