"""What the base model writes on its own, and what it would have written next: training is held to it. docs/method.md §4."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pykalm.errors import ModelError, RunError
from pykalm.files import replace_file
from pykalm.memory import explained_memory
from pykalm.model.encoder import Progress
from pykalm.model.layers import computing_in
from pykalm.model.side_by_side import moves_what_is_shared, side_by_side
from pykalm.text.texts import IntArray, Texts, starts_of

NUM_TEXTS = 128
LENGTH = 64
"""Tokens of a text, the first, from which it is written, among them; fewer where a model has fewer positions."""
PARTS = {"cpu": 4}
"""Texts are written in so many parts, several at a time on a CPU; at once elsewhere."""
NUM_LIKELY = 128
"""Next tokens whose probabilities are kept; those of all others are kept as one sum."""
LEAST = -1e4
"""Log-probability that stands for none, which half precision can hold."""
NOTHING = -1e30
"""Logit that stands for none; finite, so that a sum of such ones has a gradient (of zero)."""
REMEDY = "Take another model, or set objective.kl_weight=0: then nothing holds it to its language."


@dataclass(frozen=True, eq=False)
class OwnTexts:
    """Hold N texts of L tokens that a model wrote, and its next-token distributions at every token of them.

    tokens (N, L); likely (N, L, K): the K likeliest next tokens; log_p (N, L, K + 1): their log-probabilities (nats), and last
    that of all others together.
    """

    tokens: npt.NDArray[np.int32]
    likely: npt.NDArray[np.int32]
    log_p: npt.NDArray[np.float16]

    @staticmethod
    def none() -> "OwnTexts":
        """Return no texts."""
        nothing = np.zeros((0, 0, 1))
        return OwnTexts(nothing[..., 0].astype(np.int32), nothing[..., :0].astype(np.int32), nothing.astype(np.float16))

    def __len__(self) -> int:
        """Return N."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Return L."""
        return int(self.tokens.shape[1])

    def texts(self, numbers: IntArray) -> Texts:
        """Return some of the texts."""
        return Texts(self.tokens[numbers].ravel(), starts_of(np.full(len(numbers), self.length, dtype=np.int64)))

    def distributions(self, numbers: IntArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
        """Return the likeliest next tokens (T, K) and log-probabilities (T, K + 1) at all tokens of some texts."""
        count, num_likely = len(numbers) * self.length, self.likely.shape[-1]
        return self.likely[numbers].reshape(count, num_likely), self.log_p[numbers].reshape(count, num_likely + 1)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the texts and their distributions."""
        parts = (np.ascontiguousarray(part).tobytes() for part in (self.tokens, self.likely, self.log_p))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def save(self, file: Path) -> None:
        """Write the texts to a file, whole or not at all. Raises TrainingError where that cannot be done."""

        def write(draft: Path) -> None:
            with draft.open("wb") as handle:
                np.savez(handle, tokens=self.tokens, likely=self.likely, log_p=self.log_p)

        replace_file(file, write)

    @staticmethod
    def load(file: Path) -> "OwnTexts":
        """Read the texts of a file. Raises RunError where it is missing or damaged."""
        try:
            with np.load(file) as arrays:
                texts = OwnTexts(*(arrays[name] for name in ("tokens", "likely", "log_p")))
            (num_texts, length), num_likely = texts.tokens.shape, texts.likely.shape[-1]
            shapes = texts.likely.shape, texts.log_p.shape
            if shapes != ((num_texts, length, num_likely), (num_texts, length, num_likely + 1)):
                raise ValueError(f"arrays of shapes {texts.tokens.shape}, {shapes}")
            return texts
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(
                f"{file}: wanted the base model's own texts, to which this training is held (objective.kl_weight), found "
                f"none that can be read ({error}). Bring the file back, or train anew."
            ) from error


def first_token(tokenizer: Any) -> int:
    """Return the token from which the first one of a text is predicted: begin of text or, without one, end of text.

    Raises ModelError without either.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError("wanted a tokenizer with a begin or end token, found neither. Set bos_token in its configuration.")


def write_own_texts(
    causal_lm: Any,
    start: int,
    *,
    seed: int,
    num_texts: int = NUM_TEXTS,
    length: int = LENGTH,
    num_likely: int = NUM_LIKELY,
    progress: Progress | None = None,
) -> OwnTexts:
    """Let a causal LM write texts at its own temperature from the token `start`, drawn by seed; no adapter may be on it.

    progress: is called with (tokens done, tokens in all), by any thread. Raises ModelError where its probabilities are no
    numbers, OutOfMemoryError.
    """
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    length = min(length, positions) if isinstance(positions, int) and positions > 0 else length
    num_likely = min(num_likely, causal_lm.get_output_embeddings().weight.shape[0] - 1)
    tally = Tally(num_texts * length, progress)
    counts = [
        len(part) for part in np.array_split(np.arange(num_texts), PARTS.get(causal_lm.device.type, 1)) if len(part)
    ]
    pens = [
        Pen(count, length, num_likely, torch.Generator(causal_lm.device).manual_seed(part_seed), tally)
        for count, part_seed in zip(
            counts, np.random.SeedSequence(seed).generate_state(len(counts)).tolist(), strict=True
        )
    ]
    with explained_memory(REMEDY), _reading(causal_lm) as at_once:
        written = side_by_side(partial(_written, causal_lm, start), pens, at_once=at_once)
        with closing(written):
            tokens = torch.cat(list(written))
    likely, log_p = (torch.cat([pen.column(which) for pen in pens]).numpy() for which in (0, 1))
    return OwnTexts(tokens.numpy().astype(np.int32), likely.astype(np.int32), log_p.astype(np.float16))


@contextmanager
def _reading(causal_lm: Any) -> Iterator[int]:
    """Let a model read as it is, in eval mode and by no settings of its maker's; yields how many threads may do so at once."""
    was_training, makers = causal_lm.training, causal_lm.generation_config
    causal_lm.eval()
    causal_lm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        if causal_lm.device.type != "cpu" or moves_what_is_shared(causal_lm):
            yield 1
        else:
            yield torch.get_num_threads()
    finally:
        causal_lm.generation_config = makers
        causal_lm.train(was_training)


class Tally:
    """Count tokens that several threads write, of so many in all, and tell of them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.done, self.lock = 0, Lock()

    def add(self, tokens: int) -> None:
        """Count tokens more."""
        with self.lock:
            self.done += tokens
            if self.progress is not None:
                self.progress(self.done, self.total)


class Pen(LogitsProcessor):
    """Draw every next token of N texts from the model's distribution as it is, and keep that distribution.

    As `generate` draws, but by one random number a text instead of one a word, which are most of the work on a CPU.
    """

    def __init__(self, count: int, length: int, num_likely: int, generator: torch.Generator, tally: Tally) -> None:
        self.count, self.length, self.num_likely, self.generator, self.tally = (
            count,
            length,
            num_likely,
            generator,
            tally,
        )
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores (N, V) that leave one token, drawn from those given; input_ids (N, tokens so far)."""
        if len(self.kept) < self.length:  # on a GPU `generate` may ask once more before it sees that it is done
            self.kept.append(_distribution(scores, self.num_likely))
            self.tally.add(self.count)
        taken = torch.full_like(scores, -torch.inf).scatter_(-1, drawn(scores, self.generator), 0.0)
        return cast(torch.FloatTensor, taken)

    def column(self, which: int) -> torch.Tensor:
        """Return of every token the likeliest next ones (N, L, K), or their log-probabilities (N, L, K + 1), as in OwnTexts."""
        return torch.stack([token[which] for token in self.kept], dim=1)


def drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a token (N, 1) drawn from each distribution (N, V). Raises ModelError where one is of no numbers."""
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # of which MPS has none
    below = logits.softmax(-1).cumsum(-1, dtype=exact)
    total = below[:, -1:]
    if not total.isfinite().all():
        raise ModelError(
            "wanted probabilities of next tokens, found some that are no numbers. The weights are damaged, or too large for "
            "bfloat16: try training.precision=fp32."
        )
    number = torch.rand(total.shape, generator=generator, dtype=exact, device=logits.device) * total
    # The first token whose sum is above the number: never one of probability 0.
    return torch.searchsorted(below, number, right=True).clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def _written(causal_lm: Any, start: int, pen: Pen) -> torch.Tensor:
    """Return tokens (N, L), every one after the first drawn by the pen."""
    first = torch.full((pen.count, 1), start, dtype=torch.long, device=causal_lm.device)
    # No token ends a text: what follows an end is the model's own distribution too. One more token than asked for is drawn,
    # since the last one's distribution is wanted too.
    config = GenerationConfig(max_new_tokens=pen.length, do_sample=False, pad_token_id=start)  # type: ignore[no-untyped-call]
    with computing_in(next(causal_lm.parameters()).dtype, causal_lm.device):
        tokens: torch.Tensor = causal_lm.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            generation_config=config,
            logits_processor=LogitsProcessorList([pen]),
        )
    return tokens[:, : pen.length].cpu()


def _distribution(logits: torch.Tensor, num_likely: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest next tokens (N, K) by logits (N, V), and log-probabilities (N, K + 1)."""
    likely = logits.topk(num_likely, dim=-1).indices
    return likely.cpu(), lumped_log_p(logits, likely).cpu()


def lumped_log_p(logits: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (..., K + 1) of the tokens `likely` (..., K), and last of all others as one token.

    logits (..., V), float32. A token that a model never says has LEAST, and no gradient.
    """
    rest = logits.scatter(-1, likely, NOTHING).logsumexp(-1, keepdim=True)
    # Over K + 1 tokens, of which the last stands for all others, the normalisation is that over all.
    return torch.cat([logits.gather(-1, likely), rest], dim=-1).log_softmax(-1).clamp_min(LEAST)
