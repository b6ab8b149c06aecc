"""The whole measurement on a tiny graph: shares by hand, and a session that goes on where it was stopped."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from pykalm.errors import UsageError
from pykalm.evaluate.generations import Generation
from pykalm.evaluate.qa import QaReport, QaSettings, evaluate_qa
from pykalm.evaluate.qa_results import MEASURES
from pykalm.evaluate.qa_session import Session
from pykalm.graph.graph import KnowledgeGraph
from pykalm.model.encoder import Encoder
from pykalm.model.generate import Speaker
from pykalm.text.questions import TASKS
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer

# knows: (ada, bo), (ada, cy), (dan, bo), (cy, eve); likes: (bo, cy), (cy, bo), (ada b, eve), (eve, dan).
TEST = ((0, 0, 3), (4, 0, 2), (2, 1, 3))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return tiny_encoder(chunk_tokens=200)


def graph() -> KnowledgeGraph:
    whole = tiny_graph()
    return dataclasses.replace(whole, splits={**whole.splits, "test": np.array(TEST)})


def measure(
    encoder: Encoder, keep_in: Path | None = None, known: KnowledgeGraph | None = None, **changes: Any
) -> QaReport:
    settings = QaSettings(**{"max_new_tokens": 3, **changes})
    known = known or graph()
    return evaluate_qa(known, encoder, tiny_verbalizer(known), settings, keep_in=keep_in, seed=1)


def scripted(**answers: str) -> Any:
    """Answer by what a prompt ends in, in place of the model."""

    def ask(self: Session, task: str, speaker: Speaker, batch: Any) -> list[Generation]:
        prompts = [self.writer.text(speaker.prompts[number]) for number in batch.tolist()]
        return [Generation(next(answers[k] for k in answers if prompt.endswith(f"{k}\n"))) for prompt in prompts]

    return mock.patch.object(Session, "_ask", ask)


def test_shares_are_those_counted_by_hand(encoder: Encoder) -> None:
    """Tails of (ada, knows, cy), (dan, knows, bo), (bo, likes, cy): one exact, one any valid (bo), one in a sentence."""
    answers = {"ada, knows": "The Bo.", "dan, knows": "bo", "bo, likes": "I think cy"}
    with scripted(**answers):
        report = measure(encoder, tasks=("tail",))
    assert [line["answer"] for line in report.lines] == ["The Bo.", "bo", "I think cy"]
    tail = report.tasks["tail"]
    assert tail["num_questions"] == 3
    assert [tail[measure] for measure in MEASURES] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    # Train knows bo twice and cy once as what is known, cy and bo and eve once each as what is liked: bo, bo, bo.
    assert tail["baselines"]["most-frequent"] == pytest.approx({"exact": 1 / 3, "contains": 1 / 3, "any_valid": 2 / 3})
    assert report.lines[0] == {
        "task": "tail", "head": "p0", "relation": "knows", "tail": "p3", "direction": "tail",
        "prompt": "Given the head entity and relation, write a tail entity that completes the triple: ada, knows\n",
        "gold": "cy", "valid": ["cy", "bo"], "answer": "The Bo.", "exact": False, "contains": False, "any_valid": True,
    }  # fmt: skip


def test_all_tasks_are_asked_and_written_down(encoder: Encoder, tmp_path: Path) -> None:
    report = measure(encoder, ranked=3, shots=1, descriptions=True)
    path = report.save(tmp_path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert list(saved["tasks"]) == list(TASKS)
    assert [saved["tasks"][task]["num_questions"] for task in TASKS] == [3, 3, 3, 6]
    assert saved["tasks"]["classification"]["by_score"]["random"]["num_questions"] == 6
    assert saved["tasks"]["tail"]["ranked"]["k"] == 3
    assert "1 examples from train; with descriptions" in saved["protocol"]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 15
    assert {line["source"] for line in lines if line["task"] == "classification"} == {"random"}
    for line in lines:
        assert line["gold"] in line["valid"]
        assert ("ranked" in line) == (line["task"] != "classification")
    for task in ("tail", "head", "relation"):
        hits = saved["tasks"][task]["ranked"]
        firsts = [line["ranked"][0][0] in line["valid"] for line in lines if line["task"] == task]
        assert hits["hits_at_1"] == sum(firsts) / 3
        assert hits[f"hits_at_{hits['k']}"] >= hits["hits_at_1"]
    assert [saved["tasks"][task]["ranked"]["k"] for task in ("head", "relation")] == [3, 2]  # there are two relations


def test_constrained_answers_are_choices(encoder: Encoder) -> None:
    report = measure(encoder, constrained=True)
    choices = {"relation": {"knows", "likes"}, "classification": {"Yes, this is true", "No, this is not true"}}
    names = set(graph().entity_names)
    for line in report.lines:
        assert line["answer"] in choices.get(line["task"], names)
        assert line["exact"] == (line["answer"] == line["gold"])


def test_shipped_negatives_are_a_set_of_their_own(encoder: Encoder) -> None:
    """Three true triples, three corruptions, two shipped negatives, of which one is true after all (ada knows bo)."""
    false = {"valid": np.array([(1, 0, 2)]), "test": np.array([(0, 0, 2), (1, 0, 2)])}
    with scripted(**{'true".': "Yes."}):
        report = measure(encoder, known=dataclasses.replace(graph(), negatives=false), tasks=("classification",))
    results = report.tasks["classification"]
    assert [line["source"] for line in report.lines] == ["random"] * 6 + ["hard"]
    assert (results["num_questions"], results["exact"], results["contains"]) == (6, 0.0, 0.5)
    assert (results["hard"]["num_questions"], results["hard"]["contains"]) == (4, 0.75)
    assert results["baselines"]["majority"] == {"exact": 0.5, "contains": 0.5, "any_valid": 0.5}
    assert results["hard"]["baselines"]["majority"]["exact"] == 0.75
    assert {kind: score["num_questions"] for kind, score in results["by_score"].items()} == {"random": 6, "hard": 4}


@dataclasses.dataclass
class Asked:
    """Hold the prompts that a model was asked, and how many it may be asked before the session is stopped."""

    prompts: list[str] = dataclasses.field(default_factory=list)
    at_most: int = 1000


@pytest.fixture
def asked() -> Iterator[Asked]:
    """Record what a model is asked, and stop the session where wanted."""
    seen, right = Asked(), Session._ask

    def ask(self: Session, task: Any, speaker: Speaker, batch: Any) -> list[Generation]:
        if len(seen.prompts) >= seen.at_most:
            raise KeyboardInterrupt
        seen.prompts.extend(self.writer.text(speaker.prompts[number]) for number in batch.tolist())
        return right(self, task, speaker, batch)

    with mock.patch.object(Session, "_ask", ask):
        yield seen


def test_an_interrupted_session_goes_on_where_it_stopped(encoder: Encoder, tmp_path: Path, asked: Asked) -> None:
    whole = measure(encoder)
    num_prompts = len(asked.prompts)
    kept = tmp_path / "results" / "qa.jsonl"
    asked.prompts.clear()
    asked.at_most = 7
    with pytest.raises(KeyboardInterrupt):
        measure(encoder, kept)
    first = len(asked.prompts)
    assert 7 <= first < num_prompts
    with kept.open("a", encoding="utf-8") as file:
        file.write('{"task": "tail", "prompt": "cut by a ki')
    asked.at_most = 1000
    resumed = measure(encoder, kept)
    assert len(asked.prompts) == num_prompts  # none was asked twice
    assert (resumed.lines, resumed.tasks) == (whole.lines, whole.tasks)
    resumed.save(kept.parent)
    assert len(kept.read_text(encoding="utf-8").splitlines()) == len(whole.lines)
    assert measure(encoder, kept).tasks == whole.tasks
    assert len(asked.prompts) == num_prompts


def test_answers_of_other_weights_or_settings_are_not_taken(encoder: Encoder, tmp_path: Path, asked: Asked) -> None:
    kept = tmp_path / "qa.jsonl"
    measure(encoder, kept, tasks=("tail",))
    count = len(asked.prompts)
    measure(tiny_encoder("gpt2", chunk_tokens=200), kept, tasks=("tail",))
    assert len(asked.prompts) == 2 * count
    measure(encoder, kept, tasks=("tail",), max_new_tokens=2)
    assert len(asked.prompts) == 3 * count


def test_tasks_measured_before_are_kept(encoder: Encoder, tmp_path: Path) -> None:
    measure(encoder, tasks=("tail",)).save(tmp_path)
    path = measure(encoder, tasks=("relation",)).save(tmp_path)
    assert set(json.loads(path.read_text(encoding="utf-8"))["tasks"]) == {"tail", "relation"}
    assert len(path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()) == 6
    measure(encoder, tasks=("head",), max_new_tokens=2).save(tmp_path)  # other answers: nothing is kept
    assert set(json.loads(path.read_text(encoding="utf-8"))["tasks"]) == {"head"}


def test_a_measurement_goes_on_where_nothing_can_be_written(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file in the way", encoding="utf-8")
    report = measure(encoder, tmp_path / "results" / "qa.jsonl", tasks=("tail",))
    assert len(report.lines) == 3


@pytest.mark.parametrize(
    "wrong", [{"tasks": ("tails",)}, {"tasks": ()}, {"tasks": ("tail", "tail")}, {"shots": -1}, {"wording": "other"},
              {"max_new_tokens": 0}, {"ranked": -1}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="wanted"):
        QaSettings(**wrong)
