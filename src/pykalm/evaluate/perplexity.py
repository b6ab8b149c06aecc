"""Perplexity of a causal language model on plain texts, by a sliding window. docs/measures.md.

A window reads at most `window` tokens and counts the last `stride` of those that it predicts, the first window all of them:
every token is predicted once, from at least window − stride + 1 tokens before it (or all there are, a begin-of-text token
first). With stride = window these are the windows of lm-eval's perplexity tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm.errors import ModelError, UsageError
from pykalm.evaluate.corpora import Corpus, Document
from pykalm.memory import explained_memory
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.likelihood import part_of
from pykalm.model.own_texts import first_token
from pykalm.model.sharding import give_back
from pykalm.model.side_by_side import side_by_side
from pykalm.text.texts import IntArray, TokenIds
from pykalm.text.trie import build_trie, row_group

WINDOW = 1024
"""Tokens of a window where no other number is asked for, or the positions of the model where these are fewer."""

LOGITS_AT_ONCE = 1 << 25
"""Logits, float32, that are held at the same time: 128 MB."""


@dataclass(frozen=True)
class Window:
    """Hold the tokens that a model reads, and the targets: what the last of these tokens predict, one each."""

    inputs: TokenIds
    targets: TokenIds


@dataclass(frozen=True)
class Perplexity:
    """Hold the summed log-likelihood (nats) of the counted tokens of a text, and what it is divided by."""

    log_likelihood: float
    num_words: int
    num_tokens: int
    num_bytes: int
    num_documents: int
    window: int
    stride: int

    def per(self, count: int) -> float | None:
        """Return e to the mean negative log-likelihood of `count` pieces; None where that is beyond any number."""
        mean = -self.log_likelihood / count
        return math.exp(mean) if mean < 700 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the perplexities per word, token and byte, and what they were measured with."""
        counts = {"word": self.num_words, "token": self.num_tokens, "byte": self.num_bytes}
        return {name: self.per(count) for name, count in counts.items()} | asdict(self)


def measure_perplexity(
    encoder: Encoder,
    tokenizer: Any,
    corpus: Corpus,
    *,
    window: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure the perplexity of a text, or of its beginning of at most limit_tokens tokens, cut between words.

    window: 1024 by default, or as many as the model has positions; stride: the window by default. Raises UsageError for
    a window or stride that cannot be, ModelError where a likelihood is no number or the tokenizer has neither a begin
    nor an end token to start from.
    """
    window, stride = choose_window(encoder, window, stride)
    prefix = first_token(tokenizer)
    texts = _tokenize(tokenizer, _limited(tokenizer, corpus.documents, limit_tokens))
    total, done, likelihood = sum(len(tokens) for _, tokens in texts), 0, 0.0
    for _, tokens in texts:
        windows = cut_windows(tokens, prefix, window=window, stride=stride)
        for part in _parts(windows, max(1, encoder.chunk_tokens // window) * torch.get_num_threads()):
            likelihood += log_likelihood(encoder, part)
            done += sum(len(one.targets) for one in part)
            if progress is not None:
                progress(done, total)
    if not math.isfinite(likelihood):
        raise ModelError(
            f"{corpus.name}: wanted likelihoods that are numbers, found {likelihood}. The weights are damaged: take an "
            "earlier checkpoint."
        )
    documents = [document for document, _ in texts]
    words, size = (sum(getattr(one, name) for one in documents) for name in ("num_words", "num_bytes"))
    return Perplexity(likelihood, words, total, size, len(documents), window, stride)


def choose_window(encoder: Encoder, window: int | None, stride: int | None) -> tuple[int, int]:
    """Return window and stride, the defaults where None is given. Raises UsageError where a model cannot take them."""
    positions = getattr(encoder.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and positions > 0 else None
    window = min(WINDOW, most or WINDOW) if window is None else window
    stride = window if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise UsageError(f"wanted 1 ≤ stride ≤ window, found stride {stride} and window {window}.")
    if most is not None and window > most:
        raise UsageError(f"wanted a window of at most {most} tokens (max_position_embeddings), found {window}.")
    return window, stride


def cut_windows(tokens: TokenIds, prefix: int, *, window: int, stride: int) -> list[Window]:
    """Cut N tokens into windows that predict each of them once, the first one from the prefix."""
    read = np.concatenate([[prefix], tokens])  # read[i] stands before tokens[i]
    ends = [*range(min(window, len(tokens)), len(tokens), stride), len(tokens)]
    starts = [0, *ends[:-1]]
    return [
        Window(read[max(0, end - window) : end], tokens[start:end]) for start, end in zip(starts, ends, strict=True)
    ]


@torch.no_grad()
def log_likelihood(encoder: Encoder, windows: Sequence[Window]) -> float:
    """Return Σ log p of the targets of some windows, which are read side by side; sums in float64. In eval mode."""
    trie = build_trie([window.inputs for window in windows], row_tokens=1, share=False)
    lasts = [
        path[: len(window.inputs)][-len(window.targets) :] for path, window in zip(trie.paths, windows, strict=True)
    ]
    nodes, targets = np.concatenate(lasts), np.concatenate([window.targets for window in windows])
    was_training = encoder.training
    encoder.eval()
    chunks = trie.chunks(encoder.chunk_tokens)
    at_once = encoder.chunks_at_once(len(chunks))

    def read(rows: IntArray) -> float:
        group = row_group(trie, rows)
        which, places = group.find(nodes)
        chosen = (torch.from_numpy(part).to(encoder.device) for part in (places, targets[which]))
        return _summed_log_p(encoder, encoder(group, shared=False), *chosen, room=part_of(LOGITS_AT_ONCE, at_once))

    try:
        with explained_memory("Take a smaller --window, or lower training.chunk_tokens."):
            return sum(side_by_side(read, chunks, at_once=at_once))
    finally:
        give_back(encoder)
        encoder.train(was_training)


def _summed_log_p(encoder: Encoder, states: Tensor, places: Tensor, targets: Tensor, *, room: int) -> float:
    """Return Σ log p of targets (P,) under the states (rows, D) at `places` (P,), with `room` for so many logits."""
    step = max(1, room // int(encoder.causal_lm.get_output_embeddings().weight.shape[0]))
    losses = [
        F.cross_entropy(encoder.logits(states[places[start : start + step]]), targets[start : start + step], reduction="none")
        for start in range(0, len(places), step)
    ]  # fmt: skip
    return -float(torch.cat(losses).double().sum())


def _limited(tokenizer: Any, documents: Sequence[Document], limit: int | None) -> list[Document]:
    """Return the first documents that have at most `limit` tokens together, the last of them cut between words."""
    if limit is None:
        return list(documents)
    if limit < 1:
        raise UsageError(f"wanted a limit of at least one token, found {limit}. Leave it out to read all.")
    chosen: list[Document] = []
    for document in documents:
        kept = document.cut(limit, lambda text: len(_token_ids(tokenizer, text)))
        limit -= len(_token_ids(tokenizer, kept.text))
        chosen += [kept] if kept.text else []
        if kept != document:
            break
    if not chosen:
        raise UsageError("wanted a limit that lets one word pass, found none. Raise --limit-tokens.")
    return chosen


def _tokenize(tokenizer: Any, documents: Sequence[Document]) -> list[tuple[Document, TokenIds]]:
    """Return the documents that have tokens, with these."""
    texts = [(document, _token_ids(tokenizer, document.text)) for document in documents]
    return [(document, tokens) for document, tokens in texts if len(tokens)]


def _token_ids(tokenizer: Any, text: str) -> TokenIds:
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def _parts(windows: Sequence[Window], size: int) -> list[Sequence[Window]]:
    return [windows[start : start + size] for start in range(0, len(windows), size)]
