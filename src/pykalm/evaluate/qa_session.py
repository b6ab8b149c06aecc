"""The asking itself: prompts of a task are put to a model in batches, and what it writes is kept as it comes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pykalm.evaluate.generations import Generation, GenerationLog, Line
from pykalm.model.encoder import Encoder
from pykalm.model.generate import Speaker
from pykalm.model.index import distinct_texts
from pykalm.model.name_trie import NameTrie
from pykalm.processes import count, failing_together, gather, is_main, rank
from pykalm.text.questions import Question, QuestionWriter, Task
from pykalm.text.texts import IntArray, Texts

RANKED_TASKS: tuple[Task, ...] = ("tail", "head", "relation")
"""Tasks whose choices are worth ranking: there are more than two."""

Write = Callable[[Question, str, Generation], Line]


@dataclass(frozen=True, eq=False)
class Exam:
    """Hold the questions (N) of one task and their prompts, of which equal ones are asked once."""

    task: Task
    questions: Sequence[Question]
    prompts: Texts

    @cached_property
    def distinct(self) -> tuple[Texts, IntArray]:
        """Return the distinct prompts (U), and which of them each question (N,) has."""
        return distinct_texts(self.prompts)

    @property
    def num_prompts(self) -> int:
        """Return U."""
        return len(self.distinct[0])

    def of_prompts(self, prompts: Iterable[int]) -> list[tuple[Question, int]]:
        """Return the questions that have some of the distinct prompts, each with the number of its own, in their order."""
        wanted = set(prompts)
        pairs = zip(self.questions, self.distinct[1].tolist(), strict=True)
        return [(question, prompt) for question, prompt in pairs if prompt in wanted]


@dataclass(frozen=True, eq=False)
class Session:
    """Ask a model: freely or by the choices of a task, with the likeliest choices (`ranked` of them) where wanted.

    What the log knows is not asked again; every batch is kept in it before the next begins.
    """

    encoder: Encoder
    writer: QuestionWriter
    constrained: bool
    ranked: int
    max_new_tokens: int
    log: GenerationLog | None = None

    def take(self, exam: Exam, write: Write, report: Callable[[int], None]) -> list[Line]:
        """Return a line, as `write` writes it, for every question; report is told how many prompts are answered.

        A batch of which something is missing is asked as a whole, so that answers are, to the last bit of rounding, those
        of an uninterrupted session. All processes call it alike and take turns with the batches.
        """
        prompts, _ = exam.distinct
        texts = [self.writer.text(tokens) for tokens in prompts]
        known = self.log.generations() if self.log else {}
        found = {n: known[exam.task, text] for n, text in enumerate(texts) if (exam.task, text) in known}

        def lines_of(numbers: Iterable[int]) -> list[Line]:
            return [write(question, texts[n], found[n]) for question, n in exam.of_prompts(numbers)]

        if len(found) < len(prompts):
            speaker = self._speaker(exam.task, prompts)
            left = [batch for batch in speaker.batches if any(number not in found for number in batch.tolist())]
            for start in range(0, len(left), count()):
                for numbers, written in self._ask_all(exam.task, speaker, left[start : start + count()]):
                    found.update(zip(numbers, written, strict=True))
                    if self.log and is_main():
                        self.log.append(lines_of(numbers))
                report(len(found))
        report(len(prompts))
        return lines_of(range(len(prompts)))

    def _ask_all(
        self, task: Task, speaker: Speaker, batches: Sequence[IntArray]
    ) -> list[tuple[list[int], list[Generation]]]:
        """Let each process answer one of some batches; return the prompts of all with what was written."""
        own = batches[rank()] if rank() < len(batches) else None
        with failing_together():
            written = ([], []) if own is None else (own.tolist(), self._ask(task, speaker, own))
        return gather(written)

    def _ask(self, task: Task, speaker: Speaker, batch: IntArray) -> list[Generation]:
        choices = self.writer.choices(task)
        if self.constrained:
            answers = [choices[name] for name in speaker.choose(batch)]
        else:
            answers = [self.writer.read(tokens) for tokens in speaker.write(batch)]
        if not self._ranks(task):
            return [Generation(answer) for answer in answers]
        ranked = [tuple((choices[name], round(score, 4)) for name, score in names)
                  for names in speaker.rank(batch, self.ranked)]  # fmt: skip
        return [Generation(*pair) for pair in zip(answers, ranked, strict=True)]

    def _ranks(self, task: Task) -> bool:
        return bool(self.ranked) and task in RANKED_TASKS

    def _speaker(self, task: Task, prompts: Texts) -> Speaker:
        needs_names = self.constrained or self._ranks(task)
        return Speaker(
            self.encoder,
            prompts,
            end_id=self.writer.end_id(),
            stop_ids=self.writer.stop_ids(),
            max_new_tokens=self.max_new_tokens,
            names=NameTrie(self.writer.answer_tokens(task)) if needs_names else None,
        )
