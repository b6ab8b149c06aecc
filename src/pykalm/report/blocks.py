"""What a section of the report page is made of: plain values, which the template alone turns into HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pykalm.report.drawing import Drawing


@dataclass(frozen=True)
class Row:
    """Hold the cells of a table's row, as text; a heading has one, over all columns."""

    cells: tuple[str, ...]
    is_emphasised: bool = False
    is_heading: bool = False


@dataclass(frozen=True)
class Table:
    """Hold a table; the first `num_texts` columns are words, the others numbers.

    With a summary it is folded away: that line is shown, and the table when the line is opened.
    """

    kind: ClassVar[str] = "table"
    headings: tuple[str, ...]
    rows: Sequence[Row]
    caption: str = ""
    num_texts: int = 1
    summary: str = ""

    @property
    def is_wordy(self) -> bool:
        """Return whether it holds no column of numbers."""
        return self.num_texts >= len(self.headings)


@dataclass(frozen=True)
class Figures:
    """Hold drawings that stand side by side where there is room, with a sentence below them."""

    kind: ClassVar[str] = "figures"
    drawings: Sequence[Drawing]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """Hold a PNG file that someone else has drawn, as base64."""

    kind: ClassVar[str] = "picture"
    base64: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Note:
    """Hold a sentence."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Missing:
    """Say what was not measured and the command lines that measure it."""

    kind: ClassVar[str] = "missing"
    text: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """Hold numbered lines, the legend of a matrix."""

    kind: ClassVar[str] = "listing"
    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Commands:
    """Hold command lines, to be copied."""

    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True)
class Reply:
    """Hold what one model wrote, and whether a right answer was in it."""

    label: str
    text: str
    is_right: bool


@dataclass(frozen=True)
class Case:
    """Hold one question, the answer that was wanted, and what each model wrote.

    before and after: what stands around the question in the last line of its prompt, the same for all of a task;
    prompt: the whole of it where more was asked than these show.
    """

    task: str
    before: str
    question: str
    after: str
    prompt: str
    gold: str
    others: str
    replies: tuple[Reply, ...]
    is_right: bool


@dataclass(frozen=True)
class Cases:
    """Hold the questions of the case studies."""

    kind: ClassVar[str] = "cases"
    cases: Sequence[Case]


Block = Table | Figures | Picture | Note | Missing | Listing | Commands | Cases


@dataclass(frozen=True)
class Section:
    """Hold a section: `name` is its place in links, `lead` says what is to be seen."""

    name: str
    title: str
    lead: str
    blocks: Sequence[Block]

    @property
    def is_empty(self) -> bool:
        """Return whether it only says how to make its content."""
        return all(isinstance(block, Missing) for block in self.blocks)

    def drawings(self) -> list[Drawing]:
        """Return the drawings of all its figures."""
        return [drawing for block in self.blocks if isinstance(block, Figures) for drawing in block.drawings]


@dataclass(frozen=True)
class Headline:
    """Hold a number that leads the page, before and after alignment."""

    title: str
    before: str
    after: str
    note: str = ""
