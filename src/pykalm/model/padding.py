"""How prompts stand in a batch: what they have in common in front, then padding, then what each has of its own."""

import numpy as np

from pykalm.text.texts import IntArray, Texts, TokenIds


def left_padded(texts: Texts, *, prefix: TokenIds, filler: int) -> tuple[IntArray, IntArray]:
    """Return token ids and mask (B, W) of texts that begin with a prefix: the prefix, then padding, then their rest.

    The mask is 0 at the padding, which no token sees; its running sum gives the positions.
    """
    rest = texts.lengths - len(prefix)
    width = len(prefix) + int(rest.max())
    columns = np.arange(width)
    is_rest = columns >= (width - rest)[:, None]
    token_ids = np.full((len(texts), width), filler, dtype=np.int64)
    token_ids[:, : len(prefix)] = prefix
    token_ids[is_rest] = np.concatenate([text[len(prefix) :] for text in texts])
    return token_ids, (is_rest | (columns < len(prefix))).astype(np.int64)


def common_prefix(texts: Texts) -> TokenIds:
    """Return the tokens that all texts begin with, all but the last of the shortest at most."""
    padded = texts.padded()[:, : max(0, int(texts.lengths.min()) - 1)]
    differs = (padded != padded[:1]).any(axis=0)
    return padded[0, : int(np.argmax(differs)) if differs.any() else padded.shape[1]].astype(np.int64)
