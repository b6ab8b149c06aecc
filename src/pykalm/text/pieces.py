"""From pieces of texts to token ids: pieces are tokenised apart, and joined they read like one text."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from pykalm.text.texts import Texts, TokenIds

NEUTRAL = ("\n", "|", ".")
"""Characters to stand before a piece that is not the first of its text; the first that joins no word is taken."""

PIECES_AT_ONCE = 1 << 14
"""Pieces whose tokens are Python lists at the same time; those of millions of entities would not fit."""


class PieceTokenizer:
    """Tokenise pieces of texts with a fast tokenizer, special tokens in them being read as plain characters.

    Some tokenizers (Llama 2, Mistral: those made with SentencePiece) put a space before whatever they are given. It
    belongs to the first piece of a text only. All others are given behind a neutral character, whose tokens are then
    dropped. `opening` (n,) are the special tokens that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.opening = _opening_tokens(tokenizer)
        self._neutral = self._find_neutral()
        self._fingerprint: str | None = None

    def tokens(self, texts: Iterable[str], *, is_first: bool, limit: int | None) -> Texts:
        """Return the token ids of every piece, cut at `limit` tokens; is_first: the pieces begin their texts."""
        pieces, found = iter(texts), []
        while some := list(islice(pieces, PIECES_AT_ONCE)):
            ids = self._plain(some) if is_first or not self._neutral else self._apart(some)
            found.append(Texts.of([np.asarray(tokens[:limit], dtype=np.int64) for tokens in ids]))
        return Texts.chain(found)

    def fingerprint(self) -> str:
        """Return a sha256 over all that decides token ids: vocabulary, merges, normaliser, added, opening, end tokens.

        Truncation and padding, which some callers set on a tokenizer, are left out: they are never used here.
        """
        if self._fingerprint is None:
            content = {**json.loads(self._tokenizer.backend_tokenizer.to_str()), "truncation": None, "padding": None}
            everything = [content, self._tokenizer.eos_token_id, self.opening.tolist()]
            self._fingerprint = hashlib.sha256(json.dumps(everything).encode()).hexdigest()
        return self._fingerprint

    def _find_neutral(self) -> str:
        """Return a character to put before pieces, or "" where a piece has the same tokens wherever it stands."""
        probes = ["a", " a"]
        for neutral in NEUTRAL:
            behind = self._behind(probes, neutral)
            if None not in behind:
                return neutral if behind != self._plain(probes) else ""
        return ""

    def _apart(self, pieces: Sequence[str]) -> list[list[int]]:
        """Return the tokens of pieces that do not begin their texts."""
        behind = self._behind(pieces, self._neutral)
        joined = [place for place, ids in enumerate(behind) if ids is None]
        plain = dict(zip(joined, self._plain([pieces[place] for place in joined]), strict=True))
        return [plain[place] if ids is None else ids for place, ids in enumerate(behind)]

    def _plain(self, pieces: Sequence[str]) -> list[list[int]]:
        return self._encode(pieces)["input_ids"] if pieces else []

    def _behind(self, pieces: Sequence[str], neutral: str) -> list[list[int] | None]:
        """Return the tokens of pieces that stand behind a character, None where it shares a token with the piece."""
        encoded = self._encode([neutral + piece for piece in pieces], return_offsets_mapping=True)
        found: list[list[int] | None] = []
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            start = next((place for place, (_, end) in enumerate(offsets) if end > 1), len(ids))
            is_joined = start < len(ids) and offsets[start][0] < 1
            found.append(None if is_joined else ids[start:])
        return found

    def _encode(self, pieces: Sequence[str], **wanted: bool) -> Any:
        return self._tokenizer(
            list(pieces), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, **wanted
        )


def _opening_tokens(tokenizer: Any) -> TokenIds:
    """Return the special tokens that the tokenizer puts before a text (a begin-of-text token, for some models)."""
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    opening = full[: next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)]
    return np.asarray(opening, dtype=np.int64)
