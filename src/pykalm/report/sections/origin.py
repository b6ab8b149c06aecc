"""Where the numbers come from: settings, fingerprints, versions, command lines."""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from pykalm.report.blocks import Block, Commands, Missing, Note, Row, Section, Table
from pykalm.report.run_files import Measured, RunFiles
from pykalm.settings import FIELDS

PACKAGES = ("pykalm", "torch", "transformers", "peft", "accelerate", "numpy", "matplotlib")
FACTS = {
    "model": "language model",
    "model_fingerprint": "its fingerprint",
    "tokenizer_fingerprint": "tokenizer's fingerprint",
    "graph": "graph",
    "graph_fingerprint": "its fingerprint",
    "step": "step of these weights",
    "valid_mrr": "their valid MRR",
    "temperature": "temperature τ",
    "pooling": "pooling",
}


def settings_section(run: RunFiles) -> Section:
    """List every setting of the run, those that differ from the default first to be seen."""
    lead = "What was chosen for this run, where it is not the default."
    rows = [Row((key, _written(value), _default(key)), _is_chosen(key, value)) for key, value in flat(run.settings)]
    if not rows:
        return Section("settings", "Settings", lead, [Note("config.yaml holds none that can be read.")])
    headings = ("setting", "value", "default")
    chosen = [Row(row.cells) for row in rows if row.is_emphasised]
    everything = Table(headings, rows, num_texts=3, summary=f"All {len(rows)} settings, bold where one was chosen")
    return Section(
        "settings", "Settings", lead, [*([Table(headings, chosen, num_texts=3)] if chosen else []), everything]
    )


def origin_section(run: RunFiles) -> Section:
    """List the fingerprints of data and model, the wordings, the versions and the command lines."""
    lead = "What is needed to get these numbers again."
    blocks: list[Block] = []
    facts = [
        Row((label, _written(run.alignment[key]))) for key, label in FACTS.items() if run.alignment.get(key) is not None
    ]
    templates = run.alignment.get("templates")
    if isinstance(templates, dict):
        facts += [Row((f"wording: {key}", _written(value))) for key, value in templates.items()]
    if facts:
        blocks.append(Table(("data and model", ""), facts, "From alignment.json, saved with the weights.", num_texts=2))
    else:
        text = "No weights are saved yet, so there is no fingerprint of what they were trained with."
        blocks.append(Missing(text, (f"kalm train --out {run.path} --resume",)))
    installed = [Row((name, found)) for name, found in _versions()]
    blocks.append(Table(("software", ""), installed, "Of the machine that wrote this page.", num_texts=2))
    blocks.append(Commands(list(_commands(run))))
    return Section("origin", "Data, versions, commands", lead, blocks)


def flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield settings by dotted key."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", content) for inner, content in value.items())
        else:
            yield str(key), value


def _default(key: str) -> str:
    field = FIELDS.get(key)
    return "" if field is None else "required" if field.is_required() else _written(_plain(field.default))


def _is_chosen(key: str, value: Any) -> bool:
    field = FIELDS.get(key)
    return field is None or field.is_required() or _plain(field.default) != value


def _plain(value: Any) -> Any:
    """Return a default as YAML would give it back."""
    return list(value) if isinstance(value, tuple) else value


def _written(value: Any) -> str:
    """Write a value as YAML would; a text stands without quotes."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return (
        str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)).removesuffix("\n").removesuffix("\n...")
    )


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield from ((package, installed_version(package)) for package in PACKAGES)


def installed_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commands(run: RunFiles) -> Iterator[str]:
    """Yield the command lines that make this run and what was measured of it."""
    yield f"kalm train --config {run.path}/config.yaml --out NEW"
    for kind in ("links", "qa", "language", "geometry", "rerank"):
        found: tuple[Measured[Any], ...] = getattr(run, kind)
        for measured in found:
            for label in measured.by_label():
                yield run.command(kind, measured.setting, baseline=label == "unaligned")
    yield f"kalm report {run.path}"
