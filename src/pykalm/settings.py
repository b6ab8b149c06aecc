"""The settings of a run: one frozen pydantic model per section, with bounds and meanings."""

import math
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from pykalm.memory import parse_size

Positive = Annotated[int, Field(ge=1)]
Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1)]

RATES, RATED_STEP, LARGEST_FACTOR = {"lora": 2e-3, "full": 1e-4}, 64, 2.0
"""The learning rates by `adapter.kind` of steps of so many triples, and how many times as much larger steps take at most."""
SMALL_STEP = 16
"""Triples of a step up to which its two directions are drawn apart (docs/results.md, "Is what is learned as good?")."""


def automatic_rate(kind: Literal["lora", "full"], batch_size: int) -> float:
    """Return what `training.learning_rate=auto` means: by the square root of the triples of a step, as AdamW wants it.

    docs/results.md, "Is what is learned as good?", has what was measured.
    """
    return float(f"{RATES[kind] * min(LARGEST_FACTOR, math.sqrt(batch_size / RATED_STEP)):.2g}")


class Settings(BaseModel):
    """Hold what all sections share: frozen, unknown keys refused, only finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def check_a_number_is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is wanted: pydantic would take them as 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("truth_value", "wanted no truth value")
        return value


class TextSettings(Settings):
    """How triples are put into words."""

    template: Literal["published", "prefix-sharing"] = Field(
        "prefix-sharing",
        description="Wording of queries, candidates and completions. `prefix-sharing` lets the query and the"
        " candidate text of an entity begin with the same tokens, so that the entity is computed once"
        " (docs/method.md §6).",
    )
    descriptions: bool = Field(True, description="Whether entity texts hold the description after the name.")
    max_entity_tokens: Positive = Field(50, description="Cut of an entity text, in tokens (paper: 50).")
    max_relation_tokens: Positive = Field(32, description="Cut of a relation text, in tokens.")
    max_answer_tokens: Positive = Field(
        64, description="Cut of a completion's answer, in tokens (paper: 256 for the whole completion)."
    )
    pooling: Literal["last", "mean"] = Field(
        "last",
        description="Which states make the vector of a text: that of its last token (paper), or the mean over all its tokens.",
    )


class AdapterSettings(Settings):
    """Which weights of the language model learn."""

    kind: Literal["lora", "full"] = Field("lora", description="`lora` trains low-rank adapters, `full` every weight.")
    rank: Positive = Field(16, description="Rank of the adapters (paper: 8).")
    alpha: float = Field(32, gt=0, description="Scale of the adapters; their output is multiplied by alpha / rank.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of adapter inputs dropped in training (paper: 0.05).",
    )
    targets: Literal["auto", "mlp"] | tuple[str, ...] = Field(
        "auto",
        description="Modules that get an adapter: `auto` all linear layers of the blocks, `mlp` those of the"
        " feed-forward part (paper), or a list of module names.",
    )
    quantize: Literal["none", "4bit"] = Field(
        "none",
        description="Precision of the frozen base weights; `4bit` needs a GPU and `pip install -e '.[quantize]'`.",
    )

    @model_validator(mode="after")
    def check_quantized_base_is_frozen(self) -> Self:
        """Refuse to train weights that are stored in 4 bits."""
        if self.kind == "full" and self.quantize != "none":
            raise ValueError("wanted adapter.kind lora for a 4-bit base, whose weights cannot be trained; found full")
        return self


class ObjectiveSettings(Settings):
    """What is minimised: L = L_exp + λ · L_imp + β · L_kl (docs/method.md §2-4)."""

    explicit: bool = Field(True, description="Whether the dual-view contrastive loss is trained (docs/method.md §2).")
    implicit: bool = Field(True, description="Whether the completion loss is trained (docs/method.md §3).")
    implicit_weight: float = Field(0.01, ge=0, description="λ, the weight of the completion loss (paper: 0.01).")
    temperature: float = Field(0.05, gt=0, description="τ at the start of training (paper: 0.05).")
    learn_temperature: bool = Field(True, description="Whether log(1/τ) is trained with the model.")
    margin: float = Field(0.02, ge=0, description="γ, taken from the cosine of the true pair (paper: 0.02).")
    completion_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Share of a batch's triples whose completion is trained, in one direction each (paper: 4 of 24).",
    )
    kl_weight: float = Field(
        1.0,
        ge=0,
        description="β, the weight of KL(base ‖ aligned) on texts that the base model writes itself before training: it keeps"
        " the model's language (docs/method.md §4). 0 leaves it out (paper).",
    )
    kl_tokens: int = Field(
        128,
        ge=1,
        le=8192,
        description="Tokens of the base model's own texts in every step, in whole texts of 64, where β is above 0.",
    )
    self_negatives: Literal["capped", "among", "none"] = Field(
        "capped",
        description="What a query's own head, with whose text it begins, is to it: a negative that weighs no more than the"
        " hardest other one (`capped`), one among all (`among`), or none (`none`; docs/method.md §2).",
    )
    views: Literal["both", "query", "candidate"] = Field(
        "both",
        description="Which views L_exp is the mean of: `query` finds the answer of a query, `candidate` the query of an"
        " answer (paper: both).",
    )

    @model_validator(mode="after")
    def check_something_is_trained(self) -> Self:
        """Refuse an objective without any loss."""
        if not (self.explicit or self.implicit):
            raise ValueError("wanted at least one of objective.explicit and objective.implicit true; found both false")
        return self


class TrainingSettings(Settings):
    """How long, how fast and on what the model learns."""

    epochs: float = Field(10, gt=0, description="Passes over the training triples; a fraction is allowed (paper: 20).")
    max_steps: Positive | None = Field(None, description="Ends training after so many optimiser steps, if sooner.")
    batch_size: Positive = Field(
        128,
        description="Triples per step, each learned in both directions, or twice as many directed ones (directions).",
    )
    directions: Literal["auto", "together", "apart"] = Field(
        "auto",
        description="Whether the two directions of a triple share a step, and so their texts (`together`), or each is drawn for"
        " itself, as in the paper (`apart`; random batching only): small steps learn more from that, and cost up to twice as"
        f" much where texts are long. `auto` takes them apart in random steps of up to {SMALL_STEP} triples; what it chose is"
        " kept with the run.",
    )
    batching: Literal["random", "neighbourhood"] = Field(
        "random",
        description="Which triples share a step: drawn at random, or connected pieces of the graph, whose texts share more"
        " (less to compute) and whose entities are harder negatives.",
    )
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="AdamW's highest learning rate (paper: 1e-4). `auto` goes by the square root of the triples of a step: for"
        f" adapters {RATES['lora']} in steps of {RATED_STEP}, {automatic_rate('lora', 128)} in those of 128, at most"
        f" {LARGEST_FACTOR * RATES['lora']}; for all weights a twentieth of it. It was found with a model of 135 million"
        " weights: larger ones may want less. config.yaml keeps the number.",
    )
    weight_decay: float = Field(0.001, ge=0, description="AdamW's weight decay (paper: 0.001).")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate goes on after the warm-up; the first two end at 0."
    )
    warmup_share: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0."
    )
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the whole gradient; above it is scaled down.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Number format of the model; losses are always fp32."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the model runs; `auto` takes a GPU where there is one."
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="How attention in a token trie is computed, same result: `auto` takes the fastest way that is exact"
        " (FlexAttention on CUDA, matrix products on a CPU), `flex` is FlexAttention (CUDA only, else this is said), `sdpa`"
        " what the model itself has.",
    )
    row_tokens: Positive | None = Field(
        None,
        description="Tokens per packed row of a batch's trie, and at least its longest text; null takes 64 on a CPU, 1024"
        " on a GPU, and more where the graph has long queries. Attention costs less in short rows; in long ones"
        " fewer prefixes are cut.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Whether torch.compile fuses the work of each layer, which takes a minute or two, less the next time. A"
        " step takes three quarters of the time on a CPU, which needs a C++ compiler for it, and some two fifths on a GPU."
        " `auto` does where the training is long enough to gain by it, training.memory is null and the machine can; what it"
        " chose is kept with the run.",
    )
    chunk_tokens: Positive | None = Field(
        None,
        description="Tokens per forward pass; null takes 1536 on a CPU, where each thread computes a pass of its own, 16384 on"
        " a GPU. Lower it when memory runs out.",
    )
    memory_tokens: Positive = Field(
        12288,
        description="Tokens whose graph is kept in memory at the same time (12288 are about 9 GB for a model of 135M"
        " parameters); larger batches take gradient caching, which computes every text twice. Lower it when memory runs out.",
    )
    memory: Size | None = Field(
        None,
        description="Memory that training may take, such as 8GB or 900MB (on a GPU, of the GPU): what a token takes is"
        " measured at the start, and chunk_tokens and memory_tokens are chosen from it, whatever they were set to. The"
        " choice is kept with the run. null takes the two as they are set.",
    )
    evaluate_every: int = Field(0, ge=0, description="Steps between evaluations on valid; 0 is once per epoch.")
    validation_triples: Positive | None = Field(
        500, description="Valid triples that are ranked at an evaluation, drawn by seed; null takes all."
    )
    validation_entities: Positive | None = Field(
        2048,
        description="Candidates of an evaluation on valid, drawn by seed beside the entities that its triples hold, so"
        " that it stays cheap on a large graph; null takes all entities.",
    )
    patience: Positive | None = Field(
        None, description="Stops after so many evaluations without a better valid MRR; null never does."
    )
    save_every: int = Field(
        0, ge=0, description="Steps between saves of the state for --resume; 0 is at each evaluation."
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Where metrics go besides metrics.jsonl; needs `pip install -e '.[tracking]'`."
    )

    @property
    def draws_directions_apart(self) -> bool:
        """Return whether a step holds directed triples drawn each for itself, by `directions`."""
        is_small = self.batching == "random" and self.batch_size <= SMALL_STEP
        return self.directions == "apart" or (self.directions == "auto" and is_small)

    @model_validator(mode="after")
    def check_neighbours_stay_together(self) -> Self:
        """Refuse neighbourhoods of directed triples: they grow by triples."""
        if self.directions == "apart" and self.batching == "neighbourhood":
            raise ValueError(
                "wanted training.batching=random where training.directions is apart; found neighbourhood. Take random batches,"
                " or leave the directions at auto: neighbourhoods hold both"
            )
        return self

    @model_validator(mode="after")
    def check_a_row_fits_a_chunk(self) -> Self:
        """Refuse rows that are longer than a forward pass."""
        row, chunk = self.row_tokens, self.chunk_tokens
        if self.memory is None and row is not None and chunk is not None and row > chunk:
            raise ValueError(f"wanted training.row_tokens at most training.chunk_tokens ({chunk}); found {row}")
        return self


class EvaluationSettings(Settings):
    """How a model is measured (docs/method.md §9)."""

    split: Literal["valid", "test"] = Field("test", description="The triples that are asked where no split is named.")
    chunk_queries: Positive = Field(
        256,
        description="Different questions ranked at once, each against 1024 entities at a time; raise it on a GPU.",
    )
    vectors: Literal["float32", "float16"] = Field(
        "float32",
        description="Number format in which the vectors of entities are kept; scores are float32 either way.",
    )


class Config(Settings):
    """Everything that decides a run besides the files of the graph and of the model."""

    graph: str = Field(
        description="Name of a graph (`kalm data list`) or a folder, which a run keeps as an absolute path."
    )
    model: str = Field("smollm2-135m", description="Language model: a known name, hub id, local folder or GGUF file.")
    seed: int = Field(0, ge=0, lt=2**32, description="Start of every random generator.")
    text: TextSettings = TextSettings()
    adapter: AdapterSettings = AdapterSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def highest_rate(self) -> float:
        """Return the highest learning rate, `training.learning_rate` or what `auto` means for what is trained."""
        rate = self.training.learning_rate
        return automatic_rate(self.adapter.kind, self.training.batch_size) if rate == "auto" else rate

    def settled(self) -> Self:
        """Return the same settings with `training.directions` and the learning rate as what `auto` means for them."""
        directions = "apart" if self.training.draws_directions_apart else "together"
        return self.with_training(directions=directions, learning_rate=self.highest_rate)

    def with_training(self, **values: Any) -> Self:
        """Return the same settings with other values in `training`, which are taken as they are."""
        return self.model_copy(update={"training": self.training.model_copy(update=values)})

    def to_yaml(self) -> str:
        """Write every setting, defaults included, in the order of this file."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def list_fields() -> dict[str, FieldInfo]:
    """Return every setting by its dotted key, in the order of the models."""
    fields: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Settings):
            fields |= {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
        else:
            fields[name] = field
    return fields


FIELDS = list_fields()
SECTIONS = tuple(dict.fromkeys(key.split(".")[0] for key in FIELDS if "." in key))
