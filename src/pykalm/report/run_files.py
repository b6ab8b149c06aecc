"""Reading a run folder for its report: every file that can be read, and a line on each that cannot. No model is loaded."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import ValidationError

from pykalm.errors import RunError
from pykalm.files import standing_folder
from pykalm.report.commands import command_line
from pykalm.report.records import (
    Answer,
    GeometryResult,
    LanguageResult,
    LinksResult,
    QuestionResult,
    Record,
    RerankResult,
    Step,
)

R = TypeVar("R", bound=Record)
T = TypeVar("T")

WRITERS_REMEDY = "Restore the file from a copy; the rest of the page does not need it."


@dataclass(frozen=True)
class Measured(Generic[R]):
    """Hold the results of one kind in one setting: of the aligned model, of the unaligned one, or of both.

    setting: the middle of the file's name, such as ("valid", "100-triples"); () is the plain measurement.
    """

    setting: tuple[str, ...]
    aligned: R | None = None
    unaligned: R | None = None

    @property
    def any(self) -> R:
        """Return one of the two, the aligned where there is a choice."""
        found = self.aligned or self.unaligned
        assert found is not None
        return found

    def by_label(self) -> dict[str, R]:
        """Return what is there by the label that stands beside it, the unaligned first."""
        pairs = (("unaligned", self.unaligned), ("aligned", self.aligned))
        return {label: result for label, result in pairs if result is not None}


@dataclass(frozen=True)
class RunFiles:
    """Hold what was found in a run folder. Of each kind of results the plain measurement comes first.

    ranks and answers belong to the first of `links` and `qa`, by label; problems names every file that cannot be read.
    """

    path: Path
    settings: Mapping[str, Any]
    alignment: Mapping[str, Any]
    steps: Sequence[Step]
    links: Sequence[Measured[LinksResult]] = ()
    qa: Sequence[Measured[QuestionResult]] = ()
    language: Sequence[Measured[LanguageResult]] = ()
    geometry: Sequence[Measured[GeometryResult]] = ()
    rerank: Sequence[Measured[RerankResult]] = ()
    ranks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    answers: Mapping[str, Sequence[Answer]] = field(default_factory=dict)
    problems: Sequence[str] = ()

    def command(self, kind: str, setting: tuple[str, ...] = (), *, baseline: bool = False) -> str:
        """Return what to type for results of a kind."""
        return command_line(str(self.path), kind, setting, baseline=baseline)


def read_run_files(path: Path) -> RunFiles:
    """Read what a run folder holds for its report. Raises RunError where it is no run folder."""
    if not (path / "config.yaml").is_file():
        raise RunError(
            f"{path}: wanted a run folder, found no config.yaml in it. Give a folder that `kalm train` made."
        )
    reader = _Reader(path)
    adapter = standing_folder(path / "adapter").name
    links, qa = reader.measured("links", LinksResult), reader.measured("qa", QuestionResult)
    files = RunFiles(
        path,
        settings=reader.mapping("config.yaml"),
        alignment=reader.mapping(f"{adapter}/alignment.json"),
        steps=reader.steps(),
        links=links,
        qa=qa,
        language=reader.measured("language", LanguageResult),
        geometry=reader.measured("geometry", GeometryResult),
        rerank=reader.measured("rerank", RerankResult),
        ranks=reader.beside("links", links, reader.ranks),
        answers=reader.beside("qa", qa, reader.answers),
    )
    return replace(files, problems=tuple(reader.problems))


class _Reader:
    """Read the files of one run; what is wrong with them is kept as problems, never raised."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []

    def mapping(self, name: str) -> dict[str, Any]:
        """Read a YAML or JSON file that holds keys and values; {} where there is none or it is damaged."""
        text = self.text(name)
        if text is None:
            return {}
        try:
            found = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            self.problem(name, f"found: {_one_line(error)}", wanted="keys and values", remedy=WRITERS_REMEDY)
            return {}
        if not isinstance(found, dict):
            self.problem(name, f"found a {type(found).__name__}", wanted="keys and values", remedy=WRITERS_REMEDY)
            return {}
        return {str(key): value for key, value in found.items()}

    def measured(self, kind: str, shape: type[R]) -> tuple[Measured[R], ...]:
        """Read all results of a kind; the plain measurement comes first."""
        found: dict[tuple[str, ...], dict[str, R]] = {}
        for file in sorted((self.path / "results").glob(f"{kind}*.json")):
            first, *setting = file.name.removesuffix(".json").split(".")
            if first != kind:
                continue
            is_baseline = bool(setting) and setting[-1] == "baseline"
            key = tuple(setting[:-1] if is_baseline else setting)
            record = self.record(
                f"results/{file.name}", shape, command_line(str(self.path), kind, key, baseline=is_baseline)
            )
            if record is not None:
                found.setdefault(key, {})["unaligned" if is_baseline else "aligned"] = record
        return tuple(Measured(key, **found[key]) for key in sorted(found, key=lambda key: (len(key), key)))

    def record(self, name: str, shape: type[R], command: str) -> R | None:
        """Read a results file; None where it is damaged."""
        text = self.text(name)
        if text is None:
            return None
        try:
            return shape.model_validate(json.loads(text))
        except (ValueError, RecursionError) as error:
            self.problem(name, f"found: {_explain(error)}", wanted="results", remedy=f"Make it again: {command}")
            return None

    def steps(self) -> tuple[Step, ...]:
        """Read metrics.jsonl; a last line that a kill cut off is left out, as training does when it goes on."""
        complete, _, _ = (self.text("metrics.jsonl") or "").rpartition("\n")
        remedy = "Restore or delete the file; training does not need it."
        by_step = {step.step: step for step in self.lines("metrics.jsonl", complete, Step, remedy)}
        return tuple(by_step[number] for number in sorted(by_step))

    def answers(self, stem: str, command: str) -> list[Answer]:
        """Read the questions and what was answered; a line that is still being written is left out."""
        name = f"results/{stem}.jsonl"
        complete, _, _ = (self.text(name) or "").rpartition("\n")
        return self.lines(name, complete, Answer, f"Make it again: {command}")

    def ranks(self, stem: str, command: str) -> list[float]:
        """Read the realistic ranks of a link prediction."""
        name = f"results/{stem}.ranks.tsv"
        header, *lines = (self.text(name) or "").rstrip("\n").split("\n")
        place = name
        try:
            column = header.split("\t").index("realistic") if header else 0
            ranks = []
            for number, line in enumerate(lines, start=2):
                place = f"{name}:{number}"
                ranks.append(float(line.split("\t")[column]))
                if not 1 <= ranks[-1] < float("inf"):
                    raise ValueError(f"{ranks[-1]} is no rank")
            return ranks
        except (ValueError, IndexError) as error:
            found = _one_line(error) if isinstance(error, ValueError) else "too few columns"
            remedy = f"Make it again: {command}"
            self.problem(place, f"found: {found}", wanted="a realistic rank", remedy=remedy)
            return []

    def lines(self, name: str, text: str, shape: type[R], remedy: str) -> list[R]:
        """Read one JSON object a line; none where one is damaged, since the rest would not be what was measured."""
        records: list[R] = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                records.append(shape.model_validate(json.loads(line)))
            except (ValueError, RecursionError) as error:
                self.problem(f"{name}:{number}", f"found: {_explain(error)}", wanted="a JSON object", remedy=remedy)
                return []
        return records

    def beside(
        self, kind: str, measured: Sequence[Measured[Any]], read: Callable[[str, str], list[T]]
    ) -> dict[str, list[T]]:
        """Read the raw material of the first measurement of a kind, by label; what is missing is left out."""
        found = {}
        for first in measured[:1]:
            for label in first.by_label():
                is_baseline = label == "unaligned"
                stem = ".".join([kind, *first.setting, *(["baseline"] if is_baseline else [])])
                found[label] = read(stem, command_line(str(self.path), kind, first.setting, baseline=is_baseline))
        return {label: rows for label, rows in found.items() if rows}

    def text(self, name: str) -> str | None:
        """Return the content of a file, or None where there is none; what cannot be read is a problem."""
        file = self.path / name
        try:
            return file.read_text(encoding="utf-8") if file.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            self.problem(name, f"found: {_one_line(error)}", wanted="a text in UTF-8", remedy=WRITERS_REMEDY)
            return None

    def problem(self, name: str, found: str, *, wanted: str, remedy: str) -> None:
        """Keep what is wrong with a file, in the words of an error."""
        self.problems.append(f"{self.path / name}: wanted {wanted}, {found}. {remedy}")


def _explain(error: BaseException) -> str:
    """Say the first thing that is wrong, and where."""
    if not isinstance(error, ValidationError):
        return _one_line(error)
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
