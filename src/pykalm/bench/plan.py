"""What a bench measures and how thoroughly, and the model that all its systems share."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from pykalm.config import AdapterSettings, Config, ObjectiveSettings, TextSettings, TrainingSettings
from pykalm.errors import UsageError
from pykalm.graph.catalogue import load_graph
from pykalm.graph.graph import KnowledgeGraph
from pykalm.model.adapters import add_adapter
from pykalm.model.attention import FLEX
from pykalm.model.dropout import Dropout
from pykalm.model.encoder import Encoder
from pykalm.model.load import LanguageModel, resolve_device
from pykalm.model.lora import LoraLinear
from pykalm.model.norms import OneStep
from pykalm.model.packed_weights import PackedLinear
from pykalm.model.run import Run, build_run, load_base
from pykalm.text.verbalize import Verbalizer

MEASUREMENTS = ("train", "utilisation", "embed", "rank", "scaling")
BATCHINGS = ("random", "neighbourhood")

# METHOD.md §5, for both sides: the adapters, their dropout, the weights of the losses.
ADAPTER = AdapterSettings(rank=8, alpha=16, dropout=0.05, targets="mlp")

# As many completions for an example as published: 4 of 24 directed triples are 4 for 12 triples in both directions.
OBJECTIVE = ObjectiveSettings(completion_share=1 / 3, kl_weight=0)

SEPARATE_CHUNK_TOKENS = 512
"""Tokens of a group of separate rows: in small groups rows are of like length, and little is padding."""

SEPARATE_BATCH_SHARE = 4
"""Separate passes take batches this many times smaller, which fit the same memory; a triple costs them the same there."""

NEIGHBOURHOOD_BATCH_FACTOR = 2
"""Neighbourhood batches are this many times larger than random ones, and still take less memory: their texts share more."""


@dataclass(frozen=True)
class Plan:
    """Hold what is measured, on what, and how often.

    batch_size: triples of a random kalm step, 0 for one that suits the device, neighbourhood steps take more; repeats:
    rounds that count, after one that does not; entities: how many are embedded, 0 for all; loop_queries: queries of the
    published ranking loop, which is timed on a sample.
    """

    model: str = "smollm2-135m"
    graphs: tuple[str, ...] = ("wn18rr", "codex-s", "fb15k-237")
    only: tuple[str, ...] = MEASUREMENTS
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    repeats: int = 5
    batch_size: int = 0
    entities: int = 512
    loop_queries: int = 50
    quick: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be measured; raises UsageError."""
        if unknown := sorted(set(self.only) - set(MEASUREMENTS)):
            raise UsageError(f"wanted measurements among {', '.join(MEASUREMENTS)}, found {', '.join(unknown)}.")
        if not self.graphs:
            raise UsageError("wanted at least one graph, found none. Name some: --graphs wn18rr,codex-s")
        for names in (self.only, self.graphs):
            if len(set(names)) < len(names):
                raise UsageError(f"wanted every name once, found {', '.join(names)}. Leave out what is there twice.")


QUICK = Plan(graphs=("world",), repeats=1, batch_size=16, entities=64, loop_queries=5, quick=True)
"""For CI: the bundled graph, small batches, one round after the first. Its figures show that it works, not how fast it is."""


@dataclass(frozen=True, eq=False)
class Workshop:
    """Hold the one adapted model that every system takes, and open graphs with it.

    own_attention: how the model computes attention by itself, before kalm chooses another way.
    """

    plan: Plan
    language_model: LanguageModel
    adapted: torch.nn.Module
    own_attention: str

    @staticmethod
    def open(plan: Plan) -> "Workshop":
        """Load the model and give it the published adapters."""
        language_model = load_base(_config(plan, plan.graphs[0], 1))
        adapted = add_adapter(
            language_model.model, kind=ADAPTER.kind, rank=ADAPTER.rank, alpha=ADAPTER.alpha, dropout=ADAPTER.dropout,
            targets="mlp", seed=plan.seed,
        )  # fmt: skip
        return Workshop(plan, language_model, adapted, str(language_model.model.config._attn_implementation))

    @property
    def device(self) -> torch.device:
        """Return where everything is computed."""
        return resolve_device(self.plan.device)

    @property
    def width(self) -> int:
        """Return D of the model's vectors."""
        return int(self.language_model.model.get_output_embeddings().weight.shape[-1])  # type: ignore[no-untyped-call]

    @property
    def batch_size(self) -> int:
        """Return the triples of a random kalm step: the default of `kalm train`, more on a GPU."""
        return self.plan.batch_size or (1024 if self.device.type == "cuda" else 128)

    def graph(self, name: str) -> KnowledgeGraph:
        """Load a graph, once."""
        if name not in self._graphs:
            self._graphs[name] = load_graph(name)
        return self._graphs[name]

    @cached_property
    def _graphs(self) -> dict[str, KnowledgeGraph]:
        return {}

    def run(self, graph: str) -> Run:
        """Return what `kalm train` would train in its large steps, with the shared model; nothing is written."""
        # Another run may have left its choice there; the start check compares with what the model itself does.
        self.language_model.model.set_attn_implementation(self.own_attention)
        config = _config(self.plan, graph, self.batch_size)
        return build_run(
            Path("bench"), config, self.graph(graph), self.language_model, temperature=config.objective.temperature,
            model=self.adapted,
        )  # fmt: skip

    def config_summary(self) -> dict[str, object]:
        """Return the settings of the runs that are measured, but for the graph and the batching."""
        config = _config(self.plan, self.plan.graphs[0], self.batch_size).model_dump(mode="json")
        return {section: config[section] for section in ("text", "adapter", "objective", "training")}

    def published_words(self, graph: str) -> Verbalizer:
        """Return the published wording of a graph, cut as published."""
        settings = TextSettings(template="published")
        return Verbalizer(self.graph(graph), self.language_model.tokenizer, settings)


def _config(plan: Plan, graph: str, batch_size: int) -> Config:
    # Together, as in large steps: what is measured must not depend on how small a trial run's steps are.
    training = TrainingSettings.model_validate(
        {"batch_size": batch_size, "directions": "together", "device": plan.device}
    )
    return Config(
        graph=graph, model=plan.model, seed=plan.seed, adapter=ADAPTER, objective=OBJECTIVE, training=training
    )


@contextmanager
def passes(encoder: Encoder, *, packed: bool) -> Iterator[None]:
    """Let an encoder share prefixes, or read every text in a row of its own with next to no padding, for a while.

    Separate rows are of many lengths and are padded to the longest of their group, so their groups are small.
    """
    if packed:
        yield
        return
    kept = encoder.packed, encoder.chunk_tokens
    encoder.packed, encoder.chunk_tokens = False, min(SEPARATE_CHUNK_TOKENS, encoder.chunk_tokens)
    try:
        with attention(encoder, separate_attention(encoder)):
            yield
    finally:
        encoder.packed, encoder.chunk_tokens = kept


def separate_attention(encoder: Encoder) -> str:
    """Return the best attention for texts without a trie: what the encoder takes, but where that is FlexAttention.

    It would be given the blocks of a new mask at every pass, where SDPA needs none; kalm takes it in place of SDPA only.
    """
    return "sdpa" if encoder.attention == FLEX else encoder.attention


@contextmanager
def attention(encoder: Encoder, name: str) -> Iterator[None]:
    """Let an encoder's model compute attention in another way for a while."""
    kept = encoder.attention
    encoder.use_attention(name)
    try:
        yield
    finally:
        encoder.use_attention(kept)


@contextmanager
def adapters_of_peft(encoder: Encoder) -> Iterator[None]:
    """Let layers work for a while as transformers, PyTorch and peft make them: norms, products, dropout, inputs in float32."""
    faster = [(module, type(module)) for module in encoder.modules() if isinstance(module, PackedLinear | OneStep)]
    for module, _ in faster:
        module.give_back()
    kept = [(layer, dict(layer.lora_dropout.items())) for layer in encoder.modules() if isinstance(layer, LoraLayer)]
    for layer, dropouts in kept:
        layer.cast_input_dtype_enabled = True
        if isinstance(layer, LoraLinear):
            layer.give_back()
        for name, dropout in dropouts.items():
            if isinstance(dropout, Dropout):
                layer.lora_dropout[name] = nn.Dropout(dropout.p).train(dropout.training)
    try:
        yield
    finally:
        for layer, dropouts in kept:
            layer.cast_input_dtype_enabled = False
            layer.lora_dropout.update(dropouts)
            LoraLinear.take_over(layer)
        for module, kind in faster:
            module.__class__ = kind  # not taken over anew: trying a norm takes time, and a step here is timed


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """Return randomness that is a function of a seed and some numbers."""
    return np.random.default_rng([seed, *numbers])


def with_changes(plan: Plan, **changes: object) -> Plan:
    """Return a plan with other values where they are given, as the command line reads them."""
    return dataclasses.replace(plan, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
