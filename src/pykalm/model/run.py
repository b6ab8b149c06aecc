"""The run folder: everything that a trained model needs to be used again, on this machine or another.

RUN/
  config.yaml      the settings, resolved
  adapter/         learned weights (PEFT layout, or a whole model), and alignment.json beside them: wordings, cuts,
                   temperature, base model and graph with their fingerprints. Replaced as one, so they always agree.
  state/           what --resume needs
  own_texts.npz    what the base model wrote itself, where training is held to it (objective.kl_weight)
  metrics.jsonl    one line per step, with the valid MRR where it ended in an evaluation
  index/           entity vectors        results/   measurements        report/   figures
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pykalm.config import Config, TextSettings, load_kept_config
from pykalm.errors import ConfigError, GraphError, KalmError, ModelError, RunError, TrainingError, UsageError
from pykalm.files import READ_ATTEMPTS, replace_file, standing_folder
from pykalm.graph.catalogue import load_graph
from pykalm.graph.graph import KnowledgeGraph
from pykalm.memory import explained_memory, format_size
from pykalm.model.adapters import add_adapter, load_adapter, save_adapter
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.load import LanguageModel, load_language_model, resolve_device
from pykalm.model.norms import norms_in_one_step
from pykalm.model.own_texts import REMEDY as OWN_TEXTS_REMEDY
from pykalm.model.own_texts import OwnTexts, first_token, write_own_texts
from pykalm.model.packed_weights import pack_frozen_weights
from pykalm.model.packing import choose_passes, require_own_logits, require_room, suit_rows
from pykalm.model.resident import resident_bytes
from pykalm.model.sharding import wants_sharding
from pykalm.processes import all_threads, failing_together, gather, join, on_main
from pykalm.processes import device as process_device
from pykalm.text.templates import Templates
from pykalm.text.verbalize import Verbalizer

log = logging.getLogger(__name__)

FORMAT = 1
ALIGNMENT = {"log_inverse_temperature": float, "templates": dict, "text": dict, "model_fingerprint": str,
             "graph_fingerprint": str, "tokenizer_fingerprint": str}  # fmt: skip
"""What alignment.json must hold to be used, besides what is there for the reader."""

OWN_TEXTS = "own_texts.npz"
ROW_TOKENS = {"cpu": 64, "cuda": 1024}
"""At least, measured on a CPU (docs/log.md): short rows cost less attention, but repeat more where texts are long."""
CHUNK_TOKENS = {"cpu": 1536, "cuda": 16384}
"""On a CPU what a pass costs in Python weighs less in 1,536 tokens than in 1,024; in more, groups of rows are padded more."""

MEMORY_REMEDY = (
    "The model does not fit: take a smaller one, training.precision=bf16, adapter.quantize=4bit (on a GPU), another "
    "device, or, where it was reading texts, a lower training.chunk_tokens."
)


@dataclass(frozen=True, eq=False)
class Run:
    """Hold an encoder with the graph, the wordings and the settings that belong to it."""

    path: Path
    config: Config
    graph: KnowledgeGraph
    encoder: Encoder
    verbalizer: Verbalizer
    own_texts: OwnTexts = field(default_factory=OwnTexts.none)

    @property
    def adapter_folder(self) -> Path:
        """Return where the learned weights lie."""
        return self.path / "adapter"

    def save_aligned(self, **facts: float | int | None) -> None:
        """Put weights, temperature, wordings and fingerprints in place of those saved before, all or none."""
        alignment = {
            "format": FORMAT,
            "log_inverse_temperature": float(self.encoder.log_inverse_temperature.detach()),
            "temperature": self.encoder.temperature(),
            "pooling": self.config.text.pooling,
            "templates": self.verbalizer.templates.to_dict(),
            "text": self.config.text.model_dump(mode="json"),
            "model": self.config.model,
            "model_fingerprint": self.encoder.source_fingerprint,
            "tokenizer_fingerprint": self.verbalizer.tokenizer_fingerprint(),
            "graph": self.config.graph,
            "graph_fingerprint": self.graph.fingerprint(),
            **facts,
        }
        notes = {"alignment.json": json.dumps(alignment, indent=2) + "\n"}
        save_adapter(self.encoder.model, self.adapter_folder, notes=notes)


def new_run(path: Path, config: Config, graph: KnowledgeGraph, *, progress: Progress | None = None) -> Run:
    """Start a run: base model with fresh adapters, nothing learned yet. Raises RunError where one exists already.

    progress: is told how far the base model is with its own texts, in the main process.
    """
    if on_main(lambda: (path / "config.yaml").exists()):
        raise RunError(
            f"{path}: wanted a new folder for the run, found a run. Take another --out, delete the folder, or go on "
            "with --resume."
        )
    graph.require_trainable()
    config = config.settled()
    with explained_memory(MEMORY_REMEDY):
        language_model = load_base(config)
    _require_memory(config, language_model)
    own_texts = _own_texts(config, language_model, progress)  # before there is an adapter
    with explained_memory(MEMORY_REMEDY):
        run = build_run(path, config, graph, language_model, temperature=config.objective.temperature)
        if config.objective.implicit or config.objective.kl_weight:
            require_own_logits(run.encoder, run.verbalizer)
    if len(own_texts):
        on_main(lambda: own_texts.save(path / OWN_TEXTS))
    on_main(
        lambda: replace_file(path / "config.yaml", lambda file: file.write_text(config.to_yaml(), encoding="utf-8"))
    )
    return replace(run, own_texts=own_texts)


def reopen_run(path: Path, config: Config, graph: KnowledgeGraph) -> Run:
    """Build a run again as it began; the trainer then fills in what was saved. Raises RunError where its files are missing."""
    run = build_run(path, config, graph, load_base(config), temperature=config.objective.temperature)
    if not config.objective.kl_weight:
        return run
    with failing_together():
        return replace(run, own_texts=OwnTexts.load(path / OWN_TEXTS))


def _require_memory(config: Config, base: LanguageModel) -> None:
    """Raise TrainingError where a budget is less than what is held before anything is measured, on a CPU."""
    budget, held = config.training.memory, resident_bytes()
    if budget is not None and next(base.model.parameters()).device.type == "cpu" and budget < held:
        raise TrainingError(
            f"training.memory: wanted more than the {format_size(held)} that {config.model} and the libraries take before the "
            f"first text, found {format_size(budget)}. Give more, or take a smaller model."
        )


def _own_texts(config: Config, base: LanguageModel, progress: Progress | None) -> OwnTexts:
    """Let the base model write what training is held to, if it is; the main process writes for all, who wait."""
    if not config.objective.kl_weight:
        return OwnTexts.none()
    log.warning(
        "kalm: the base model writes the texts that training is held to, which may take a minute on a CPU "
        "(objective.kl_weight=0 trains without) ..."
    )

    def write() -> OwnTexts:
        with all_threads():
            return write_own_texts(base.model, first_token(base.tokenizer), seed=config.seed, progress=progress)

    try:
        return on_main(write)
    except ModelError as error:
        raise ModelError(f"{error} {OWN_TEXTS_REMEDY}") from error


def build_run(
    path: Path,
    config: Config,
    graph: KnowledgeGraph,
    language_model: LanguageModel,
    *,
    temperature: float,
    model: torch.nn.Module | None = None,
    templates: Templates | None = None,
) -> Run:
    """Put base model, adapters (fresh, or the `model` that `load_adapter` returned), encoder and wordings together."""
    settings = config.adapter
    if model is None:
        model = add_adapter(
            language_model.model, kind=settings.kind, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
            targets=settings.targets if isinstance(settings.targets, str) else list(settings.targets), seed=config.seed,
        )  # fmt: skip
    encoder = build_encoder(model, language_model, config, temperature=temperature)
    verbalizer = Verbalizer(graph, language_model.tokenizer, config.text, templates=templates)
    if config.objective.implicit:
        verbalizer.end_token_id()
    require_room(encoder, verbalizer, completions=config.objective.implicit)
    _choose_passes(encoder, verbalizer, config)
    return Run(path, config, graph, encoder, verbalizer)


def _choose_passes(encoder: Encoder, verbalizer: Verbalizer, config: Config) -> None:
    if config.training.row_tokens is None:
        suit_rows(encoder, verbalizer)
    choose_passes(encoder, verbalizer)


def build_encoder(
    model: torch.nn.Module, language_model: LanguageModel, config: Config, *, temperature: float
) -> Encoder:
    """Wrap a model, adapted or bare, as the settings say."""
    training = config.training
    encoder = Encoder(
        model,
        source_fingerprint=language_model.fingerprint,
        temperature=temperature,
        learn_temperature=config.objective.learn_temperature,
        precision=training.precision,
        row_tokens=row_tokens(config, process_device() if wants_sharding() else next(model.parameters()).device),
        chunk_tokens=chunk_tokens(config, next(model.parameters()).device),
        attention=training.attention,
        pooling=config.text.pooling,
    )
    if wants_sharding():
        encoder.share_weights_out()
    else:
        pack_frozen_weights(encoder.causal_lm)
        norms_in_one_step(encoder.causal_lm)
    return encoder


def row_tokens(config: Config, device: torch.device) -> int:
    """Return the tokens of a packed row: those of the settings, else what suits the device, a forward pass at most."""
    suited = ROW_TOKENS.get(device.type, ROW_TOKENS["cuda"])
    return config.training.row_tokens or min(suited, chunk_tokens(config, device))


def chunk_tokens(config: Config, device: torch.device) -> int:
    """Return the tokens of a forward pass: those of the settings, else what suits the device, one row at least."""
    suited = max(CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"]), config.training.row_tokens or 0)
    return config.training.chunk_tokens or suited


def load_base(config: Config, *, device: str | None = None) -> LanguageModel:
    """Load the base model of a run, in the precision and on the device that the settings, or the caller, name."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    target = resolve_device(device or config.training.device)
    if wants_sharding():
        if config.training.compile is True or config.training.memory is not None or config.adapter.quantize != "none":
            raise UsageError(
                "--use_fsdp goes with training.compile=auto or false, training.memory=null and adapter.quantize=none only. Set "
                "them so, and training.chunk_tokens by hand."
            )
        target = torch.device("cpu")  # whole; on the GPUs there is room for the parts only
    return load_language_model(config.model, dtype=dtype, quantize=config.adapter.quantize, device=target)


def load_run(
    path: str | Path,
    *,
    device: str | None = None,
    graph: KnowledgeGraph | None = None,
    check: Callable[[Config, KnowledgeGraph], None] | None = None,
) -> Run:
    """Open a trained run. `graph` replaces the graph it was trained on; by default that one is found again by name.

    check: is called with settings and graph before the model is read, to raise what is wrong with a question.
    Raises RunError where the folder is none, is damaged or of another version, or where base model or graph changed.
    In a launch of several processes all call it alike.
    """
    path = Path(path)
    alignment = read_alignment(path)
    config = read_run_config(path)
    join(device or config.training.device)
    if config.text != TextSettings(**alignment["text"]):
        raise RunError(
            f"{path / 'config.yaml'}: wanted the text settings of the training, {alignment['text']}, found others. "
            "Restore them: a model is asked with the texts that it was trained on."
        )
    if graph is None:
        graph = _graph_of(path, config, alignment)
    if check is not None:
        check(config, graph)
    with explained_memory(MEMORY_REMEDY):
        language_model, model, alignment = _load_aligned(path, config, device)
        run = build_run(
            path, config, graph, language_model, temperature=1.0,
            model=model, templates=Templates.from_dict(alignment["templates"]),
        )  # fmt: skip
    tokenizer = f"{path}: tokenizer of {config.model!r}"
    require_same(tokenizer, alignment["tokenizer_fingerprint"], run.verbalizer.tokenizer_fingerprint())
    with torch.no_grad():
        run.encoder.log_inverse_temperature.fill_(alignment["log_inverse_temperature"])
    return run


def _load_aligned(
    path: Path, config: Config, device: str | None
) -> tuple[LanguageModel, torch.nn.Module, dict[str, Any]]:
    """Return base model, adapted model and alignment.json, both of one save: a training may replace them meanwhile.

    All processes take the same save, or look again together.
    """
    for _ in range(READ_ATTEMPTS):
        language_model = load_base(config, device=device)
        alignment = read_alignment(path)
        require_same(f"{path}: base model {config.model!r}", alignment["model_fingerprint"], language_model.fingerprint)
        model: torch.nn.Module | None = None
        try:
            model = load_adapter(language_model.model, standing_folder(path / "adapter"), trainable=True)
        except ModelError:
            if read_alignment(path) == alignment:
                raise
        stayed = model is not None and read_alignment(path) == alignment
        found = gather(alignment if stayed else None)
        if model is not None and all(other == alignment for other in found):
            return language_model, model, alignment
    raise RunError(
        f"{path}: wanted weights that stay while they are read, found that a training replaced them {READ_ATTEMPTS} times. "
        "Try again, or wait for its end."
    )


def load_baseline(run: Run, *, device: str | None = None) -> Run:
    """Return the same run with the unaligned base model: same graph, wordings and passes, nothing learned."""
    language_model = load_base(run.config, device=device or str(run.encoder.device))
    encoder = build_encoder(
        language_model.model, language_model, run.config, temperature=run.config.objective.temperature
    )
    _choose_passes(encoder, run.verbalizer, run.config)
    return Run(run.path, run.config, run.graph, encoder, run.verbalizer)


def read_run_config(path: Path) -> Config:
    """Read the settings of a run; raises RunError where the folder is not a run."""
    file = path / "config.yaml"
    if not file.is_file():
        raise RunError(
            f"{path}: wanted a run folder, found no config.yaml in it. Give a folder that `kalm train` made."
        )
    try:
        return load_kept_config(file)
    except KalmError as error:
        raise RunError(f"{file}: the settings of this run cannot be read by this version.\n{error}") from error


def read_alignment(path: Path) -> dict[str, Any]:
    """Read adapter/alignment.json; raises RunError where it is missing, damaged or of another version."""
    read_run_config(path)
    file = path / "adapter" / "alignment.json"
    text = _read_standing(file)
    if text is None:
        raise RunError(f"{path}: wanted a trained run, found no {file.name} yet. Train it on with --resume.")
    try:
        alignment: dict[str, Any] = json.loads(text)
        found = alignment["format"]
        if found != FORMAT:
            raise RunError(
                f"{file}: wanted format {FORMAT}, found {found}. Use the version of kalm that made this run."
            )
        wrong = [key for key, kind in ALIGNMENT.items() if not isinstance(alignment.get(key), kind)]
        if wrong or not math.isfinite(alignment["log_inverse_temperature"]):
            raise ValueError(f"{', '.join(wrong) or 'log_inverse_temperature'} missing or wrong")
        Templates.from_dict(alignment["templates"])
        TextSettings(**alignment["text"])
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"{file}: damaged: {error}. Restore it from a copy, or train again.") from error
    return alignment


def _read_standing(file: Path) -> bytes | None:
    """Return the content of a file in a folder that a training may be replacing, or None where there is none."""
    for _ in range(READ_ATTEMPTS):
        try:
            return (standing_folder(file.parent) / file.name).read_bytes()
        except FileNotFoundError:
            continue
    return None


def require_same(what: str, wanted: str, found: str) -> None:
    """Raise RunError where a fingerprint is not the one that the run was trained with."""
    if wanted != found:
        raise RunError(
            f"{what}: wanted fingerprint {wanted[:12]} (as trained), found {found[:12]}. Its content has changed: "
            "bring back the one that the run was trained with."
        )


def _graph_of(path: Path, config: Config, alignment: Mapping[str, Any]) -> KnowledgeGraph:
    try:
        graph = load_graph(config.graph)
    except GraphError as error:
        raise RunError(f"{path}: its graph cannot be read from {Path.cwd()}, where kalm runs now: {error}") from error
    require_same(f"{path}: graph {config.graph!r}", alignment["graph_fingerprint"], graph.fingerprint())
    return graph
