"""From what a call of `train` was given to the settings of its run: new ones, or those that it began with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pykalm.config import Config, load_config
from pykalm.errors import ConfigError
from pykalm.graph.catalogue import source_folder
from pykalm.model.run import read_run_config

FREE = (
    "training.memory",
    "training.memory_tokens",
    "training.chunk_tokens",
    "training.save_every",
    "training.attention",
    "training.compile",
    "training.device",
    "training.trackers",
)
"""Settings that say how a training is computed, not what is learned: a run may go on with others."""


def resolve_settings(
    config: Config | None, given: Mapping[str, Any], resumed: Path | None, *, is_loaded: bool
) -> Config:
    """Join given values, by dotted key, with a config; with `resumed`, the folder of a run, only what is FREE may differ.

    is_loaded: the graph came as an object, so that its name stands for no place. Raises ConfigError.
    """
    overrides = [f"{key}={_as_yaml(key, value)}" for key, value in given.items()]
    if resumed is None:
        new = load_config(None, overrides, **(config.model_dump(mode="json") if config else {}))
        return new if is_loaded else _placed(new)
    saved = read_run_config(resumed)
    wanted = load_config(None, overrides, **(config or saved).model_dump(mode="json"))
    if not is_loaded and wanted.graph != saved.graph:
        wanted = _placed(wanted)
    chosen = [key for key in ("compile", "learning_rate") if getattr(wanted.training, key) == "auto"]
    if wanted.training.memory is not None and wanted.training.memory == saved.training.memory:
        chosen += ["memory_tokens", "chunk_tokens"]
    kept = {key: getattr(saved.training, key) for key in chosen}
    wanted = wanted.with_training(**kept).settled()
    before, after = _flat(saved.settled().model_dump(mode="json")), _flat(wanted.model_dump(mode="json"))
    changed = [key for key in before if before[key] != after[key] and key not in FREE]
    if changed:
        changes = [f"{key}: saved {before[key]!r}, found {after[key]!r}" for key in changed]
        raise ConfigError(
            f"{resumed}: a run goes on with the settings it began with; wanted no change, found {len(changes)}:\n  "
            + "\n  ".join(changes)
            + f"\nLeave them out, or start a new run. Only these may change: {', '.join(FREE)}."
        )
    return wanted


def _placed(config: Config) -> Config:
    """Name the folder of a graph without a name from the root, so that the run opens from any working directory."""
    folder = source_folder(config.graph)
    return config.model_copy(update={"graph": str(folder)}) if folder else config


def _as_yaml(key: str, value: Any) -> str:
    """Write a setting's value as JSON, which is YAML; raises ConfigError for what is no setting's value."""

    def plain(thing: Any) -> Any:
        if isinstance(thing, np.generic | np.ndarray):
            return thing.tolist()
        if isinstance(thing, Path):
            return str(thing.resolve())  # "world" as a Path is a folder, not a name
        wanted = "a number, a text, true or false, None or a list of these"
        raise ConfigError(f"settings: {key}: wanted {wanted}, found {type(thing).__name__} {thing!r}.")

    return json.dumps(value, default=plain)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
