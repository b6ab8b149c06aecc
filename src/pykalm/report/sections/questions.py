"""Question answering by generation: accuracies as bars, and cases drawn by seed."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pykalm.report.blocks import Block, Case, Cases, Figures, Missing, Reply, Row, Section, Table
from pykalm.report.charts import columns
from pykalm.report.commands import describe_setting
from pykalm.report.drawing import ALIGNED, REFERENCE, UNALIGNED, tidy
from pykalm.report.paper import PUBLISHED_ANSWERS, QUESTION_SOURCE
from pykalm.report.records import Accuracy, Answer, QuestionResult, QuestionSet, QuestionTask
from pykalm.report.run_files import Measured, RunFiles

TASKS = ("head", "tail", "relation", "classification")
RULES = {"any_valid": "any valid", "exact": "exact", "contains": "contains"}
COLOURS = {"unaligned": UNALIGNED, "aligned": ALIGNED, "best without a model": REFERENCE}
SHOWN_SETTINGS = 4
CASES_OF_A_KIND = 2
PLAIN = "names only, no example"


def questions_section(run: RunFiles) -> Section:
    """Draw the accuracies of the four tasks, before and after alignment, beside baselines without a model."""
    lead = "Asked in words, does the model write the answer? Four tasks; an answer is right where the graph knows it."
    if not run.qa:
        commands = (run.command("qa", baseline=True), run.command("qa"))
        return Section("questions", "Question answering", lead, [Missing("No question has been asked.", commands)])
    shown = run.qa[:SHOWN_SETTINGS]
    drawings = [
        columns(f"questions-{number}", f"Right answers in %, {_name(measured)}", *_bars(measured), colours=COLOURS)
        for number, measured in enumerate(shown, start=1)
    ]
    caption = (
        "An answer counts where any entity that the graph knows as an answer was written. Orange: the best of the baselines "
        "that need no model (the most frequent answer, a copy from the description, the majority)."
    )
    blocks: list[Block] = [Figures(drawings, caption)]
    blocks += [_accuracies(measured) for measured in run.qa]
    blocks += _missing(run)
    blocks.append(_published())
    return Section("questions", "Question answering", lead, blocks)


def cases_section(run: RunFiles) -> Section:
    """Show right and wrong answers as they were written, drawn by seed."""
    lead = "What the models wrote, word for word."
    own = run.answers.get("aligned") or run.answers.get("unaligned")
    if not own:
        text = "The answers are not here: they are written beside the results of the questions."
        return Section("cases", "Case studies", lead, [Missing(text, (run.command("qa"),))])
    seed = run.qa[0].any.seed
    chosen = choose_cases(own, seed)
    by_question = {label: {answer.question(): answer for answer in answers} for label, answers in run.answers.items()}
    which = "aligned" if "aligned" in run.answers else "unaligned"
    lead += (
        f" Drawn by seed {seed} from {len(own):,} questions, none chosen by hand: of each task up to {CASES_OF_A_KIND} that the"
        f" {which} model answered right and as many that it answered wrong."
    )
    return Section("cases", "Case studies", lead, [Cases([_case(answer, by_question) for answer in chosen])])


def choose_cases(answers: Sequence[Answer], seed: int, *, count: int = CASES_OF_A_KIND) -> list[Answer]:
    """Draw up to `count` right and `count` wrong answers of each task, the same for the same answers and seed."""
    generator = np.random.default_rng(seed)
    chosen: list[Answer] = []
    for task in _ordered({answer.task for answer in answers}):
        for is_right in (True, False):
            found = [answer for answer in answers if answer.task == task and answer.any_valid is is_right]
            chosen += [found[place] for place in sorted(generator.permutation(len(found))[:count].tolist())]
    return chosen


def _case(answer: Answer, by_question: Mapping[str, Mapping[tuple[str | None, ...], Answer]]) -> Case:
    """Put together what each model wrote for one question."""
    replies = [
        Reply(label, found[answer.question()].answer, found[answer.question()].any_valid)
        for label, found in by_question.items()
        if answer.question() in found
    ]
    others = [valid for valid in answer.valid if valid != answer.gold]
    also = ", ".join(others[:5]) + (f" and {len(others) - 5:,} more" if len(others) > 5 else "")
    task = f"{answer.task}, hard negative" if answer.source == "hard" else answer.task
    before, question, after = (tidy(part, 160) for part in _split(answer.prompt.strip().rpartition("\n")[2]))
    is_whole = len(before) + len(question) + len(after) + 4 > len(answer.prompt.strip())
    prompt = "" if is_whole else answer.prompt
    return Case(task, before, question, after, prompt, answer.gold, also, tuple(replies), answer.any_valid)


def _split(line: str) -> tuple[str, str, str]:
    """Find in the last line of a prompt what is asked, between an instruction before it and choices after it."""
    if "? " in line:
        question, _, choices = line.partition("? ")
        return "", f"{question}?", choices
    before, colon, question = line.partition(": ")
    return (f"{before}:", question, "") if colon else ("", line, "")


def _bars(measured: Measured[QuestionResult]) -> tuple[list[str], dict[str, list[float]]]:
    """Return the tasks, and the share of right answers of each model and of the best baseline."""
    tasks = _ordered(set(measured.any.tasks))
    series = {
        label: [one.tasks[task].any_valid if task in one.tasks else 0.0 for task in tasks]
        for label, one in measured.by_label().items()
    }
    best = [
        max((baseline.any_valid for baseline in measured.any.tasks[task].baselines.values()), default=0.0)
        for task in tasks
    ]
    return tasks, series | ({"best without a model": best} if any(best) else {})


def _accuracies(measured: Measured[QuestionResult]) -> Table:
    """Lay out all three accuracies of both models and of every baseline."""
    rows = [row for task in _ordered(set(measured.any.tasks)) for row in _task_rows(measured, task)]
    result = measured.any
    protocol = f": {result.protocol}" if result.protocol else ""
    caption = f"Share of right answers by rule, in %. {result.graph}, {result.split}{protocol}."
    summary = f"All three rules and every baseline, {_name(measured)}"
    return Table(("answered by", *RULES.values()), rows, caption, summary=summary)


def _task_rows(measured: Measured[QuestionResult], task: str) -> Iterator[Row]:
    """Yield the rows of a task, then those against the hard negatives of the graph, where it has some."""
    found = {label: one.tasks[task] for label, one in measured.by_label().items() if task in one.tasks}
    hard = {label: one.hard for label, one in found.items() if one.hard}
    sets: list[tuple[str, Mapping[str, QuestionSet]]] = [(task, found), (f"{task}, hard negatives", hard)]
    for name, models in sets:
        for one in list(models.values())[-1:]:
            yield Row((f"{name}, {one.num_questions:,} questions",), is_heading=True)
            for label, model in models.items():
                yield Row((label, *_percents(model)), is_emphasised=label == "aligned")
            for label, baseline in one.baselines.items():
                yield Row((f"{label}, no model", *_percents(baseline)))
    for label, model in found.items():
        yield from _further_rows(label, model)


def _further_rows(label: str, task: QuestionTask) -> Iterator[Row]:
    """Yield what else was measured of a task: the likeliest choices, and classification by the scores of link prediction."""
    hits = {name.removeprefix("hits_at_"): share for name, share in (task.ranked or {}).items() if "hits_at_" in name}
    for count, share in hits.items():
        yield Row((f"{label}, among its first {count} choices", f"{100 * share:.1f}", "–", "–"))
    for kind, scored in (task.by_score or {}).items():
        yield Row((f"{label}, by link prediction score, {kind} negatives", f"{100 * scored.accuracy:.1f}", "–", "–"))


def _percents(accuracy: Accuracy) -> Iterator[str]:
    return (f"{100 * getattr(accuracy, rule):.1f}" for rule in RULES)


def _published() -> Table:
    rows = [
        Row((one.model, *(f"{before:.1f} → {after:.1f}" for before, after in (getattr(one, task) for task in TASKS))))
        for one in PUBLISHED_ANSWERS
    ]
    return Table(
        ("unaligned → KaLM", *TASKS), rows, f"For orientation. {QUESTION_SOURCE}", summary="Published numbers on WN18RR"
    )


def _missing(run: RunFiles) -> Iterator[Missing]:
    main = run.qa[0]
    for label in {"unaligned", "aligned"} - main.by_label().keys():
        command = run.command("qa", main.setting, baseline=label == "unaligned")
        yield Missing(f"The {label} model has not been asked.", (command,))


def _name(measured: Measured[QuestionResult]) -> str:
    return describe_setting(measured.setting) or PLAIN


def _ordered(tasks: set[str]) -> list[str]:
    """Return the tasks in the order of the paper; unknown ones come last."""
    return sorted(tasks, key=lambda task: (TASKS.index(task) if task in TASKS else len(TASKS), task))
