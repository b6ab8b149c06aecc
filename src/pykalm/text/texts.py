"""Many texts as token ids in two flat arrays, so that a batch of them is put together without a loop over texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
SmallIntArray = npt.NDArray[np.int32]
TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Texts:
    """Hold the token ids of N texts: text i is tokens[offsets[i] : offsets[i + 1]]. Reads like a list of arrays.

    tokens (T,) are int32, half the memory, since there may be millions of texts; offsets (N + 1,) start with 0.
    """

    tokens: SmallIntArray
    offsets: IntArray

    @staticmethod
    def of(texts: "Texts | Sequence[TokenIds]") -> "Texts":
        """Return a list of texts in this form; what has it already is returned as it is."""
        if isinstance(texts, Texts):
            return texts
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *texts]).astype(np.int32)
        return Texts(tokens, starts_of(lengths))

    @staticmethod
    def chain(parts: Sequence["Texts"]) -> "Texts":
        """Return the texts of all parts, one part after the other."""
        lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(part.lengths for part in parts)])
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(part.tokens for part in parts)])
        return Texts(tokens, starts_of(lengths))

    @staticmethod
    def join(columns: Sequence[tuple["Texts", IntArray]]) -> "Texts":
        """Return N texts, each the tokens of one text of every column in turn; a column names N of its texts by number."""
        starts = np.stack([texts.offsets[numbers] for texts, numbers in columns], axis=1)
        lengths = np.stack([texts.offsets[numbers + 1] for texts, numbers in columns], axis=1) - starts
        offsets = starts_of(lengths.sum(axis=1))
        places = starts_of(lengths.ravel())[:-1].reshape(lengths.shape)
        tokens = np.empty(int(offsets[-1]), dtype=np.int32)
        for column, (texts, _) in enumerate(columns):
            count = lengths[:, column]
            tokens[ranges(places[:, column], count)] = texts.tokens[ranges(starts[:, column], count)]
        return Texts(tokens, offsets)

    def __len__(self) -> int:
        """Return N."""
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> TokenIds:
        """Return one text; raises IndexError beyond the last."""
        if not 0 <= number < len(self):
            raise IndexError(f"wanted a text in [0, {len(self)}), found {number}")
        return self.tokens[self.offsets[number] : self.offsets[number + 1]].astype(np.int64)

    def __iter__(self) -> Iterator[TokenIds]:
        """Yield the texts in order."""
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> IntArray:
        """Return the number of tokens of every text (N,)."""
        return np.diff(self.offsets)

    def select(self, numbers: IntArray) -> "Texts":
        """Return some texts, in the order of their numbers."""
        return Texts.join([(self, numbers)])

    def padded(self) -> SmallIntArray:
        """Return the texts as one matrix (N, longest), −1 past their ends."""
        lengths = self.lengths
        tokens = np.full((len(self), int(lengths.max(initial=0))), -1, dtype=np.int32)
        tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = self.tokens
        return tokens


def sorted_rows(padded: SmallIntArray) -> IntArray:
    """Return the rows of a padded matrix in lexicographic order, equal ones in the order given.

    Big-endian bytes sort as the numbers do; with one added, what is past the end of a text sorts before every token.
    """
    if not padded.size:
        return np.arange(len(padded))
    keys = (padded + 1).astype(">i4")
    return np.argsort(keys.view(f"V{4 * keys.shape[1]}").ravel(), kind="stable")


def starts_of(lengths: IntArray) -> IntArray:
    """Return where each of some pieces starts when they stand one after the other, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """Return starts[0], starts[0] + 1, ... lengths[0] numbers of them, then those from starts[1], and so on."""
    before = starts_of(lengths)
    return np.arange(before[-1]) + np.repeat(starts - before[:-1], lengths)
