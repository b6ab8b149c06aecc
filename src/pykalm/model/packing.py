"""The check at the start: does this model, with our mask, read a trie as it reads the texts one by one?"""

import logging

import numpy as np
import torch

from pykalm.errors import ModelError
from pykalm.model.encoder import Encoder
from pykalm.model.pretrained import vocabulary_size
from pykalm.text.trie import TokenIds
from pykalm.text.verbalize import Verbalizer

log = logging.getLogger(__name__)

# Largest distance of two unit vectors of one text. Rounding moves a 135M model by 6e-7 in float32 and 0.03 in bfloat16;
# a wrong mask, position or window moves some text by 0.6 or more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
CHECKED_TRIPLES = 12


def packed_difference(encoder: Encoder, texts: list[TokenIds]) -> float:
    """Return the largest distance between the vectors of N texts in one trie and in separate passes."""
    was_packed, was_row_tokens = encoder.packed, encoder.row_tokens
    try:
        encoder.packed, encoder.row_tokens = True, max(was_row_tokens, sum(map(len, texts)) // 2)
        packed = encoder.embed(texts)
        encoder.packed = False
        separate = encoder.embed(texts)
    finally:
        encoder.packed, encoder.row_tokens = was_packed, was_row_tokens
    return float((packed - separate).norm(dim=1).max())


def choose_passes(encoder: Encoder, verbalizer: Verbalizer) -> None:
    """Let the encoder share prefixes where its model reads a trie exactly; else let it take separate passes and say so.

    Real texts of the graph are read both ways. METHOD.md §6.
    """
    texts = _sample_texts(verbalizer)
    _require_room(encoder, texts)
    name = type(encoder.causal_lm).__name__
    try:
        difference = packed_difference(encoder, texts)
    except torch.OutOfMemoryError:
        raise  # says nothing about the mask
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        log.info("%s takes no attention mask of its own (%s)", name, error)
        difference = float("inf")
    encoder.packed = difference <= TOLERANCE[encoder.compute_dtype]
    if not encoder.packed:
        log.warning(
            "%s does not read a token trie as it reads separate texts (vectors differ by %.2g); taking separate passes: "
            "same result, slower.", name, difference,
        )  # fmt: skip


@torch.no_grad()
def require_own_logits(encoder: Encoder, verbalizer: Verbalizer) -> None:
    """Raise ModelError where the logits that L_imp is computed from are not those that the model itself gives.

    Some families scale or bend their logits after the output head; one that does so in a way unknown here must not be
    trained on something else than it generates from. Compared in eval mode, in which the encoder is left.
    """
    encoder.eval()
    text = torch.from_numpy(verbalizer.prompt(0, 0))[None].to(encoder.device)
    enabled = encoder.compute_dtype == torch.bfloat16
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=enabled):
        own = encoder.causal_lm(input_ids=text, use_cache=False).logits[0].float()
        states = encoder.causal_lm.base_model(input_ids=text, use_cache=False)[0][0]
    difference = float((encoder.logits(states) - own).abs().max() / own.abs().max().clamp_min(1e-6))
    if not difference < TOLERANCE[encoder.compute_dtype]:
        raise ModelError(
            f"{type(encoder.causal_lm).__name__} changes its logits after the output head in a way that kalm does not know "
            f"(they differ by {difference:.2g} of the largest). Train with objective.implicit=false, or report the model."
        )


def _sample_texts(verbalizer: Verbalizer) -> list[TokenIds]:
    """Return queries, candidates and completions of a few triples, spread over the graph."""
    graph = verbalizer.graph
    triples = graph.triples("train")
    rows = triples[np.linspace(0, len(triples) - 1, min(len(triples), CHECKED_TRIPLES)).astype(int)]
    heads, relations, tails = rows.T
    return [
        *verbalizer.queries(heads, relations),
        *verbalizer.queries(heads, np.roll(relations, 1)),
        *verbalizer.candidates(np.unique(np.concatenate([heads, tails]))),
    ]


def _require_room(encoder: Encoder, texts: list[TokenIds]) -> None:
    """Raise ModelError where texts have tokens that the model does not know, as with a tokenizer of another model."""
    largest, known = max(int(text.max()) for text in texts), vocabulary_size(encoder.causal_lm)
    if largest >= known:
        raise ModelError(
            f"{type(encoder.causal_lm).__name__}: wanted token ids below {known}, found {largest}. The tokenizer does not "
            "belong to the model; keep both in one folder."
        )
