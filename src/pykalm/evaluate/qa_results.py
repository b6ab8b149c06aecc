"""From what was written to what it is worth: a line for every question, and the shares of a task beside its baselines."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pykalm.evaluate.answers import ChoiceScorer, NameScorer, Score, normalise, truth_scorer
from pykalm.evaluate.generations import Generation, Line
from pykalm.evaluate.qa_baselines import Baselines
from pykalm.evaluate.qa_questions import RightAnswers, hard_set
from pykalm.graph.graph import KnowledgeGraph
from pykalm.text.questions import Question, QuestionWriter, Task

MEASURES = ("exact", "contains", "any_valid")
HITS = (1, 3, 5, 10)


class Judge:
    """Judge answers to questions about a graph, and those of the baselines by the same rules."""

    def __init__(self, graph: KnowledgeGraph, writer: QuestionWriter) -> None:
        self._graph, self._writer = graph, writer
        self._right, self._baselines = RightAnswers(graph), Baselines(graph)
        names = NameScorer(graph.entity_names)
        self._scorers: Mapping[Task, NameScorer | ChoiceScorer] = {
            "tail": names,
            "head": names,
            "relation": ChoiceScorer(graph.relation_texts),
            "classification": truth_scorer(),
        }

    def line(self, question: Question, prompt: str, generation: Generation) -> Line:
        """Return all that there is to know of one answer, as plain data; entities and relations by their ids."""
        graph, gold = self._graph, self._writer.answer(question)
        valid = self._right.find(question, gold)
        line: Line = {
            "task": question.task,
            "head": graph.entity_ids[question.head],
            "relation": graph.relation_ids[question.relation],
            "tail": graph.entity_ids[question.tail],
            "direction": question.task if question.task in ("tail", "head") else None,
            "prompt": prompt,
            "gold": gold,
            "valid": valid,
            "answer": generation.answer,
            **asdict(self._scorers[question.task].score(generation.answer, gold, valid)),
        }
        if question.source is not None:
            line["source"] = question.source
        if generation.ranked is not None:
            line["ranked"] = [list(pair) for pair in generation.ranked]
        return line

    def results(self, questions: Sequence[Question], lines: Sequence[Line]) -> dict[str, Any]:
        """Return the shares of right answers of one task, those of the baselines, and of ranked answers where there are.

        Classification counts the balanced set of true triples and their corruptions; the balanced set of true triples
        and shipped negatives is beside it, under "hard".
        """
        hard = hard_set(questions)
        main = [place for place, question in enumerate(questions) if question.source != "hard"]
        results = self._set_results(questions, lines, main)
        if hard:
            results["hard"] = self._set_results(questions, lines, hard)
        if ranked := [line for line in lines if "ranked" in line]:
            results["ranked"] = _hits(ranked)
        return results

    def _set_results(
        self, questions: Sequence[Question], lines: Sequence[Line], places: Sequence[int]
    ) -> dict[str, Any]:
        baselines: dict[str, list[Score]] = {}
        for place in places:
            question, line = questions[place], lines[place]
            for name, answer in self._baselines.answers(question).items():
                score = self._scorers[question.task].score(answer, line["gold"], line["valid"])
                baselines.setdefault(name, []).append(score)
        return {
            "num_questions": len(places),
            **_shares(lines[place] for place in places),
            "baselines": {name: _shares(map(asdict, scores)) for name, scores in baselines.items()},
        }


def _shares(judged: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of the answers that are right, in every sense."""
    rows = [[bool(one[measure]) for measure in MEASURES] for one in judged]
    return {
        measure: sum(column) / len(column) for measure, column in zip(MEASURES, zip(*rows, strict=True), strict=True)
    }


def _hits(lines: Sequence[Line]) -> dict[str, float]:
    """Return hits@k: the share of questions of which one of the k likeliest choices is a right answer."""
    longest = max(len(line["ranked"]) for line in lines)
    places = []
    for line in lines:
        valid = {normalise(answer) for answer in line["valid"]}
        found = (place for place, (name, _) in enumerate(line["ranked"], start=1) if normalise(name) in valid)
        places.append(next(found, longest + 1))
    ks = sorted({k for k in HITS if k <= longest} | {longest})
    hits: dict[str, float] = {f"hits_at_{k}": sum(place <= k for place in places) / len(places) for k in ks}
    return {"k": longest, "num_questions": len(places), **hits}
