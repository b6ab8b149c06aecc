"""Reading settings: defaults, a YAML file and overrides become one Config, every problem reported at once."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pykalm.errors import ConfigError
from pykalm.settings import (
    FIELDS,
    SECTIONS,
    AdapterSettings,
    Config,
    EvaluationSettings,
    ObjectiveSettings,
    Settings,
    Size,
    TextSettings,
    TrainingSettings,
)

__all__ = [
    "AdapterSettings",
    "Config",
    "EvaluationSettings",
    "ObjectiveSettings",
    "TextSettings",
    "TrainingSettings",
    "configuration_page",
    "load_config",
    "load_kept_config",
]


@dataclass(frozen=True)
class Setting:
    """Keep one value with its dotted key and the place that it came from."""

    key: str
    value: Any
    place: str


def load_config(file: Path | None = None, overrides: Sequence[str] = (), **defaults: Any) -> Config:
    """Build the settings from defaults, then the file, then `key=value` overrides; later ones win.

    Keys of overrides are dotted (`training.epochs=3`) and their values YAML; a default of a section is a
    mapping. Raises ConfigError with all problems at once.
    """
    problems: list[str] = []
    return _build(read_settings(file, problems) if file is not None else [], overrides, defaults, problems)


BEFORE = {
    "objective": {"kl_weight": 0.0, "self_negatives": "among"},
    "training": {"directions": "together", "learning_rate": 1e-3},
}
"""What a run whose settings do not name it was trained with."""
RETIRED = {"objective.self_negative_weight"}
"""Settings of earlier versions of which nothing depends any more."""


def load_kept_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """Build the settings that a run keeps, perhaps one of an earlier version; as `load_config`."""
    problems: list[str] = []
    kept = [setting for setting in read_settings(file, problems) if setting.key not in RETIRED]
    return _build(kept, overrides, BEFORE, problems)


def _build(read: list[Setting], overrides: Sequence[str], defaults: Mapping[str, Any], problems: list[str]) -> Config:
    """Build the settings from defaults, what was read from a file, and overrides. Raises ConfigError with all problems."""
    settings = [*flatten(defaults, place="argument"), *read, *parse_overrides(overrides, problems)]
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
    """Turn settings with dotted keys into nested values; a section that is no mapping stays as it is."""
    values: dict[str, Any] = {}
    for setting in settings:
        section, dot, key = setting.key.partition(".")
        if dot and section in SECTIONS and isinstance(values.setdefault(section, {}), dict):
            values[section][key] = setting.value
        elif not dot or section not in SECTIONS:
            values[setting.key] = setting.value
    return values


def read_settings(file: Path, problems: list[str]) -> list[Setting]:
    """Read a YAML file into settings that know their line; a key that is set twice goes to `problems`.

    Raises ConfigError where the file cannot be read, since then nothing can be said about its settings.
    """
    try:
        tree = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if tree is not None and not isinstance(tree, yaml.MappingNode):
            kind = type(tree).__name__.removesuffix("Node").lower()
            raise ConfigError(f"{file}: wanted `key: value` lines, found a {kind}. See docs/configuration.md.")
        settings = list(walk(tree, file)) if tree is not None else []
    except FileNotFoundError as error:
        raise ConfigError(
            f"{file}: wanted a YAML file with settings, found none there. See docs/configuration.md."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: wanted a YAML file in UTF-8, found: {getattr(error, 'strerror', None) or error}."
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line}: wanted YAML, found: {error.problem}. Mend the line.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: wanted YAML, found: {error}.") from error
    first: dict[str, str] = {}
    for setting in settings:
        if first.setdefault(setting.key, setting.place) != setting.place:
            problems.append(f"{setting.place}: {setting.key} is set twice, first at {first[setting.key]}. Keep one.")
    return settings


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
            wanted = f"{describe(FIELDS[key])}, found nothing. {FIELDS[key].description}"
            lines[key] = f"{key}: wanted {wanted} Give one: --{key}, or {key} in the settings."
        elif problem["type"] == "value_error" and key not in FIELDS:
            lines[key] = f"{problem['msg'].removeprefix('Value error, ')}."
        elif key in FIELDS:
            lines[key] = f"{place}{key}: wanted {describe(FIELDS[key])}, found {as_written(settings[key].value)}."
        else:
            found = as_written(settings[key].value)
            lines[key] = f"{place}{key} is a section: wanted `key: value` lines below it, found {found}."
    return list(lines.values())


def as_written(value: Any) -> str:
    """Write a value as one writes it in a settings file where Python has another word for it: null, true, false."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_written, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


OTHER_NAMES = {
    "lr": "training.learning_rate",
    "gradient_accumulation_steps": "training.memory_tokens",
    "steps": "training.max_steps",
    "r": "adapter.rank",
    "beta": "objective.kl_weight",
    "gamma": "objective.margin",
    "lambda": "objective.implicit_weight",
    "tau": "objective.temperature",
}
"""What others, and the paper, call a setting."""


def suggest(key: str) -> str:
    """Name the setting that an unknown key most likely stands for, or say nothing."""
    leaf = key.rpartition(".")[2]
    by_leaf = {known.rpartition(".")[2]: known for known in FIELDS}
    if leaf in OTHER_NAMES:
        return f" Did you mean {OTHER_NAMES[leaf]}?"
    near = difflib.get_close_matches(leaf, by_leaf, n=1) or difflib.get_close_matches(key, FIELDS, n=1)
    return f" Did you mean {by_leaf.get(near[0], near[0])}?" if near else ""


def describe(field: FieldInfo) -> str:
    """Say which values a setting takes, bounds included."""
    return describe_type(field.annotation, field.metadata)


def describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say which values a type takes; `metadata` holds its bounds."""
    arguments = get_args(annotation)
    if annotation == Size:
        return "a size such as 8GB, 900MB or a number of bytes"
    if get_origin(annotation) is Annotated:
        return describe_type(arguments[0], [bound for extra in arguments[1:] for bound in extra.metadata])
    if get_origin(annotation) is Literal:
        return " or ".join(arguments)
    if get_origin(annotation) is tuple:
        return f"a list of {describe_type(arguments[0]).removeprefix('a ')}"
    if arguments:
        return " or ".join(describe_type(argument) for argument in arguments)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name)}" for bound in metadata for name, sign in signs.items() if hasattr(bound, name)
    ]
    return " ".join([TYPE_NAMES[annotation], " and ".join(bounds)]).strip()


TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}


def configuration_page() -> str:
    """Write docs/configuration.md: a table per section with key, values, default and meaning."""
    parts = [PAGE_INTRODUCTION, *table_of("", Config)]
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

This page is generated from the models in `src/pykalm/settings.py` by `make docs`; a test holds the two
together.

Settings come from three places, later ones win: the defaults below, a YAML file (`kalm train --config FILE`),
and `--set key=value` with a dotted key and a YAML value, as in
`--set training.epochs=3 --set "adapter.targets=[q_proj, v_proj]"`. A file holds the sections as nested keys:

```yaml
graph: world
training:
  epochs: 3
  batch_size: 64
```

Unknown keys and values out of bounds are refused, all in one message. Every run folder keeps the resolved
settings in `config.yaml`, which is itself a valid `--config` file. "Paper" stands for the published settings
(docs/method.md §5).
"""
