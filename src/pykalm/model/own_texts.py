"""What the base model writes on its own, and what it would have written next: training is held to it. docs/method.md §4."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
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
TEXTS_AT_ONCE = 4
"""Texts whose logits (V wide, float32) a thread holds at the same time."""
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

    progress: is called with (tokens done, tokens in all), all drawn and then read, by any thread, one at a time. Raises
    ModelError where its probabilities are no numbers, OutOfMemoryError.
    """
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    length = min(length, positions) if isinstance(positions, int) and positions > 0 else length
    num_likely = min(num_likely, causal_lm.get_output_embeddings().weight.shape[0] - 1)
    tally = Tally(num_texts * (2 * length - 1), progress)
    counts = [
        len(part) for part in np.array_split(np.arange(num_texts), PARTS.get(causal_lm.device.type, 1)) if len(part)
    ]
    seeds = np.random.SeedSequence(seed).generate_state(len(counts)).tolist()
    pens = [Pen(count, length, seed, tally) for count, seed in zip(counts, seeds, strict=True)]

    def write(pen: Pen) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad(), _precision(causal_lm):
            tokens = _written(causal_lm, start, pen)
            parts = []
            for part in torch.split(tokens, TEXTS_AT_ONCE):
                tally.add(part.numel())
                parts.append(_distributions(causal_lm, part, num_likely))
        likely, log_p = map(torch.cat, zip(*parts, strict=True))
        return tokens.cpu(), likely, log_p

    with (
        explained_memory(REMEDY),
        _reading(causal_lm, length) as at_once,
        closing(side_by_side(write, pens, at_once=at_once, stop=tally.stop)) as written,
    ):
        tokens, likely, log_p = (torch.cat(column).numpy() for column in zip(*written, strict=True))
    return OwnTexts(tokens.astype(np.int32), likely.astype(np.int32), log_p.astype(np.float16))


@contextmanager
def _reading(causal_lm: Any, length: int) -> Iterator[int]:
    """Let a model write as it is, in eval mode and by no settings of its maker's; yields how many threads may do so at once."""
    was_training, makers = causal_lm.training, causal_lm.generation_config
    causal_lm.eval()
    causal_lm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def write_two() -> None:
        with _precision(causal_lm):
            _written(causal_lm, 0, Pen(1, 2, 0, Tally(2, None)))

    try:
        alone = causal_lm.device.type != "cpu" or length < 2 or moves_what_is_shared(causal_lm, write_two)
        yield 1 if alone else torch.get_num_threads()
    finally:
        causal_lm.generation_config = makers
        causal_lm.train(was_training)


def _precision(causal_lm: Any) -> torch.autocast:
    """Return the context in which a model computes as its weights are."""
    return computing_in(next(causal_lm.parameters()).dtype, causal_lm.device)


class Stopped(Exception):
    """Says that a text need not be written to its end."""


class Tally:
    """Count what several threads do, of so many tokens in all, tell of it, and let all stop together."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.done, self.lock, self.is_stopped = 0, Lock(), False

    def add(self, tokens: int) -> None:
        """Count tokens more; raises Stopped once that is asked for."""
        if self.is_stopped:
            raise Stopped
        with self.lock:
            self.done = min(self.total, self.done + tokens)  # on a GPU `generate` may draw once more than it needs
            if self.progress is not None:
                self.progress(self.done, self.total)

    def stop(self) -> None:
        """Let no thread go on."""
        self.is_stopped = True


class Pen(LogitsProcessor):
    """Draw every next token of N texts from the model's distribution as it is.

    As `generate` draws, but by one random number a text instead of one a word, which are a third of the work on a CPU.
    """

    def __init__(self, count: int, length: int, seed: int, tally: Tally) -> None:
        self.count, self.length, self.tally = count, length, tally
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores (N, V) that leave one token, drawn from those given; input_ids (N, tokens so far)."""
        self.tally.add(self.count)
        taken = drawn(scores.cpu(), self.generator).to(scores.device)
        return cast(torch.FloatTensor, torch.full_like(scores, -torch.inf).scatter_(-1, taken, 0.0))


def drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a token (N, 1) drawn from each distribution (N, V), on a CPU. Raises ModelError where one is of no numbers."""
    below = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = below[:, -1:]
    if not total.isfinite().all():
        raise ModelError(
            "wanted probabilities of next tokens, found some that are no numbers. The weights are damaged, or too large for "
            "bfloat16: try training.precision=fp32."
        )
    number = torch.rand(total.shape, generator=generator, dtype=torch.float64) * total
    # The first token whose sum is above the number, so never one of probability 0.
    return torch.searchsorted(below, number, right=True).clamp_max(logits.shape[-1] - 1)


def _written(causal_lm: Any, start: int, pen: Pen) -> torch.Tensor:
    """Return tokens (N, L), every one after the first drawn by the pen."""
    first = torch.full((pen.count, 1), start, dtype=torch.long, device=causal_lm.device)
    if pen.length == 1:
        return first
    # No token ends a text: what follows an end is the model's own distribution too.
    config = GenerationConfig(max_new_tokens=pen.length - 1, do_sample=False, pad_token_id=start)  # type: ignore[no-untyped-call]
    tokens: torch.Tensor = causal_lm.generate(
        input_ids=first,
        attention_mask=torch.ones_like(first),
        generation_config=config,
        logits_processor=LogitsProcessorList([pen]),
    )
    return tokens


def _distributions(causal_lm: Any, tokens: torch.Tensor, num_likely: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest next tokens (n, L, K) at every token, and log-probabilities (n, L, K + 1).

    Read anew, as training reads them: what a model says while it writes, from a cache, is something else in some families.
    """
    logits = causal_lm(input_ids=tokens, use_cache=False).logits.float()
    likely = logits.topk(num_likely, dim=-1).indices
    return likely.cpu(), lumped_log_p(logits, likely).cpu()


def lumped_log_p(logits: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (..., K + 1) of the tokens `likely` (..., K), and last of all others as one token.

    logits (..., V), float32. A token that a model never says has LEAST, and no gradient.
    """
    rest = logits.scatter(-1, likely, NOTHING).logsumexp(-1, keepdim=True)
    # Over K + 1 tokens, of which the last stands for all others, the normalisation is that over all.
    return torch.cat([logits.gather(-1, likely), rest], dim=-1).log_softmax(-1).clamp_min(LEAST)
