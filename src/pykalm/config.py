"""The settings of a run: one pydantic model per section, read from YAML, every problem reported at once."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from pykalm.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Hold what all sections share: frozen, unknown keys refused, only finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextSettings(Settings):
    """How triples are put into words."""

    template: Literal["published", "prefix-sharing"] = Field(
        "prefix-sharing",
        description="Wording of queries, candidates and completions. `prefix-sharing` lets the query and the candidate"
        " text of an entity begin with the same tokens, so that the entity is computed once (docs/method.md §6).",
    )
    descriptions: bool = Field(True, description="Whether entity texts hold the description after the name.")
    max_entity_tokens: Positive = Field(50, description="Cut of an entity text, in tokens (paper: 50).")
    max_relation_tokens: Positive = Field(32, description="Cut of a relation text, in tokens.")
    max_answer_tokens: Positive = Field(
        64, description="Cut of a completion's answer, in tokens (paper: 256 for the whole completion)."
    )


class AdapterSettings(Settings):
    """Which weights of the language model learn."""

    kind: Literal["lora", "full"] = Field("lora", description="`lora` trains low-rank adapters, `full` every weight.")
    rank: Positive = Field(16, description="Rank of the adapters (paper: 8).")
    alpha: float = Field(32, gt=0, description="Scale of the adapters; their output is multiplied by alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Share of adapter inputs dropped in training (paper: 0.05).")
    targets: Literal["auto", "mlp"] | tuple[str, ...] = Field(
        "auto",
        description="Modules that get an adapter: `auto` all linear layers of the blocks, `mlp` the feed-forward ones"
        " (paper), or a list of module names.",
    )
    quantize: Literal["none", "4bit"] = Field(
        "none", description="Precision of the frozen base weights; `4bit` needs a GPU and `pip install pykalm[quantize]`."
    )

    @model_validator(mode="after")
    def check_quantized_base_is_frozen(self) -> Self:
        """Refuse to train weights that are stored in 4 bits."""
        if self.kind == "full" and self.quantize != "none":
            raise ValueError("wanted adapter.kind lora for a 4-bit base, whose weights cannot be trained; found full")
        return self


class ObjectiveSettings(Settings):
    """What is minimised: L = L_exp + λ · L_imp (docs/method.md §2-4)."""

    explicit: bool = Field(True, description="Whether the dual-view contrastive loss is trained (docs/method.md §2).")
    implicit: bool = Field(True, description="Whether the completion loss is trained (docs/method.md §3).")
    implicit_weight: float = Field(0.01, ge=0, description="λ, the weight of the completion loss (paper: 0.01).")
    temperature: float = Field(0.05, gt=0, description="τ at the start of training (paper: 0.05).")
    learn_temperature: bool = Field(True, description="Whether log(1/τ) is trained with the model.")
    margin: float = Field(0.02, ge=0, description="γ, taken from the cosine of the true pair (paper: 0.02).")
    completion_share: float = Field(
        0.25, gt=0, le=1, description="Share of a batch's triples whose completion is trained (paper: 4 of 24)."
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
    batch_size: Positive = Field(128, description="Triples per step; both directions of each are trained.")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's highest learning rate (paper: 1e-4).")
    weight_decay: float = Field(0.001, ge=0, description="AdamW's weight decay (paper: 0.001).")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate goes on after the warm-up; the first two end at 0."
    )
    warmup_share: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the whole gradient; above it is scaled down.")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Number format of the model; losses are always fp32.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the model runs; `auto` takes a GPU where there is one."
    )
    row_tokens: Positive = Field(512, description="Tokens per packed row of a batch's trie.")
    chunk_tokens: Positive = Field(2048, description="Tokens per forward pass. Lower it when memory runs out.")
    memory_tokens: Positive = Field(
        16384,
        description="Tokens of a batch whose graph is kept in memory; larger batches take gradient caching, which"
        " computes every text twice. Lower it when memory runs out.",
    )
    evaluate_every: int = Field(0, ge=0, description="Steps between evaluations on valid; 0 is once per epoch.")
    validation_triples: Positive | None = Field(
        500, description="Valid triples that are ranked at an evaluation, drawn by seed; null takes all."
    )
    patience: Positive | None = Field(
        None, description="Stops after so many evaluations without a better valid MRR; null never does."
    )
    save_every: int = Field(0, ge=0, description="Steps between saves of the state for --resume; 0 is at each evaluation.")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Where metrics go besides metrics.jsonl; needs `pip install pykalm[tracking]`."
    )

    @model_validator(mode="after")
    def check_a_row_fits_a_chunk(self) -> Self:
        """Refuse rows that are longer than a forward pass."""
        if self.row_tokens > self.chunk_tokens:
            raise ValueError(
                f"wanted training.row_tokens at most training.chunk_tokens ({self.chunk_tokens}); found {self.row_tokens}"
            )
        return self


class EvaluationSettings(Settings):
    """How a model is measured (docs/method.md §9)."""

    split: Literal["valid", "test"] = Field("test", description="The triples that are asked.")
    chunk_queries: Positive = Field(256, description="Queries ranked at once; memory grows with this times the entities.")


class Config(Settings):
    """Everything that decides a run besides the files of the graph and of the model."""

    graph: str = Field(description="Name of a graph (`kalm data list`) or a folder.")
    model: str = Field("smollm2-135m", description="Language model: a known name, hub id, local folder or GGUF file.")
    seed: int = Field(0, ge=0, lt=2**32, description="Start of every random generator.")
    text: TextSettings = TextSettings()
    adapter: AdapterSettings = AdapterSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

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


@dataclass(frozen=True)
class Setting:
    """Keep one value with its dotted key and the place that it came from."""

    key: str
    value: Any
    place: str


def load_config(file: Path | None = None, overrides: Sequence[str] = (), **defaults: Any) -> Config:
    """Build the settings from defaults, then the file, then `key=value` overrides; later ones win.

    Keys of overrides are dotted (`training.epochs=3`) and their values YAML; a default of a section is a mapping.
    Raises ConfigError with all problems at once.
    """
    problems: list[str] = []
    settings = list(flatten(defaults, place="argument"))
    settings += read_settings(file, problems) if file is not None else []
    settings += parse_overrides(overrides, problems)
    latest = {setting.key: setting for setting in settings}
    try:
        config = Config.model_validate(nest(latest.values()))
    except ValidationError as error:
        problems += explain(error, latest)
    if problems:
        count = "A problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"{count} in the settings (all settings: docs/configuration.md):", *problems]))
    return config


def flatten(values: Mapping[str, Any], *, place: str) -> Iterator[Setting]:
    """Turn nested values into settings with dotted keys."""
    for key, value in values.items():
        if key in SECTIONS and isinstance(value, Settings):
            value = value.model_dump()
        if key in SECTIONS and isinstance(value, Mapping):
            yield from (Setting(f"{key}.{inner}", content, place) for inner, content in value.items())
        elif not (key in SECTIONS and value is None):
            yield Setting(str(key), value, place)


def nest(settings: Iterable[Setting]) -> dict[str, Any]:
    """Turn settings with dotted keys into nested values; a section that is no mapping is kept, to be refused."""
    values: dict[str, Any] = {}
    for setting in settings:
        section, dot, key = setting.key.partition(".")
        if dot and section in SECTIONS and isinstance(values.setdefault(section, {}), dict):
            values[section][key] = setting.value
        elif not dot or section not in SECTIONS:
            values[setting.key] = setting.value
    return values


def read_settings(file: Path, problems: list[str]) -> list[Setting]:
    """Read a YAML file into settings that know their line; what is wrong goes to `problems`."""
    try:
        tree = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{file}: wanted a YAML file in UTF-8, found: {error}.")
        return []
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problems.append(f"{file}{line}: this is not YAML: {getattr(error, 'problem', None) or error}.")
        return []
    if tree is None:
        return []
    if not isinstance(tree, yaml.MappingNode):
        problems.append(f"{file}: wanted `key: value` lines, found a {tree.id}.")
        return []
    settings: dict[str, Setting] = {}
    for setting in walk(tree, file):
        if setting.key in settings:
            problems.append(f"{setting.place}: {setting.key} is set twice, first at {settings[setting.key].place}.")
        settings[setting.key] = setting
    return list(settings.values())


def walk(node: yaml.MappingNode, file: Path, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a YAML mapping with their lines; sections are entered."""
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if key in SECTIONS and isinstance(value_node, yaml.MappingNode):
            yield from walk(value_node, file, f"{key}.")
        else:
            value = yaml.constructor.SafeConstructor().construct_document(value_node)
            if not (key in SECTIONS and value is None):
                yield Setting(key, value, f"{file}:{key_node.start_mark.line + 1}")


def parse_overrides(overrides: Sequence[str], problems: list[str]) -> list[Setting]:
    """Read `key=value` texts; what is wrong goes to `problems`."""
    settings: list[Setting] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append(f"--set {text}: wanted key=value, as in training.epochs=3.")
            continue
        try:
            settings += flatten({key.strip(): yaml.safe_load(value)}, place=f"--set {text}")
        except yaml.YAMLError:
            problems.append(f"--set {text}: the value is not YAML. Quote it if it is a text with special characters.")
    return settings


def explain(error: ValidationError, settings: Mapping[str, Setting]) -> list[str]:
    """Say of every refused value where it stands, what was wanted and what was found."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"]]
        key = ".".join(path[: 2 if path[0] in SECTIONS else 1])
        place = f"{settings[key].place}: " if key in settings else ""
        if problem["type"] == "extra_forbidden":
            lines[key] = f"{place}{key} is not a setting.{suggest(key)}"
        elif problem["type"] == "missing":
            lines[key] = f"{key}: wanted {describe(FIELDS[key])}, found nothing. {FIELDS[key].description}"
        elif problem["type"] == "value_error":
            lines[key] = f"{problem['msg'].removeprefix('Value error, ')}."
        elif key in FIELDS:
            lines[key] = f"{place}{key}: wanted {describe(FIELDS[key])}, found {settings[key].value!r}."
        else:
            lines[key] = f"{place}{key} is a section: wanted `key: value` lines below it, found {settings[key].value!r}."
    return list(lines.values())


def suggest(key: str) -> str:
    """Name the setting that an unknown key most likely stands for, or say nothing."""
    leaf = key.rpartition(".")[2]
    by_leaf = {known.rpartition(".")[2]: known for known in FIELDS}
    near = difflib.get_close_matches(leaf, by_leaf, n=1) or difflib.get_close_matches(key, FIELDS, n=1)
    return f" Did you mean {by_leaf.get(near[0], near[0])}?" if near else ""


def describe(field: FieldInfo) -> str:
    """Say which values a setting takes, bounds included."""
    return describe_type(field.annotation, field.metadata)


def describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say which values a type takes; `metadata` holds its bounds."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return describe_type(arguments[0], [bound for extra in arguments[1:] for bound in extra.metadata])
    if get_origin(annotation) is Literal:
        return " or ".join(arguments)
    if get_origin(annotation) is tuple:
        return f"a list of {describe_type(arguments[0])}"
    if arguments:
        return " or ".join(describe_type(argument) for argument in arguments)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {getattr(bound, name)}" for bound in metadata for name, sign in signs.items() if hasattr(bound, name)]
    return " ".join([TYPE_NAMES[annotation], " and ".join(bounds)]).strip()


TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}


def configuration_page() -> str:
    """Write docs/configuration.md: a table per section with key, values, default and meaning."""
    intro = PAGE_INTRODUCTION
    parts = [intro, *table_of("", Config)]
    for section in SECTIONS:
        parts += table_of(section, Config.model_fields[section].annotation)
    return "\n".join(parts)


def table_of(section: str, model: Any) -> list[str]:
    """Write the lines of one section's table."""
    title = f"## `{section}`\n\n{model.__doc__}\n" if section else "## Top level\n"
    lines = [title, "| key | values | default | meaning |", "|---|---|---|---|"]
    for key, field in FIELDS.items():
        if key.rpartition(".")[0] == section:
            default = "*required*" if field.is_required() else f"`{json.dumps(field.default)}`"
            lines.append(f"| `{key}` | {describe(field)} | {default} | {field.description} |")
    return [*lines, ""]


PAGE_INTRODUCTION = """# Configuration

This page is generated from the models in `src/pykalm/config.py` by `make docs`; a test holds the two together.

Settings come from three places, later ones win: the defaults below, a YAML file (`kalm train --config FILE`), and
`--set key=value` with a dotted key and a YAML value, as in `--set training.epochs=3 --set "adapter.targets=[q_proj, v_proj]"`.
A file holds the sections as nested keys:

```yaml
graph: world
training:
  epochs: 3
  learning_rate: 1e-3
```

Unknown keys and values out of bounds are refused, all in one message. Every run folder keeps the resolved settings in
`config.yaml`, which is itself a valid `--config` file. "Paper" stands for the published settings (docs/method.md).
"""
