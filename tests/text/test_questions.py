"""The wording of questions, letter by letter, and what is read from an answer."""

import numpy as np
import pytest

from pykalm.text.questions import NO, TASKS, YES, Question, QuestionWriter, Task
from tests.laws.common import tiny_graph, tiny_verbalizer

ADA, ADA_B, BO, CY, DAN, EVE = range(6)
KNOWS, LIKES = 0, 1

COMPLETE = "Given the head entity and relation, write a tail entity that completes the triple: "
CHOOSE = 'Please choose your answer from: "Yes, this is true" or "No, this is not true".\n'
WANTED: dict[Task, str] = {
    "tail": f"{COMPLETE}eve, knows\n",
    "head": f"{COMPLETE}ada, is known by\n",
    "relation": "What is the relation between eve and ada? Please choose your answer from: knows | likes.\n",
    "classification": f"Is this true: eve knows ada? {CHOOSE}",
}


def writer(*, descriptions: bool = False, **settings: object) -> QuestionWriter:
    return QuestionWriter(tiny_verbalizer(tiny_graph(), **settings), descriptions=descriptions)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_published_sentences(task: Task) -> None:
    words = writer()
    (prompt,) = words.prompts([Question(task, EVE, KNOWS, ADA)])
    assert words.text(prompt) == WANTED[task]


def test_descriptions_stand_behind_names_in_the_question_only() -> None:
    words = writer(descriptions=True)
    (prompt,) = words.prompts([Question("tail", ADA, KNOWS, CY)], [Question("tail", BO, LIKES, ADA)])
    solved = f"{COMPLETE}bo: a baker of bread, likes\nada\n\n"
    assert words.text(prompt) == f"{solved}{COMPLETE}ada: a poet, knows\n"


def test_examples_stand_solved_before_every_question() -> None:
    words = writer()
    examples = [Question("classification", ADA, LIKES, BO), Question("classification", CY, LIKES, DAN, is_true=False)]
    prompts = words.prompts([Question("classification", e, KNOWS, ADA) for e in (EVE, CY)], examples)
    solved = f"Is this true: ada likes bo? {CHOOSE}{YES}\n\nIs this true: cy likes dan? {CHOOSE}{NO}\n\n"
    assert [words.text(prompt) for prompt in prompts] == [
        f"{solved}Is this true: {name} knows ada? {CHOOSE}" for name in ("eve", "cy")
    ]


@pytest.mark.parametrize("template", ["published", "prefix-sharing"])
def test_the_wording_of_the_run_is_what_it_was_trained_to_complete(template: str) -> None:
    texts = tiny_verbalizer(tiny_graph(), template=template, descriptions=False)
    words = QuestionWriter(texts, descriptions=False, wording="run")
    (tail,), (head,) = (words.prompts([Question(task, EVE, LIKES, BO)]) for task in ("tail", "head"))
    assert np.array_equal(tail, texts.prompt(EVE, LIKES))
    assert np.array_equal(head, texts.prompt(BO, LIKES + 2))
    completion = texts.completion(EVE, LIKES, BO)
    assert np.array_equal(words.answer_tokens("tail")[BO], completion.tokens[completion.answer_start : -1])


def test_a_published_tail_prompt_is_the_published_completion() -> None:
    texts = tiny_verbalizer(tiny_graph(), template="published", max_entity_tokens=7)
    words = QuestionWriter(texts, descriptions=True)
    assert np.array_equal(words.prompts([Question("tail", BO, LIKES, CY)])[0], texts.prompt(BO, LIKES))


def test_answers_and_choices() -> None:
    words = writer()
    asked = [Question(task, EVE, KNOWS, BO) for task in TASKS]
    assert [words.answer(question) for question in asked] == ["bo", "eve", "knows", YES]
    assert words.answer(Question("classification", EVE, KNOWS, BO, is_true=False)) == NO
    assert words.choices("head") == ("ada", "ada b", "bo", "cy", "dan", "eve")
    assert words.choices("relation") == ("knows", "likes")
    assert [words.read(tokens) for tokens in words.answer_tokens("classification")] == [YES, NO]


def test_an_answer_is_the_first_line_without_special_tokens() -> None:
    words = writer()
    encode = words.tokenizer.encode
    assert words.read(encode(" Paris, Texas \nGiven")) == "Paris, Texas"
    assert words.read(encode("\nParis")) == ""
    assert words.read([*encode("bo"), words.end_id()]) == "bo"


def test_answers_stop_at_special_tokens_and_line_ends() -> None:
    words = writer()
    newline = words.tokenizer.encode("\n")
    assert words.stop_ids() == (0, 1, 2, *newline)
