"""The token trie: all texts of a batch, every distinct prefix once, laid out so that one integer a token is the mask."""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pykalm.text.texts import IntArray, SmallIntArray, Texts, TokenIds, ranges, sorted_rows, starts_of

EVEN_ROWS = 1.02
"""Length of a row, as a multiple of the mean, into which pieces can be packed as a rule."""


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """Hold N texts as a trie of T nodes, depth-first, cut into rows. METHOD.md §6.

    token_ids, depths (T,): the token of a node, and its distance from the root, which is its position id.
    ends (T,): the index just after the last descendant. Node i sees node j ⇔ j ≤ i < ends[j]; that is the whole mask.
    twins (T,): the node that stands for all of the same prefix; another one where a cut repeats it.
    row_starts (rows + 1,): row k is the nodes row_starts[k] : row_starts[k + 1]; no node sees beyond its row.
    paths (N, longest): the node of every token of every text, in the order the texts were given; −1 past its end.
    lengths (N,): tokens of every text.
    shared: False where every row is one text on its own, so that a plain causal pass computes it.
    """

    token_ids: SmallIntArray
    depths: SmallIntArray
    ends: SmallIntArray
    twins: SmallIntArray
    row_starts: IntArray
    paths: SmallIntArray
    lengths: IntArray
    shared: bool

    @property
    def num_nodes(self) -> int:
        """Return T, the number of tokens in rows; those that rows repeat may be computed once."""
        return len(self.token_ids)

    @property
    def row_lengths(self) -> IntArray:
        """Return the number of nodes of every row."""
        return np.diff(self.row_starts)

    def last_nodes(self) -> IntArray:
        """Return the node of the last token of every text (N,): where it is pooled."""
        return self.paths[np.arange(len(self.lengths)), self.lengths - 1].astype(np.int64)

    def fill(self, max_tokens: int, width: Callable[[int, int], int] = lambda rows, longest: longest) -> float:
        """Return the share of nodes among the tokens that a pass over chunks of max_tokens computes, padding included.

        width: of (rows, longest), the tokens to which so many rows are padded, the longest of which has so many.
        """
        chunks = self.chunks(max_tokens)
        computed = (len(rows) * width(len(rows), int(self.row_lengths[rows].max())) for rows in chunks)
        return self.num_nodes / sum(computed)

    def rows_of(self, nodes: IntArray) -> IntArray:
        """Return the row of every given node."""
        return np.searchsorted(self.row_starts, nodes, side="right") - 1

    def chunks(self, max_tokens: int, rows: IntArray | None = None) -> list[IntArray]:
        """Group rows (all by default), long ones first, so that a padded group holds at most max_tokens (one row at least).

        A group is padded to its longest row; rows of like length stand together, so that little is padded.
        """
        return self.parts(1, max_tokens, np.arange(len(self.row_lengths)) if rows is None else rows)

    def parts(self, count: int, max_tokens: int, rows: IntArray) -> list[IntArray]:
        """Group rows, long ones first, into `count` parts whose tokens differ by about a row.

        Or into more, so that a part, padded to its longest row, holds at most max_tokens (one row at least).
        """
        rows = rows[np.argsort(-self.row_lengths[rows], kind="stable")]
        ends = np.cumsum(self.row_lengths[rows])
        middles = ends - self.row_lengths[rows] / 2
        parts: list[IntArray] = []
        start, done = 0, 0
        while start < len(rows):
            share = done + (int(ends[-1]) - done) / max(1, count - len(parts))
            fit = max(1, max_tokens // int(self.row_lengths[rows[start]]))
            end = max(start + 1, min(start + fit, int(np.searchsorted(middles, share))))
            parts.append(np.sort(rows[start:end]))
            start, done = end, int(ends[end - 1])
        return parts


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Hold some rows of a trie side by side (rows, width), as a model takes them; `nodes` and `twins` are −1 in padding.

    ends count from the start of the row; padding sees itself only, so that no softmax is empty.
    """

    token_ids: IntArray
    depths: IntArray
    ends: IntArray
    nodes: IntArray
    twins: IntArray

    def find(self, nodes: IntArray) -> tuple[IntArray, IntArray]:
        """Return, for those of the given nodes that lie in the group, their places in `nodes` and in the flattened group."""
        flat = self.nodes.ravel()
        places = np.flatnonzero(flat >= 0)  # rows come in order, so the nodes there ascend
        at = np.minimum(np.searchsorted(flat[places], nodes), len(places) - 1)
        inside = np.flatnonzero(flat[places[at]] == nodes)
        return inside, places[at[inside]]

    def paths_to(self, places: IntArray) -> tuple[IntArray, IntArray]:
        """Return the places (n,) of all tokens of P texts that end at given places, and where each text starts there (P + 1,).

        A row holds the whole path of every text that ends in it, and a token is on it where the last one sees it.
        """
        rows, columns = np.divmod(places, self.ends.shape[1])
        on_path = (np.arange(self.ends.shape[1]) <= columns[:, None]) & (self.ends[rows] > columns[:, None])
        text, column = np.nonzero(on_path)
        return rows[text] * self.ends.shape[1] + column, starts_of(on_path.sum(axis=1))


def build_trie(texts: Texts | Sequence[TokenIds], *, row_tokens: int, share: bool = True) -> TokenTrie:
    """Build the trie of N texts (each at least one token), in rows of at most row_tokens, or of one longer text.

    Sorted, a text shares its longest common prefix with its predecessor; what it adds are its nodes, so the sorted order
    is the depth-first order, of the whole and of the pieces into which it is cut to fill rows. With share=False every
    distinct text is a row of its own. Raises ValueError on an empty text.
    """
    texts = Texts.of(texts)
    lengths = texts.lengths
    if len(texts) == 0 or lengths.min() < 1:
        raise ValueError("a trie needs at least one text, and every text at least one token")
    tokens = texts.padded()
    order = sorted_rows(tokens)
    tokens, in_order = tokens[order], lengths[order]
    shared = _common_prefixes(tokens, in_order)
    row_tokens = row_tokens if share else 0
    starts, uncut = _cut(shared, in_order, row_tokens), shared.copy()
    shared[starts] = 0
    sizes = np.add.reduceat(in_order - shared, starts)
    pieces, row_starts = _pack_evenly(sizes, row_tokens)
    packed = ranges(starts[pieces], np.diff(np.append(starts, len(order)))[pieces])
    row_starts = starts_of(sizes[pieces])[row_starts]
    trie = _lay_out(tokens[packed], order[packed], lengths, shared[packed], row_starts=row_starts, is_shared=share)
    return replace(trie, twins=_twins(trie, order, uncut)) if len(starts) > 1 else trie


def row_group(trie: TokenTrie, rows: IntArray) -> RowGroup:
    """Lay rows of a trie side by side, padded to the longest of them."""
    lengths, width = trie.row_lengths[rows], int(trie.row_lengths[rows].max())
    columns = np.arange(width)
    inside = columns < lengths[:, None]
    starts = trie.row_starts[rows][:, None]
    nodes = np.where(inside, starts + columns, -1)
    return RowGroup(
        token_ids=np.where(inside, trie.token_ids[nodes], np.int64(0)),
        depths=np.where(inside, trie.depths[nodes], np.int64(0)),
        ends=np.where(inside, trie.ends[nodes] - starts, columns + 1),
        nodes=nodes,
        twins=np.where(inside, trie.twins[nodes], np.int64(-1)),
    )


def _common_prefixes(tokens: SmallIntArray, lengths: IntArray) -> IntArray:
    """Return how many first tokens each sorted text shares with the one before it."""
    differs = tokens[1:] != tokens[:-1]
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), lengths[1:])
    return np.concatenate([[0], np.minimum(first, lengths[1:])])


def _cut(shared: IntArray, lengths: IntArray, row_tokens: int) -> IntArray:
    """Return the first text of every piece, where the sorted texts are cut into pieces that each fit into a row.

    A cut makes its text repeat its path from the root. Of all ways to cut, one that repeats the fewest tokens: a shortest
    path, in which the best last cut before every text is a minimum over a window, kept as an ascending queue.
    """
    new, repeated, longest = (lengths - shared).tolist(), shared.tolist(), np.maximum(lengths, row_tokens).tolist()
    last_cut = [0] * len(new)
    best: deque[tuple[int, int, int]] = deque()  # tokens repeated up to here, the cut, nodes up to which it may reach
    cost = total = 0
    for text, nodes in enumerate(new):
        cost += repeated[text]
        while best and best[-1][0] >= cost:
            best.pop()
        best.append((cost, text, total - repeated[text] + longest[text]))
        total += nodes
        while best[0][2] < total:
            best.popleft()
        cost, last_cut[text], _ = best[0]
    starts, text = [], len(new) - 1
    while text >= 0:
        starts.append(last_cut[text])
        text = last_cut[text] - 1
    return np.array(starts[::-1], dtype=np.int64)


def _pack_evenly(sizes: IntArray, row_tokens: int) -> tuple[IntArray, IntArray]:
    """Pack pieces into rows; where they fit into as many shorter ones, into these, so that the last is not left short."""
    full = _pack(sizes, row_tokens)
    shorter = math.ceil(EVEN_ROWS * sizes.sum() / (len(full[1]) - 1))
    even = _pack(sizes, shorter) if shorter < row_tokens else full
    return even if len(even[1]) == len(full[1]) else full


def _pack(sizes: IntArray, row_tokens: int) -> tuple[IntArray, IntArray]:
    """Return the order in which pieces fill the rows, and the place there of every row's first and of the end.

    A row takes the longest piece that is left, then ever again the longest that still fits.
    """
    waiting: dict[int, list[int]] = {}
    for piece, size in reversed(list(enumerate(sizes.tolist()))):
        waiting.setdefault(size, []).append(piece)
    left = sorted(waiting)
    order, row_starts = [], [0]
    while left:
        room = max(row_tokens, left[-1])
        while place := bisect_right(left, room):
            size = left[place - 1]
            order.append(waiting[size].pop())
            if not waiting[size]:
                del left[place - 1]
            room -= size
        row_starts.append(len(order))
    return np.array(order, dtype=np.int64), np.array(row_starts, dtype=np.int64)


def _lay_out(
    tokens: SmallIntArray,
    order: IntArray,
    lengths: IntArray,
    shared: IntArray,
    *,
    row_starts: IntArray,
    is_shared: bool,
) -> TokenTrie:
    """Number the nodes of the texts in their order and read off depths, ends and paths, in matrices (texts, longest)."""
    depth = np.arange(tokens.shape[1], dtype=np.int32)
    is_new = (depth >= shared[:, None]) & (tokens >= 0)
    text_starts = starts_of(lengths[order] - shared)
    num_nodes = int(text_starts[-1])
    first_node = text_starts[:-1, None].astype(np.int32)
    nodes = np.where(is_new, first_node + (depth - shared[:, None].astype(np.int32)), np.int32(-1))

    # A text sees, at every depth, the node laid down last: along the sorted texts that is a running maximum.
    np.maximum.accumulate(nodes, axis=0, out=nodes)
    paths = np.empty_like(nodes)
    paths[order] = np.where(tokens >= 0, nodes, np.int32(-1))

    # A node ends where the next text branches off at its depth or above: a running minimum from the back.
    ends = np.full((len(tokens), len(depth)), num_nodes, dtype=np.int32)
    np.copyto(ends[:-1], first_node[1:], where=depth >= shared[1:, None])
    np.minimum.accumulate(ends[::-1], axis=0, out=ends[::-1])
    return TokenTrie(
        token_ids=tokens[is_new],
        depths=np.broadcast_to(depth, tokens.shape)[is_new],
        ends=ends[is_new],
        twins=np.arange(num_nodes, dtype=np.int32),
        row_starts=row_starts,
        paths=paths,
        lengths=lengths,
        shared=is_shared,
    )


def _twins(trie: TokenTrie, order: IntArray, shared: IntArray) -> SmallIntArray:
    """Return the twins of a trie that is cut; shared: how many first tokens each sorted text shares with the one before it.

    A text lays down what it does not share; those after it find at every depth what was laid down last.
    """
    paths, twins = trie.paths[order], trie.twins.copy()
    depth = np.arange(paths.shape[1], dtype=np.int32)
    text = np.where(depth >= shared[:, None], np.arange(len(paths), dtype=np.int32)[:, None], np.int32(0))
    np.maximum.accumulate(text, axis=0, out=text)
    inside = paths >= 0
    twins[paths[inside]] = paths[text, depth][inside]
    return twins
