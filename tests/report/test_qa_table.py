"""The table of question answering shows every model beside the baselines, from plain data alone."""

import io

from rich.console import Console

from pykalm.report.qa_table import qa_table


def shares(value: float) -> dict[str, float]:
    return {"exact": value, "contains": value + 0.1, "any_valid": value + 0.2}


def result(value: float) -> dict[str, object]:
    hard = {"num_questions": 6, **shares(0.3), "baselines": {"majority": shares(0.5)}}
    truth = {"num_questions": 4, **shares(value), "baselines": {"majority": shares(0.5)}, "hard": hard}
    truth["by_score"] = {"random": {"accuracy": 0.75}, "hard": {"accuracy": 0.625}}
    tail = {"num_questions": 1234, **shares(value), "baselines": {"most-frequent": shares(0.0)}}
    tail["ranked"] = {"k": 10, "num_questions": 1234, "hits_at_1": 0.111, "hits_at_10": 0.444}
    return {"graph": "people", "split": "test", "protocol": "greedy", "tasks": {"tail": tail, "classification": truth}}


def test_models_stand_beside_baselines() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(qa_table({"unaligned": result(0.25), "aligned": result(0.5)}))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    for row in (
        "Questions about people, test",
        "tail unaligned 1,234 25.0 35.0 45.0",
        "unaligned, ranked hits@1 11.1",
        "aligned 1,234 50.0 60.0 70.0",
        "aligned, ranked hits@10 44.4",
        "most-frequent 0.0 10.0 20.0",
        "classification unaligned 4 25.0 35.0 45.0",
        "aligned, by link score 75.0",
        "classification, hard unaligned 6 30.0 40.0 50.0",
        "aligned, by link score 62.5",
        "greedy",
    ):
        assert row in lines
