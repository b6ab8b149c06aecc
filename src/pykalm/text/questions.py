"""The questions that are put to a model as text: four tasks, with solved examples before them where wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from pykalm.text.pieces import PieceTokenizer
from pykalm.text.templates import PUBLISHED, parts
from pykalm.text.texts import Texts, TokenIds
from pykalm.text.verbalize import Verbalizer

Task = Literal["tail", "head", "relation", "classification"]
Wording = Literal["published", "run"]

TASKS: tuple[Task, ...] = ("tail", "head", "relation", "classification")
YES, NO = "Yes, this is true", "No, this is not true"
RELATION = "What is the relation between {head} and {tail}? Please choose your answer from:"
CLASSIFICATION = f'Is this true: {{head}} {{relation}} {{tail}}? Please choose your answer from: "{YES}" or "{NO}".\n'
BETWEEN_CHOICES = " | "
AFTER_EXAMPLE = "\n\n"


@dataclass(frozen=True)
class Question:
    """Hold what is asked: a task, and the triple (head, relation < R, tail) that it is about.

    Of the triple, tail asks for the tail, head for the head (by the inverse relation), relation for the relation.
    Classification asks whether it holds; is_true is its answer, and `source` says what false triples it is set against:
    random corruptions, or those that the graph ships.
    """

    task: Task
    head: int
    relation: int
    tail: int
    is_true: bool = True
    source: Literal["random", "hard"] | None = None


class QuestionWriter:
    """Put questions about a graph into token ids, joined like all other texts (text.verbalize), and read answers back.

    descriptions: whether the entities of a question stand with their descriptions; answers are names alone. wording:
    tails and heads are asked in the published sentence, or in the words that the run was trained to complete.
    """

    def __init__(self, verbalizer: Verbalizer, *, descriptions: bool, wording: Wording = "published") -> None:
        self.graph, self.tokenizer = verbalizer.graph, verbalizer.tokenizer
        settings = verbalizer.settings.model_copy(update={"descriptions": descriptions})
        self._words = Verbalizer(self.graph, self.tokenizer, settings, templates=verbalizer.templates)
        self._pieces = PieceTokenizer(self.tokenizer)
        templates = PUBLISHED if wording == "published" else verbalizer.templates
        self._completion = templates.completion
        self._before_answer = next(parts(templates.answer))[0]
        self._choices = self._piece(f" {BETWEEN_CHOICES.join(self.choices('relation'))}.\n")

    def prompts(self, questions: Sequence[Question], examples: Sequence[Question] = ()) -> Texts:
        """Return N questions of one task, each behind the same examples with their answers."""
        asked = self._asked(questions, opening=not examples)
        if not examples:
            return asked
        each = np.arange(len(questions))
        return Texts.join([(self._solved(examples), np.zeros_like(each)), (asked, each)])

    def answer(self, question: Question) -> str:
        """Return the right answer as a model should write it."""
        if question.task == "classification":
            return YES if question.is_true else NO
        if question.task == "relation":
            return self.graph.relation_texts[question.relation]
        return self.graph.entity_names[question.tail if question.task == "tail" else question.head]

    def choices(self, task: Task) -> tuple[str, ...]:
        """Return every answer that a task can have, each once: names of entities, texts of relations, or yes and no."""
        if task == "classification":
            return YES, NO
        return tuple(dict.fromkeys(self.graph.relation_texts if task == "relation" else self.graph.entity_names))

    def answer_tokens(self, task: Task) -> Texts:
        """Return the tokens of every choice of a task as they continue a prompt, without an end token."""
        before = self._before_answer if task in ("tail", "head") else ""
        return self._pieces.tokens((before + choice for choice in self.choices(task)), is_first=False, limit=None)

    def read(self, tokens: Sequence[int] | TokenIds) -> str:
        """Return the answer in what a model wrote: its first line, without special tokens and outer spaces."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.split("\n")[0].strip()

    def text(self, tokens: TokenIds) -> str:
        """Return a prompt as a person reads it."""
        text: str = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def end_id(self) -> int:
        """Return the token that ends an answer; raises ModelError where the tokenizer has none."""
        return self._words.end_token_id()

    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens at which an answer is over: end tokens and all whose text has a line end."""
        return self._stop_ids

    def fingerprint(self) -> str:
        """Return a sha256 over the graph's texts, the cuts and the tokenizer, as Verbalizer has it."""
        return self._words.fingerprint()

    @cached_property
    def _stop_ids(self) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        return tuple(sorted({self.end_id(), *special, *(token for token, text in enumerate(texts) if "\n" in text)}))

    def _solved(self, examples: Sequence[Question]) -> Texts:
        """Return the examples, each with its answer, as one text."""
        before = self._before_answer if examples[0].task in ("tail", "head") else ""
        columns = []
        for place, example in enumerate(examples):
            asked = self._asked([example], opening=place == 0)
            columns += [asked, self._piece(before + self.answer(example)), self._piece(AFTER_EXAMPLE)]
        return Texts.join([(column, np.zeros(1, dtype=np.int64)) for column in columns])

    def _asked(self, questions: Sequence[Question], *, opening: bool) -> Texts:
        (task,) = {question.task for question in questions}
        triples = np.array([(q.head, q.relation, q.tail) for q in questions], dtype=np.int64)
        heads, relations, tails = triples.T
        entities = {"head": ("entity", heads), "tail": ("entity", tails)}
        if task == "relation":
            asked, each = self._words.join(RELATION, entities, opening=opening), np.arange(len(questions))
            return Texts.join([(asked, each), (self._choices, np.zeros_like(each))])
        if task == "classification":
            values = entities | {"relation": ("relation", relations)}
            return self._words.join(CLASSIFICATION, values, opening=opening)
        if task == "head":
            heads, relations = tails, relations + self.graph.num_relations
        values = {"head": ("entity", heads), "relation": ("relation", relations)}
        return self._words.join(self._completion, values, opening=opening)

    def _piece(self, text: str) -> Texts:
        """Return the tokens of a text that does not begin a prompt, as a table of one."""
        return self._pieces.tokens([text], is_first=False, limit=None)
