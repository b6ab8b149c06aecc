"""The table of imports: modules import from above only, without cycles, and at the top of the file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "pykalm"

# Each layer may import itself and what stands before it. The layers follow the data (docs/method.md).
LAYERS = [
    "errors",
    "memory",
    "files",
    "launch",
    "processes",
    "settings",
    "config",
    "graph",
    "text",
    "model",
    "learn",
    "evaluate",
    "report",
    "use",
    "resolve",
    "api",
    "api_checks",
    "api_compare",
    "api_geometry",
    "api_language",
    "api_qa",
    "api_report",
    "bench",
    "terminal",
    "demo",
    "ablate",
    "cli_options",
    "cli_compare",
    "cli_measures",
    "cli_qa",
    "cli_report",
    "cli",
    "__main__",
]
# Validation comes to the training loop as a function, so measuring knows nothing of learning.
FORBIDDEN = {("evaluate", "learn")}
# Only packages of an optional extra may be imported inside a function.
OPTIONAL = {"bitsandbytes", "datasets", "lm_eval", "pykeen", "tensorboard", "wandb"}


def modules() -> dict[str, str]:
    """Return the source of every module by its dotted name; the package itself holds no code."""
    sources = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            sources[name] = file.read_text(encoding="utf-8")
    return sources


def imports(source: str) -> Iterator[tuple[str, bool, int]]:
    """Yield every imported module, whether it is imported inside a function, and its line."""
    tree = ast.parse(source)
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner, node.lineno
        elif isinstance(node, ast.ImportFrom):
            # `from pykalm.graph import known` may name a module or a value: both belong to the layer graph.
            yield "." * node.level + (node.module or ""), id(node) in inner, node.lineno


def violations(name: str, source: str) -> list[str]:
    """Name every import of a module that the table forbids."""
    layer = name.split(".")[0]
    if layer not in LAYERS:
        return [f"{name}: the layer {layer} is not in the table"]
    found = []
    for target, is_inner, line in imports(source):
        package, _, rest = target.partition(".")
        if is_inner and package not in OPTIONAL:
            found.append(f"{name}:{line}: {target} is imported inside a function")
        if target.startswith("."):
            found.append(f"{name}:{line}: {target} is relative; write pykalm.{layer}...")
        if package != "pykalm":
            continue
        other = rest.split(".")[0]
        if not other and layer.split("_")[0] != "cli":
            found.append(f"{name}:{line}: only the command line imports the package itself")
        elif other and other not in LAYERS[: LAYERS.index(layer) + 1]:
            found.append(f"{name}:{line}: {layer} comes before {other}, so it must not import it")
        elif (layer, other) in FORBIDDEN:
            found.append(f"{name}:{line}: {layer} must not import {other}")
    return found


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules that cannot be put in an order; none where there is no cycle."""
    left = {name: set(targets) for name, targets in edges.items()}
    while ready := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ready:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_from_above_only(name: str) -> None:
    assert violations(name, modules()[name]) == []


def test_there_is_no_cycle() -> None:
    sources = modules()
    edges = {
        name: {target.removeprefix("pykalm.") for target, _, _ in imports(source)} & sources.keys() - {name}
        for name, source in sources.items()
    }
    assert find_cycle(edges) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("graph.graph", "from pykalm.text import verbalize"),
        ("graph.graph", "import pykalm.cli"),
        ("evaluate.ranking", "from pykalm.learn.losses import joint"),
        ("learn.loop", "from pykalm.evaluate import ranking"),
        ("model.load", "def load():\n    import torch"),
        ("use.predict", "import pykalm"),
        ("text.trie", "from . import templates"),
        ("extra.thing", "import os"),
    ],
)
def test_the_check_sees_a_forbidden_import(name: str, line: str) -> None:
    assert violations(name, line) != []


def test_the_check_sees_a_cycle() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert find_cycle({"a": {"b"}, "b": set(), "c": {"a"}}) == []
