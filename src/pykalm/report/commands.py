"""The command line that makes a results file, worked out from the file's name."""

import re
import shlex

# First part of a file's name -> the command that writes it.
COMMANDS = {
    "links": "evaluate links",
    "qa": "evaluate qa",
    "language": "evaluate language",
    "geometry": "evaluate geometry",
    "rerank": "evaluate rerank",
}
# Further parts -> the options that add them, and what they say; {} stands for the group of the pattern.
PARTS = (
    (r"(\d+)-(?:triples|questions|entities)", "--limit {}"),
    (r"(\d+)-shot", "--shots {}"),
    (r"ranked-(\d+)", "--ranked {}"),
    (r"(\d+)-tokens", "--max-new-tokens {}"),
    (r"(\w+)-wording", "--wording {}"),
    (r"(train|valid)", "--split {}"),
    (r"(.+)-[0-9a-f]{6}", "--graph {}"),
)
TOKENS_OF = {"language": "--limit-tokens {}"}


def command_line(run: str, kind: str, setting: tuple[str, ...] = (), *, baseline: bool = False) -> str:
    """Return what to type for the results of a kind, such as "links", in a setting such as ("valid", "100-triples")."""
    words = ["kalm", *COMMANDS[kind].split(), run]
    for part in setting:
        words += _option(kind, part)
    return shlex.join([*words, "--baseline"] if baseline else words)


def describe_setting(setting: tuple[str, ...]) -> str:
    """Say in words what sets a file apart: ("descriptions", "3-shot") is "with descriptions, 3-shot"."""
    return ", ".join(_describe(part) for part in setting)


def _option(kind: str, part: str) -> list[str]:
    """Return the option that adds a part to a file's name; an unknown part is taken for the name of an option."""
    for pattern, option in PARTS:
        if found := re.fullmatch(pattern, part):
            chosen = TOKENS_OF.get(kind, option) if pattern.endswith("-tokens") else option
            return [word.format(found[1]) for word in chosen.split()]
    return [f"--{part}"]


def _describe(part: str) -> str:
    graph, count = re.fullmatch(PARTS[-1][0], part), re.fullmatch(r"(\d+)-(triples|questions|entities|tokens)", part)
    if count:
        return f"at most {int(count[1]):,} {count[2]}"
    return {"descriptions": "with descriptions", "run-wording": "in the run's own wording"}.get(part) or (
        f"on {graph[1]}" if graph else part
    )
