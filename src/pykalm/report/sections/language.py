"""Language preserved: perplexity and benchmarks, before and after alignment."""

from collections.abc import Iterator

from pykalm.report.blocks import Block, Missing, Row, Section, Table
from pykalm.report.commands import describe_setting
from pykalm.report.records import Benchmark, LanguageResult, Perplexity
from pykalm.report.run_files import Measured, RunFiles

LEAD = "Does it still speak? Perplexity on running text (lower is better) and benchmarks of knowledge and language."
UNITS = ("word", "token", "byte")


def language_section(run: RunFiles) -> Section:
    """Lay out perplexities and benchmarks of the unaligned and the aligned model, in every setting they were measured in."""
    if not run.language:
        commands = (run.command("language", baseline=True), run.command("language"))
        return Section("language", "Language", LEAD, [Missing("Neither model has been measured.", commands)])
    in_order = sorted(run.language, key=lambda measured: not measured.any.perplexity)  # perplexity first
    blocks = [block for measured in in_order for block in _blocks(run, measured)]
    return Section("language", "Language", LEAD, blocks)


def _blocks(run: RunFiles, measured: Measured[LanguageResult]) -> Iterator[Block]:
    """Yield the tables of one setting, and how to measure the model that is missing."""
    if perplexities := list(_perplexity_rows(measured)):
        yield Table(("perplexity", "unaligned", "aligned", "change"), perplexities, _protocol(measured))
    if benchmarks := list(_benchmark_rows(measured)):
        setting = describe_setting(measured.setting)
        caption = "Measured by lm-eval; behind each name the number of questions; ± is the standard error."
        caption += f" Of each task {setting}." if setting else ""
        yield Table(("accuracy in %", "unaligned", "aligned", "change"), benchmarks, caption)
    for label in ("unaligned", "aligned"):
        if label not in measured.by_label():
            command = run.command("language", measured.setting, baseline=label == "unaligned")
            yield Missing(f"The {label} model has not been measured.", (command,))


def _perplexity_rows(measured: Measured[LanguageResult]) -> Iterator[Row]:
    """Yield a row for each text and unit that one of the models was measured by."""
    before, after = (one.perplexity if one else {} for one in (measured.unaligned, measured.aligned))
    for text in sorted(before.keys() | after.keys()):
        for unit in UNITS:
            values = [_by(one.get(text), unit) for one in (before, after)]
            if values != [None, None]:
                cells = ["–" if value is None else f"{value:,.2f}" for value in values]
                yield Row((f"{text}, per {unit}", *cells, _change(*values)), is_emphasised=unit == "word")


def _benchmark_rows(measured: Measured[LanguageResult]) -> Iterator[Row]:
    before, after = (one.lm_eval if one else {} for one in (measured.unaligned, measured.aligned))
    for task in sorted(before.keys() | after.keys()):
        pair = (before.get(task), after.get(task))
        numbers = [one.num_questions for one in pair if one and one.num_questions is not None]
        old, new = pair
        change = f"{100 * (new.acc - old.acc):+.1f}".replace("-", "−") if old and new else "–"
        name = f"{task} · {numbers[0]:,}" if numbers else task
        yield Row((name, _accuracy(old), _accuracy(new), change))


def _by(perplexity: Perplexity | None, unit: str) -> float | None:
    value: float | None = getattr(perplexity, unit, None)
    return value


def _change(before: float | None, after: float | None) -> str:
    """Write how much higher a perplexity has become."""
    if before is None or after is None:
        return "–"
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−")


def _accuracy(benchmark: Benchmark | None) -> str:
    if benchmark is None:
        return "–"
    error = "" if benchmark.stderr is None else f" ± {100 * benchmark.stderr:.1f}"
    return f"{100 * benchmark.acc:.1f}{error}"


def _protocol(measured: Measured[LanguageResult]) -> str:
    """Say how the perplexity was measured."""
    windows = sorted(
        f"{name}: window {text.window:,}, stride {text.stride:,}"
        for name, text in measured.any.perplexity.items()
        if text.window is not None and text.stride is not None
    )
    parts = [*windows, measured.any.protocol] if measured.any.protocol else windows
    return f"{'; '.join(parts)}." if parts else ""
