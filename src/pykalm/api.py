"""The functions that people call, from a notebook or through the command line: train, measure, ask."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pykalm.config import Config, TextSettings
from pykalm.errors import KalmError, ModelError, RunError, TrainingError
from pykalm.evaluate.links import LinkPredictionReport, validation_mrr
from pykalm.evaluate.links import evaluate_links as measure_links
from pykalm.files import only_writer, recover_folder, replace_file
from pykalm.graph.catalogue import GraphEntry, fetch_graph, list_graphs, load_graph
from pykalm.graph.check import GraphCheck, check_graph
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.known import known_answers
from pykalm.graph.subgraph import sample_for_validation
from pykalm.learn.batches import BatchBuilder, TripleOrder
from pykalm.learn.footprint import Fit, fit_budget, measure_footprint
from pykalm.learn.state import STATE_FILE
from pykalm.learn.tracking import require_trackers
from pykalm.learn.train import StepReport, Trainer
from pykalm.memory import explained_memory, format_size
from pykalm.model.compiled import compile_layers, undo_compiling
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.index import EntityIndex, build_index, index_fingerprint
from pykalm.model.load import load_tokenizer
from pykalm.model.run import Run, load_baseline, load_run, new_run, read_run_config, reopen_run
from pykalm.model.sharding import is_sharded
from pykalm.processes import any_of, count, failing_together, gather, holding, join, on_main
from pykalm.resolve import resolve_settings
from pykalm.text.verbalize import Verbalizer
from pykalm.use.predict import Prediction, Predictor

__all__ = [
    "GraphCheck", "GraphEntry", "KnowledgeGraph", "LinkPredictionReport", "Prediction", "Run", "StepReport", "UnsavedReport",
    "check_data", "evaluate_links", "fetch_data", "list_data", "load_graph", "load_run", "predict", "train",
]  # fmt: skip

log = logging.getLogger(__name__)

WORTH_COMPILING = {"cpu": 2e14, "cuda": 5e15}
"""Weights times tokens of a training from which on compiled layers save several times what compiling takes, on two threads, or
a large GPU: half an hour and some eight minutes (docs/log.md). More threads, GPUs or processes need as much more."""
MEASURING_REMEDY = "Three rows were tried for what a token takes: lower training.row_tokens, or take a smaller model."


def train(
    graph: KnowledgeGraph | str | Path | None = None,
    *,
    out: str | Path,
    model: str | Path | None = None,
    config: Config | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    watch: Callable[[StepReport], None] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Align a language model with a graph, in a new run folder or, with resume, in the one that stopped there.

    settings: values by dotted key, as {"training.epochs": 5}; watch is told of every step, and progress, before the first
    one, how far the base model is with its own texts (done, total), by any thread. A graph that is a folder is
    kept as an absolute path, a named one by its name. Returns the run with its best weights. Raises RunError where `out`
    holds a run already (or none, with resume), ConfigError for wrong settings, TrainingError where it cannot go on.
    In a launch of several processes all call it alike; the main one alone writes and calls watch and progress.
    """
    out = Path(out)
    is_loaded = isinstance(graph, KnowledgeGraph)
    # A graph object on resume may have come from anywhere: the run knows it by its fingerprint.
    source = graph if not isinstance(graph, KnowledgeGraph) else None if resume else graph.name
    given = {key: value for key, value in (("graph", source), ("model", model)) if value is not None}
    config = resolve_settings(config, given | dict(settings or {}), out if resume else None, is_loaded=is_loaded)
    loaded = graph if isinstance(graph, KnowledgeGraph) else load_graph(config.graph)
    require_trackers(config.training.trackers)
    join(config.training.device)
    with holding(lambda: only_writer(out)):
        chosen = resume and on_main(lambda: _has_chosen_passes(out, config))
        run = _reopen(out, config, loaded) if resume else new_run(out, config, loaded, progress=progress)
        if config.training.memory is not None and not chosen:
            run = _with_passes_for(config.training.memory, run)
        _trainer(run, watch).run()
    return load_run(out, device=config.training.device, graph=loaded)


class UnsavedReport(RunError):
    """Say that a measurement is done but could not be written; `report` holds it."""

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


def evaluate_links(
    run: Run,
    *,
    split: str | None = None,
    baseline: bool = False,
    graph: KnowledgeGraph | str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> LinkPredictionReport:
    """Measure link prediction in both directions over all entities, and save it under RUN/results. EVALUATION.md §1.

    split: evaluation.split of the run by default; baseline: measure the unaligned model instead, same protocol; graph:
    another graph than the one of the run, whose relations and entities it may never have seen; limit: so many triples
    only, drawn by seed. Raises UnsavedReport, which holds the report, where RUN/results cannot be written; UsageError
    for a limit below 1. In a launch of several processes all call it alike and share the work; the main one writes.
    """
    split = run.config.evaluation.split if split is None else split
    if graph is not None:
        other = graph if isinstance(graph, KnowledgeGraph) else load_graph(graph)
        run = dataclasses.replace(run, graph=other, verbalizer=run.verbalizer.for_graph(other))
    measured = load_baseline(run) if baseline else run
    own = graph is None and not baseline
    saved = _fresh_index(run) if own else None
    report, index = measure_links(
        run.graph,
        measured.encoder,
        run.verbalizer,
        split=split,
        limit=limit,
        seed=run.config.seed,
        index=saved,
        chunk_queries=run.config.evaluation.chunk_queries,
        dtype=_vector_type(run),
        device=measured.encoder.device,
        about=about_run(run, baseline=baseline),
        progress=progress,
    )
    if own and saved is None:
        _keep_index(index, run.path / "index")
    label = graph_label(run.graph) if graph is not None else ""
    name = results_name("links", label, split=split, limit=limit, baseline=baseline)
    save_report(run, report, name)
    return report


def predict(
    run: Run,
    *,
    relation: str,
    head: str | None = None,
    tail: str | None = None,
    k: int = 5,
    free_text: bool = False,
    description: str | None = None,
    hide_known: bool = False,
    progress: Progress | None = None,
) -> Prediction:
    """Answer (head, relation, ?) or (?, relation, tail) with the k best entities of the run's graph.

    progress: is told how far the vectors of its entities are, which the first question computes.
    """
    hidden = list(run.graph.splits) if hide_known else []
    return Predictor(run.graph, run.encoder, run.verbalizer, open_index(run, progress=progress)).predict(
        relation=relation, head=head, tail=tail, k=k, free_text=free_text, description=description, hide_known=hidden
    )


def open_index(run: Run, *, progress: Progress | None = None) -> EntityIndex:
    """Return the vectors of all entities: those saved with the run where they are fresh, else new ones, then saved."""
    index = _fresh_index(run)
    if index is None:
        index = build_index(
            run.encoder, run.verbalizer, run.graph.num_entities, dtype=_vector_type(run), progress=progress
        )
        _keep_index(index, run.path / "index")
    return index


def check_data(source: str | Path, *, model: str | None = None, max_entity_tokens: int = 50) -> GraphCheck:
    """Check a graph's files and content; with a model, also how many entity texts its tokenizer would cut."""
    graph = load_graph(source)
    if model is None:
        return check_graph(graph, max_entity_tokens=max_entity_tokens)
    texts = Verbalizer(graph, load_tokenizer(model), TextSettings())
    return check_graph(graph, texts.count_entity_tokens(), max_entity_tokens=max_entity_tokens)


def fetch_data(name: str, to: str | Path | None = None) -> Path:
    """Download a named graph, check it, and return its folder."""
    return fetch_graph(name, to=None if to is None else Path(to))


def list_data() -> list[GraphEntry]:
    """Return the named graphs and where each lies."""
    return list_graphs()


def _reopen(path: Path, config: Config, graph: KnowledgeGraph) -> Run:
    """Build a run again as it began; the trainer then fills in what was saved."""
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path}: wanted a run to go on with, found none. Start it without --resume.")
    on_main(lambda: _mend(path, config))
    return reopen_run(path, config, graph)


def _mend(path: Path, config: Config) -> None:
    """Bring back what a kill left half done, and write down what has changed of the FREE settings."""
    recover_folder(path / "adapter")
    if config != read_run_config(path):
        replace_file(path / "config.yaml", lambda file: file.write_text(config.to_yaml(), encoding="utf-8"))


def _has_chosen_passes(path: Path, config: Config) -> bool:
    """Return whether a run has passes to keep: others round otherwise, so they are measured once for one budget."""
    same = (path / "config.yaml").is_file() and read_run_config(path).training.memory == config.training.memory
    return same and (path / STATE_FILE).is_file()


def _with_passes_for(budget: int, run: Run) -> Run:
    """Choose training.chunk_tokens and training.memory_tokens for a budget of bytes, and keep them with the run."""
    training, builder = run.config.training, batch_builder(run)
    with failing_together(), explained_memory(MEASURING_REMEDY, kind=TrainingError):
        footprint = measure_footprint(run.encoder, builder, run.graph.triples("train"), batch_size=training.batch_size)
        own = fit_budget(footprint, budget, device=run.encoder.device)
    fits = gather(own)  # all processes take the same
    fit = Fit(*(min(getattr(one, name) for one in fits) for name in ("memory_tokens", "chunk_tokens")))
    log.warning(
        "kalm: training.memory %s: %s are taken before the first text, then %s by token; chunks of %s tokens, gradient "
        "caching for batches of more than %s.", format_size(budget), format_size(footprint.always),
        format_size(footprint.per_token), f"{fit.chunk_tokens:,}", f"{fit.memory_tokens:,}",
    )  # fmt: skip
    run.encoder.chunk_tokens = fit.chunk_tokens
    return _keep(run, chunk_tokens=fit.chunk_tokens, memory_tokens=fit.memory_tokens)


def _keep(run: Run, **chosen: Any) -> Run:
    """Write down with a run what was chosen for it, by key of `training`; returns the run with it."""
    config = run.config.with_training(**chosen)
    on_main(
        lambda: replace_file(run.path / "config.yaml", lambda file: file.write_text(config.to_yaml(), encoding="utf-8"))
    )
    return dataclasses.replace(run, config=config)


def batch_builder(run: Run) -> BatchBuilder:
    """Return what makes the batches of a run; its mask knows the training triples only, so that nothing leaks."""
    objective = run.config.objective
    return BatchBuilder(
        run.graph,
        run.verbalizer,
        known_answers(run.graph, ["train"]),
        run.encoder.lay_out,
        explicit=objective.explicit,
        completion_share=objective.completion_share if objective.implicit else 0,
        own_texts=run.own_texts,
        own_tokens=objective.kl_tokens,
        masks_own_heads=objective.self_negatives != "among",
        adds_inverses=not run.config.training.draws_directions_apart,
    )


def triple_order(run: Run) -> TripleOrder:
    """Return which training triples each step of a run learns from."""
    training, seed = run.config.training, run.config.seed
    if training.draws_directions_apart:
        return TripleOrder(run.graph.both_directions("train"), 2 * training.batch_size, seed, training.batching)
    return TripleOrder(run.graph.triples("train"), training.batch_size, seed, training.batching)


def _maybe_compile(run: Run, trainer: Trainer) -> None:
    """Compile the layers where the settings say so or, for `auto`, where it is worth it and all processes can; keep that."""
    wanted = run.config.training.compile
    chosen = _is_worth_compiling(trainer) if wanted == "auto" else wanted
    if chosen:
        log.warning("kalm: the layers are compiled, which takes a minute or two (training.compile) ...")
        with failing_together():
            error = _compile_error(run.encoder, is_raised=wanted is True)
        if errors := list(filter(None, gather(error))):
            chosen = False
            undo_compiling(run.encoder)
            log.warning("kalm: they are left as they are, and steps take longer. %s", errors[0])
    if wanted == "auto":
        _keep(run, compile=chosen)


def _compile_error(encoder: Encoder, *, is_raised: bool) -> str | None:
    """Compile the layers; return why they cannot be, or raise it."""
    try:
        compile_layers(encoder)
    except ModelError as error:
        if is_raised:
            raise
        return str(error)
    return None


def _is_worth_compiling(trainer: Trainer) -> bool:
    """Return whether a training is long enough to gain by compiled layers, and knows of nothing that speaks against them."""
    encoder, config = trainer.encoder, trainer.config
    least = WORTH_COMPILING.get(encoder.device.type)
    if least is None or is_sharded(encoder) or config.adapter.quantize != "none" or config.training.memory is not None:
        return False
    at_once = count() * (torch.get_num_threads() / 2 if encoder.device.type == "cpu" else 1)
    weights = sum(weight.numel() for weight in encoder.model.parameters())
    return trainer.num_tokens() * weights >= least * at_once


def _trainer(run: Run, watch: Callable[[StepReport], None] | None) -> Trainer:
    config, graph = run.config, run.graph
    return Trainer(
        run.encoder,
        batch_builder(run),
        triple_order(run),
        config,
        run.path,
        save_best=lambda progress: run.save_aligned(step=progress.step, valid_mrr=progress.best_mrr),
        validate=_validation(run),
        watch=watch or (lambda report: None),
        before_steps=partial(_maybe_compile, run),
        fingerprints={
            "graph": graph.fingerprint(),
            "model": run.encoder.source_fingerprint,
            "texts": run.verbalizer.fingerprint(),
            **({"base model's own texts": run.own_texts.fingerprint()} if len(run.own_texts) else {}),
        },
    )


def _validation(run: Run) -> Callable[[], float] | None:
    """Return the measurement that chooses the best weights: filtered MRR on a fixed sample of valid."""
    if not len(run.graph.splits.get("valid", np.zeros((0, 3)))):
        return None
    training = run.config.training
    sample = sample_for_validation(
        run.graph, triples=training.validation_triples, entities=training.validation_entities, seed=run.config.seed
    )
    texts: Verbalizer = run.verbalizer.for_graph(sample)
    return lambda: validation_mrr(sample, run.encoder, texts)


def _vector_type(run: Run) -> torch.dtype:
    return torch.float16 if run.config.evaluation.vectors == "float16" else torch.float32


def _fresh_index(run: Run) -> EntityIndex | None:
    """Return the saved entity vectors where there are some (for all processes) and they belong to these weights and texts."""
    fingerprint, index = index_fingerprint(run.encoder, run.verbalizer, dtype=_vector_type(run)), None
    with contextlib.suppress(RunError):
        index = EntityIndex.load(run.path / "index", expected_fingerprint=fingerprint)
    (is_missing,) = any_of([index is None])
    return None if is_missing else index


def _keep_index(index: EntityIndex, folder: Path) -> None:
    """Save entity vectors for the next time, where that is possible: they can always be computed again."""
    try:
        on_main(lambda: index.save(folder))
    except KalmError as error:
        log.warning("kalm: the entity vectors are not kept for the next time. %s", error)


def save_report(run: Run, report: Any, name: str) -> None:
    """Let a report save itself under RUN/results; raises UnsavedReport, which holds it, where that cannot be written."""
    try:
        on_main(lambda: report.save(run.path / "results", name))
    except KalmError as error:
        raise UnsavedReport(f"measured, but not saved. {error}", report) from error


def results_name(
    kind: str,
    *settings: str,
    split: str = "test",
    limit: int | None = None,
    unit: str = "triples",
    baseline: bool = False,
) -> str:
    """Name the files of a measurement under RUN/results: its kind, then whatever is not as it mostly is."""
    parts = [kind, *settings, split if split != "test" else "", f"{limit}-{unit}" if limit else "",
             "baseline" if baseline else ""]  # fmt: skip
    return ".".join(part for part in parts if part)


def graph_label(graph: KnowledgeGraph) -> str:
    """Name a graph in the name of a file: graphs of one name in different folders have files of their own."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', graph.name)}-{graph.fingerprint()[:6]}"


def about_run(run: Run, *, baseline: bool) -> dict[str, object]:
    """Say what the figures of a run belong to: model, wording and seed."""
    return {
        "model": run.config.model,
        "aligned": not baseline,
        "template": run.verbalizer.templates.name,
        "descriptions": run.config.text.descriptions,
        "max_entity_tokens": run.config.text.max_entity_tokens,
        "seed": run.config.seed,
    }
