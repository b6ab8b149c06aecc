"""What the files of a run folder must hold to be shown: their shapes, checked when they are read.

Fields that the page can do without are optional, unknown ones are ignored, so that files of an older or newer version
are shown as far as they go.
"""

from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Matrix = tuple[tuple[float, ...], ...]


class Record(BaseModel):
    """Hold what all shapes share: frozen, unknown keys ignored, only finite numbers."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Step(Record):
    """A line of metrics.jsonl (learn.train.StepReport)."""

    step: Count
    loss: float | None = None
    explicit: float | None = None
    implicit: float | None = None
    kl: float | None = None
    temperature: float | None = None
    valid_mrr: float | None = None
    examples_per_second: float | None = None


class About(Record):
    """What every results file says of itself."""

    graph: str = ""
    split: str = ""
    protocol: str = ""
    model: str = ""
    seed: Count = 0


class Ranking(Record):
    """The metrics of one side of link prediction (evaluate.ranking.RankMetrics)."""

    mr: float = Field(ge=1)
    mrr: Share
    hits_at_1: Share
    hits_at_3: Share
    hits_at_10: Share


class Sides(Record):
    """Link prediction by direction."""

    mean: Ranking
    head: Ranking
    tail: Ranking


class RelationResult(Sides):
    """Link prediction on the triples of one relation."""

    text: str
    num_triples: Count


class LinksResult(About, Sides):
    """links*.json."""

    relations: dict[str, RelationResult] = {}


class Accuracy(Record):
    """Shares of right answers by the three rules."""

    exact: Share
    contains: Share
    any_valid: Share


class QuestionSet(Accuracy):
    """Some questions, with baselines that need no model."""

    num_questions: Count = 0
    baselines: dict[str, Accuracy] = {}


class Scored(Record):
    """Classification by link prediction score, without a word."""

    accuracy: Share


class QuestionTask(QuestionSet):
    """One of the four tasks.

    hard: the same against the negatives that the graph ships; by_score: how well the scores of link prediction classify,
    by kind of negatives; ranked: hits among the likeliest choices, as "hits_at_5".
    """

    hard: QuestionSet | None = None
    by_score: dict[str, Scored] | None = None
    ranked: dict[str, float] | None = None


class QuestionResult(About):
    """qa*.json."""

    tasks: dict[str, QuestionTask]


class Answer(Record):
    """A line of qa*.jsonl: a question, its right answers and what the model wrote."""

    task: str
    head: str = ""
    relation: str = ""
    tail: str = ""
    direction: str | None = None
    source: str | None = None
    prompt: str
    gold: Annotated[str, BeforeValidator(str)]
    valid: tuple[Annotated[str, BeforeValidator(str)], ...] = ()
    answer: str
    any_valid: bool

    def question(self) -> tuple[str | None, ...]:
        """Return what names the question, whichever model answers it."""
        return self.task, self.direction, self.head, self.relation, self.tail, self.source, self.gold


class Perplexity(Record):
    """Perplexity on one text, per word, token and byte."""

    word: float | None = Field(None, gt=0)
    token: float | None = Field(None, gt=0)
    byte: float | None = Field(None, gt=0)
    window: Count | None = None
    stride: Count | None = None
    num_tokens: Count | None = None


class Benchmark(Record):
    """A task of lm-eval."""

    acc: Share
    stderr: float | None = Field(None, ge=0)
    num_questions: Count | None = None


class LanguageResult(About):
    """language*.json."""

    perplexity: dict[str, Perplexity] = {}
    lm_eval: dict[str, Benchmark] = {}


class VectorGroup(Record):
    """Measures of the vectors of one kind of text; spectrum: shares of the eigenvalues, largest first."""

    num_vectors: Count = 0
    alignment: float | None = None
    uniformity: float | None = None
    mean_cosine: float | None = None
    top_eigenvalue_share: float | None = None
    effective_rank: float | None = None
    spectrum: tuple[float, ...] = ()


class Theorem(Record):
    """L_exp − log N by the number of negatives N, and the limit of Theorem 1. docs/method.md §8."""

    num_negatives: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    normalised_loss: tuple[float, ...]
    limit: float
    temperature: float | None = None

    @model_validator(mode="after")
    def check_one_loss_for_each_number(self) -> Self:
        """Refuse curves whose points have no place."""
        if len(self.num_negatives) != len(self.normalised_loss):
            raise ValueError("wanted as many normalised_loss as num_negatives")
        return self


class TripleSimilarity(Record):
    """Cosines (n, m) of queries, in rows, with tails, in columns."""

    queries: tuple[str, ...] = Field(min_length=1)
    tails: tuple[str, ...] = Field(min_length=1)
    matrix: Matrix

    @model_validator(mode="after")
    def check_shape(self) -> Self:
        """Refuse a matrix that its labels do not fit."""
        require_shape(self.matrix, len(self.queries), len(self.tails))
        return self


class SentenceSimilarity(Record):
    """Cosines (n, n) of sentences."""

    labels: tuple[str, ...] = Field(min_length=1)
    matrix: Matrix

    @model_validator(mode="after")
    def check_shape(self) -> Self:
        """Refuse a matrix that its labels do not fit."""
        require_shape(self.matrix, len(self.labels), len(self.labels))
        return self


class Similarities(Record):
    """The two samples whose cosines are drawn."""

    triples: TripleSimilarity | None = None
    sentences: SentenceSimilarity | None = None


class GeometryResult(About):
    """geometry*.json."""

    groups: dict[str, VectorGroup] = {}
    theorem_1: Theorem | None = None
    similarity: Similarities | None = None


class Interval(Record):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class RerankResult(About):
    """rerank*.json: link prediction before and after the top k are scored again by the language model."""

    k: Count
    weight: float
    plain: Ranking
    reranked: Ranking
    difference: dict[str, Interval]


def require_shape(matrix: Matrix, rows: int, columns: int) -> None:
    """Raise ValueError for a matrix that has not so many rows and columns."""
    if len(matrix) != rows or any(len(row) != columns for row in matrix):
        raise ValueError(f"wanted a matrix of {rows} × {columns}, as its labels are")
