"""The published recipe, written straightforwardly: the baseline of the measurements. METHOD.md §5, §7.

A step takes 24 directed triples in four padded passes: queries (h, r), tails, heads (computed with gradients and never
used), and the completion of 4 of the 24. Every text is padded to the longest of its pass, every pass computes the logits
of the whole vocabulary at every position, and the negatives are the other tails of the batch. The temperature stays where
it starts. Left out is the mask of known triples, which never fired (§7.1).

It is given what it never had: texts tokenised once, and the adapters, precision and fused attention of our own encoder.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm.config import ObjectiveSettings
from pykalm.model.encoder import Encoder, pooled
from pykalm.text.texts import IntArray, Texts
from pykalm.text.verbalize import Verbalizer

BATCH_SIZE = 24
"""Directed triples in a step; both directions of a triple are examples, so a step is 12 triples' worth of training."""

COMPLETIONS = 4
"""Directed triples of a step whose completion is trained."""

IGNORED = -100
"""The label of a token without loss, as the Hugging Face models have it."""


@dataclass(frozen=True, eq=False)
class PaddedTexts:
    """Hold N texts as a matrix (N, longest), padded at the right; lengths (N,)."""

    token_ids: Tensor
    mask: Tensor
    lengths: Tensor

    @property
    def num_tokens(self) -> int:
        """Return how many tokens a pass computes, padding included."""
        return self.token_ids.numel()


def pad(texts: Texts, *, pad_token: int, device: torch.device) -> PaddedTexts:
    """Pad texts at the right to the longest of them."""
    padded, lengths = torch.from_numpy(texts.padded()).long().to(device), torch.from_numpy(texts.lengths).to(device)
    mask = padded >= 0
    return PaddedTexts(padded.masked_fill(~mask, pad_token), mask.long(), lengths)


@dataclass(frozen=True)
class PublishedStep:
    """Hold the losses of a step and the tokens it computed: all of them, and those that were not padding."""

    loss: float
    explicit: float
    implicit: float
    num_tokens: int
    num_real_tokens: int


@dataclass(frozen=True, eq=False)
class PublishedRecipe:
    """Compute steps of the published recipe with the model inside an encoder.

    verbalizer: of the published wording. skip_unused: leave out the pass over the heads and the logits of the passes that
    are only pooled; the gradients are the same.
    """

    encoder: Encoder
    verbalizer: Verbalizer
    objective: ObjectiveSettings
    skip_unused: bool = False

    def gradient(self, directed: IntArray, completed: IntArray) -> PublishedStep:
        """Add the gradient of L = L_exp + λ · L_imp to every parameter; directed (B, 3), completed (M, 3).

        Relations are in [0, 2R). Every text is built, padded and moved here, as a data loader would.
        """
        words = self.verbalizer
        texts = [words.queries(directed[:, 0], directed[:, 1]), words.candidates(directed[:, 2])]
        texts += [] if self.skip_unused else [words.candidates(directed[:, 0])]
        passes = [self._pad(some) for some in texts]
        completions = words.completions(*completed.T)
        written = self._pad(completions.texts)

        query, tails, *_ = [self._embed(some) for some in passes]
        explicit = self._explicit(query, tails)
        implicit = self._implicit(written, completions.answer_starts)
        total = explicit + self.objective.implicit_weight * implicit
        total.backward()  # type: ignore[no-untyped-call]
        return PublishedStep(
            float(total.detach()),
            float(explicit.detach()),
            float(implicit.detach()),
            num_tokens=sum(some.num_tokens for some in [*passes, written]),
            num_real_tokens=sum(int(some.lengths.sum()) for some in [*passes, written]),
        )

    def _pad(self, texts: Texts) -> PaddedTexts:
        return pad(texts, pad_token=pad_token(self.verbalizer), device=self.encoder.device)

    def _embed(self, texts: PaddedTexts) -> Tensor:
        """Return the vectors (N, D) of padded texts, pooled at their last tokens."""
        return pooled(last_states(self.encoder, texts, with_logits=not self.skip_unused))

    def _explicit(self, query: Tensor, tails: Tensor) -> Tensor:
        """Return L_exp over in-batch negatives: true tails on the diagonal, rows and columns in turn."""
        pairs = torch.arange(len(query), device=query.device)
        scores = (query @ tails.T - self.objective.margin * torch.eye(len(query), device=query.device)) / (
            self.objective.temperature
        )
        return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2

    def _implicit(self, texts: PaddedTexts, answer_starts: IntArray) -> Tensor:
        """Return L_imp as the model itself computes it from labels."""
        places = torch.arange(texts.token_ids.shape[1], device=texts.mask.device)
        is_prompt = places < torch.from_numpy(answer_starts).to(places.device)[:, None]
        labels = texts.token_ids.masked_fill(is_prompt | (texts.mask == 0), IGNORED)
        with self.encoder.precision():
            loss: Tensor = self.encoder.causal_lm(
                input_ids=texts.token_ids, attention_mask=texts.mask, labels=labels, use_cache=False
            ).loss
        return loss


def last_states(encoder: Encoder, texts: PaddedTexts, *, with_logits: bool) -> Tensor:
    """Return the last layer's states (N, D) at the last tokens of padded texts, each text padded to the longest.

    with_logits: go through the whole causal LM, output head included, as the published code does.
    """
    arguments: dict[str, Any] = {"input_ids": texts.token_ids, "attention_mask": texts.mask, "use_cache": False}
    with encoder.precision():
        if with_logits:
            states: Tensor = encoder.causal_lm(**arguments, output_hidden_states=True).hidden_states[-1]
        else:
            states = encoder.causal_lm.base_model(**arguments)[0]
    return states[torch.arange(len(states), device=states.device), texts.lengths - 1]


def pad_token(verbalizer: Verbalizer) -> int:
    """Return the token that fills rows up; which one does not matter, for nothing sees it."""
    found = verbalizer.tokenizer.pad_token_id
    return verbalizer.end_token_id() if found is None else int(found)


def draw_step(directed: IntArray, generator: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Draw a step's 24 of all directed triples (2N, 3), and 4 of the 24 to complete."""
    chosen = directed[generator.choice(len(directed), size=min(BATCH_SIZE, len(directed)), replace=False)]
    return chosen, chosen[:COMPLETIONS]
