"""The report of language: what is asked, what is saved and joined, the attention and the state that are left behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from pykalm.errors import KalmError, UsageError
from pykalm.evaluate import harness
from pykalm.evaluate.harness import TaskResult, read_result
from pykalm.evaluate.language import LanguageReport, LanguageSettings, measure_language, own_attention
from pykalm.evaluate.perplexity import Perplexity
from pykalm.model.encoder import Encoder
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer

PARTS = {"mmlu_anatomy": TaskResult({"acc": 1.0}, 2, 5, "local files")}
RIGHT = TaskResult({"acc": 0.25, "acc_stderr": 0.04}, 100, 5, "local files", PARTS)
OTHER = TaskResult({"word_perplexity": 12.0}, 3, 0, "lm-eval")


def report(perplexity: dict[str, Perplexity], tasks: dict[str, TaskResult], weights: str = "a") -> LanguageReport:
    return LanguageReport("world", "as said", perplexity, tasks, {"aligned": True, "weights": weights})


def perplexity(likelihood: float = -10.0) -> Perplexity:
    return Perplexity(likelihood, 4, 5, 20, 1, 8, 8)


def test_tasks_that_count_right_answers_stand_apart(tmp_path: Path) -> None:
    path = report({"wikitext2": perplexity()}, {"mmlu": RIGHT, "wikitext": OTHER}).save(tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == "language.json"
    assert found["lm_eval"]["mmlu"] | {"metrics": {}, "parts": {}} == {
        "acc": 0.25, "stderr": 0.04, "num_questions": 100, "shots": 5, "source": "local files", "metrics": {}, "parts": {},
    }  # fmt: skip
    assert found["lm_eval"]["mmlu"]["parts"]["mmlu_anatomy"]["acc"] == 1.0
    assert found["lm_eval_other"] == {
        "wikitext": {"num_questions": 3, "shots": 0, "source": "lm-eval", "metrics": {"word_perplexity": 12.0}}
    }
    assert found["perplexity"]["wikitext2"]["token"] == pytest.approx(7.389056, rel=1e-6)  # e²


def test_what_was_measured_before_of_the_same_weights_is_kept(tmp_path: Path) -> None:
    report({"wikitext2": perplexity()}, {}).save(tmp_path)
    report({"wikitext103": perplexity(-20)}, {"mmlu": RIGHT}).save(tmp_path)
    path = report({"wikitext2": perplexity(-30)}, {}).save(tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {name: one["log_likelihood"] for name, one in found["perplexity"].items()} == {
        "wikitext2": -30,
        "wikitext103": -20,
    }
    assert set(found["lm_eval"]) == {"mmlu"}
    found = json.loads(report({}, {"mmlu": RIGHT}, weights="b").save(tmp_path).read_text(encoding="utf-8"))
    assert found["perplexity"] == {}


@pytest.mark.parametrize("content", ["", "[]", '{"weights": "a"}', '{"weights": "a", "perplexity": 3}'])
def test_a_damaged_file_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "language.json").write_text(content, encoding="utf-8")
    path = report({"wikitext2": perplexity()}, {}).save(tmp_path)
    assert set(json.loads(path.read_text(encoding="utf-8"))["perplexity"]) == {"wikitext2"}


def measure(encoder: Encoder, **settings: Any) -> LanguageReport:
    return measure_language("people", encoder, tiny_verbalizer(tiny_graph()), LanguageSettings(**settings))


def test_the_models_own_attention_reads_and_the_other_comes_back(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("A short text.", encoding="utf-8")
    encoder = tiny_encoder()
    encoder.use_attention(MATMUL_ATTENTION)
    with own_attention(encoder):
        assert encoder.attention == "sdpa"
    found = measure(encoder, texts=[tmp_path / "note.txt"], window=8).to_dict()
    assert encoder.attention == MATMUL_ATTENTION
    assert found["precision"] == "float32"
    assert found["perplexity"]["note"]["num_tokens"] == 13
    eager = tiny_encoder()
    eager.use_attention("eager")
    with own_attention(eager):
        assert eager.attention == "eager"


def test_asking_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="found neither"):
        measure(tiny_encoder())


def test_without_lm_eval_a_task_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KalmError, match=r"pip install -e '\.\[language\]'"):
        measure(tiny_encoder(), tasks=["mmlu"])


def test_results_of_lm_eval_are_read() -> None:
    """A group with its parts, a tag that is a list of tasks only, metrics behind filters, errors that are not numbers."""
    part = {"alias": "b", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 0.25}
    found = {
        "results": {"a": {"alias": "a", "acc,none": 0.4, "acc_stderr,none": 0.1, "sample_len": 7}, "b": part},
        "group_subtasks": {"a": ["b"]},
        "n-shot": {"b": 2},
    }
    group = read_result(found, "a", "here")
    assert (group.metrics, group.num_questions, group.shots) == ({"acc": 0.4, "acc_stderr": 0.1}, 7, 2)
    assert group.parts["b"].metrics == {"acc": 0.5, "exact_match,strict": 0.25}
    tag = read_result({"results": {"b": part}, "n-shot": {"b": 2}}, "tag", "here")
    assert (tag.metrics, tag.num_questions, set(tag.parts)) == ({}, 3, {"b"})


@pytest.mark.parametrize("row", ["a question,A,B,C,D", "a question,A,B,C,D,E", "q,A,B,C,D,"])
def test_a_wrong_line_of_mmlu_is_named(tmp_path: Path, row: str) -> None:
    path = tmp_path / "x_dev.csv"
    path.write_text(f'"two\nlines",1,2,3,4,B\n{row}\n', encoding="utf-8")
    with pytest.raises(KalmError, match="question 2: wanted a question, four answers and a letter"):
        harness._mmlu_rows(path, "x")
    with pytest.raises(KalmError, match="cannot be read"):
        harness._mmlu_rows(tmp_path / "y_dev.csv", "y")


def test_tasks_in_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_require_lm_eval", lambda: None)
    monkeypatch.setattr(harness, "num_launched", lambda: 2)
    with pytest.raises(UsageError, match="in one process"):
        measure(tiny_encoder(), tasks=["mmlu"])
