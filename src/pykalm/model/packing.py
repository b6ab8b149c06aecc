"""The check at the start: does this model, with our mask, read a trie as it reads the texts one by one?"""

import itertools
import logging
import math
from dataclasses import dataclass

import numpy as np
import torch

from pykalm.errors import ModelError
from pykalm.memory import is_out_of_memory
from pykalm.model.attention import FLEX
from pykalm.model.encoder import Encoder
from pykalm.model.last_layer import can_be_narrowed
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.model.pretrained import vocabulary_size
from pykalm.model.sharding import give_back
from pykalm.processes import any_of
from pykalm.text.texts import Texts, TokenIds
from pykalm.text.trie import RowGroup, build_trie, row_group
from pykalm.text.verbalize import Verbalizer

log = logging.getLogger(__name__)

# A trie may move a text's vector by four times what another grouping of the texts moves it, which is rounding alone, and
# by FLOOR. Right masks stay below 1.5 times; a wrong mask, position or window moves some text by 0.1 or more, where in
# bfloat16 rounding moves it by 0.02 (both measured on tiny models of ten families; rounding of a real 135M model: 0.07).
# Few or even texts may be rounded alike in every grouping. Then rounding is also what a trie of one text does to it, but only
# so much: there a wrong window or position shows too.
NOISE_FACTOR = 4.0
MOST_NOISE_OF_ONE = {torch.float32: 0.0, torch.bfloat16: 0.02}
FLOOR = {torch.float32: 1e-3, torch.bfloat16: torch.finfo(torch.bfloat16).eps}
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# What models raise that do not take a mask of ours. A compiler of GPU kernels, as FlexAttention needs it, raises anything.
REFUSALS: dict[bool, tuple[type[Exception], ...]] = {
    False: (TypeError, ValueError, RuntimeError, AttributeError, KeyError),
    True: (Exception,),
}
CHECKED_TRIPLES = 3
SEARCHED_TRIPLES = 256
LONGEST_TEXTS = 2
QUERIES_A_ROW = 2.75
ROW_STEP = 32  # a row of another length is padded to it in attention (unpadded.LANES)


def packed_difference(encoder: Encoder, texts: list[TokenIds]) -> tuple[float, float]:
    """Return the largest distance between the vectors of N texts in one trie and each alone, and that of rounding.

    Rounding is what moves a vector when a text is read in a padded group of texts, or in a trie of its own, instead of alone.
    """
    alone, noise = _read_alone(encoder, texts)
    return _largest_distance(_read_packed(encoder, texts), alone), max(noise, _noise_of_one(encoder, texts, alone))


def _read_packed(encoder: Encoder, texts: list[TokenIds]) -> torch.Tensor:
    """Embed texts in one trie of two rows at most, so that many of them share a row."""
    row_tokens = max(encoder.row_tokens, sum(map(len, texts)) // 2)
    return _embed_as(encoder, texts, packed=True, row_tokens=row_tokens, chunk_tokens=encoder.chunk_tokens)


def _read_alone(encoder: Encoder, texts: list[TokenIds]) -> tuple[torch.Tensor, float]:
    """Embed every text alone; return the vectors, and how far rounding moves one when it is read in a padded group."""
    # All at once, also where a pass holds one text only, or nothing would be rounded; and one token, that is one text.
    ways = (max(encoder.chunk_tokens, sum(map(len, texts))), 1)
    grouped, alone = (
        _embed_as(encoder, texts, packed=False, row_tokens=encoder.row_tokens, chunk_tokens=tokens) for tokens in ways
    )
    return alone, _largest_distance(grouped, alone)


def _noise_of_one(encoder: Encoder, texts: list[TokenIds], alone: torch.Tensor) -> float:
    """Return how far rounding moves a text that is read in a trie of its own, with the attention in use and nothing spared."""
    most = MOST_NOISE_OF_ONE[encoder.compute_dtype]
    sizes = {"row_tokens": encoder.row_tokens, "chunk_tokens": encoder.chunk_tokens}
    spared = encoder.reads_unpadded, encoder.narrows
    try:
        encoder.reads_unpadded = encoder.narrows = False
        vectors = [_embed_as(encoder, [text], packed=True, **sizes) for text in texts] if most else [alone]
    finally:
        encoder.reads_unpadded, encoder.narrows = spared
    return min(most, _largest_distance(torch.cat(vectors), alone))


def _largest_distance(vectors: torch.Tensor, others: torch.Tensor) -> float:
    return float((vectors - others).norm(dim=1).max())


@dataclass(eq=False)
class Allowance:
    """Decide whether texts are read as they are read alone, by an attention.

    alone (N, D): vectors of the texts read alone; noise: what rounding moves one in a padded group. That of tries of one text,
    which are as many passes as texts, is measured where it decides.
    """

    encoder: Encoder
    texts: list[TokenIds]
    alone: torch.Tensor
    noise: float
    of_one_is_known: bool = False

    @property
    def most(self) -> float:
        """Return the largest distance that is allowed by the noise that is known."""
        return largest_allowed(self.encoder, self.noise)

    def allows(self, distance: float) -> bool:
        """Return whether a distance is no more than rounding explains."""
        decides = distance > self.most and math.isfinite(distance) and not self.of_one_is_known
        if any_of([decides])[0]:  # all processes read, or none
            self.of_one_is_known = True
            self.noise = max(self.noise, _noise_of_one(self.encoder, self.texts, self.alone))
        return distance <= self.most


def largest_allowed(encoder: Encoder, noise: float) -> float:
    """Return the distance up to which a trie is read as separate texts are, where rounding moves them by `noise`."""
    return NOISE_FACTOR * noise + FLOOR[encoder.compute_dtype]


def _embed_as(
    encoder: Encoder, texts: list[TokenIds], *, packed: bool, row_tokens: int, chunk_tokens: int
) -> torch.Tensor:
    """Embed texts with other passes than the encoder's own, which it keeps, by their last tokens: a mean would hide much."""
    kept = encoder.packed, encoder.row_tokens, encoder.chunk_tokens, encoder.pooling
    try:
        encoder.packed, encoder.row_tokens, encoder.chunk_tokens = packed, row_tokens, chunk_tokens
        encoder.pooling = "last"
        return encoder.embed(texts)
    finally:
        encoder.packed, encoder.row_tokens, encoder.chunk_tokens, encoder.pooling = kept


def suit_rows(encoder: Encoder, verbalizer: Verbalizer) -> None:
    """Let a row hold QUERIES_A_ROW mean queries of the graph where these are long, but no more than a pass holds.

    In shorter rows an entity of several queries is cut into several rows, and read again in each. Measured: docs/log.md.
    """
    queries = _texts_of(verbalizer, SEARCHED_TRIPLES, completions=False)[0].lengths
    wanted = ROW_STEP * round(QUERIES_A_ROW * float(queries.mean()) / ROW_STEP)
    encoder.row_tokens = min(max(encoder.row_tokens, wanted), max(encoder.row_tokens, encoder.chunk_tokens))


def choose_passes(encoder: Encoder, verbalizer: Verbalizer) -> None:
    """Let the encoder share prefixes where its model reads a trie exactly; else let it take separate passes and say so.

    Real texts of the graph are read alone, with the model's own attention, and in a trie, with the fastest attention
    that gives the same vectors, or with the model's own; where that can be, without padding. METHOD.md §6.
    """
    texts = _sample_texts(verbalizer)
    _require_known_tokens(encoder, texts)
    name, own = type(encoder.causal_lm).__name__, encoder.attention
    alone, noise = _read_alone(encoder, texts)
    if encoder.wanted_attention == "flex" and FLEX not in encoder.faster_attentions():
        log.warning(
            "kalm: training.attention=flex needs CUDA and a model made for it, found %s on %s; taking its own: same result, "
            "slower.", name, encoder.device.type,
        )  # fmt: skip
    encoder.reads_unpadded = encoder.narrows = False
    for attention in (*encoder.faster_attentions(), own):
        encoder.use_attention(attention)
        allowance = Allowance(encoder, texts, alone, noise)
        difference, encoder.packed = _difference_from(encoder, texts, allowance)
        if encoder.packed and attention == FLEX:
            (refuses,) = any_of([not _learns_like(encoder, own, texts)])  # in any process
            encoder.packed = not refuses
        if encoder.packed:
            _spare_what_can_be(encoder, texts, allowance)
            return
        if attention == FLEX:
            log.warning("kalm: %s does not read a token trie exactly by FlexAttention; taking %s: slower.", name, own)
    log.warning(
        "kalm: %s cannot share what texts begin with: its vectors would be %.2g away from those of texts read alone (%.2g "
        "allowed). Taking separate passes: same result, slower.", name, difference, allowance.most,
    )  # fmt: skip


def _spare_what_can_be(encoder: Encoder, texts: list[TokenIds], allowance: Allowance) -> None:
    """Let the model read rows end to end, and its last layer in part, where it then reads texts as it reads them alone."""
    ways = itertools.product(
        (True, False) if encoder.attention == MATMUL_ATTENTION else (False,),
        (True, False) if encoder.device.type == "cpu" and can_be_narrowed(encoder.causal_lm) else (False,),
    )
    for encoder.reads_unpadded, encoder.narrows in ways:
        if not (encoder.reads_unpadded or encoder.narrows) or _reads_sparing(encoder, texts, allowance):
            return


def _reads_sparing(encoder: Encoder, texts: list[TokenIds], allowance: Allowance) -> bool:
    """Return whether the model reads texts so as it reads them alone; tried on short rows, many in a pass."""
    try:
        vectors = _embed_as(encoder, texts, packed=True, row_tokens=1, chunk_tokens=sum(map(len, texts)))
        return allowance.allows(_largest_distance(vectors, allowance.alone))
    except REFUSALS[False] as error:
        if is_out_of_memory(error):
            raise
        log.info("%s cannot be read so (%s)", type(encoder.causal_lm).__name__, error)
        return False


def _difference_from(encoder: Encoder, texts: list[TokenIds], allowance: Allowance) -> tuple[float, bool]:
    """Return the largest distance of the texts' vectors in one trie from those read alone, and whether that is allowed.

    The distance is inf where a trie is refused.
    """
    try:
        difference = _largest_distance(_read_packed(encoder, texts), allowance.alone)
        return difference, allowance.allows(difference)
    except REFUSALS[encoder.attention == FLEX] as error:
        if is_out_of_memory(error):
            raise  # says nothing about the mask
        log.info(
            "%s takes no attention mask of its own with %s (%s)",
            type(encoder.causal_lm).__name__,
            encoder.attention,
            error,
        )
        return math.inf, False


def _learns_like(encoder: Encoder, own: str, texts: list[TokenIds]) -> bool:
    """Return whether the attention in use can train, and gives the learned weights the gradient that another gives them."""
    trie = build_trie(texts, row_tokens=encoder.row_tokens)
    group, used = row_group(trie, trie.chunks(1)[0]), encoder.attention
    learned = [weight for weight in encoder.trainable().values() if weight is not encoder.log_inverse_temperature]
    gradients = []
    try:
        for attention in (own, used):
            encoder.use_attention(attention)
            states = encoder(group, shared=True)
            weights = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
            found = torch.autograd.grad((states.float() * weights).sum(), learned, allow_unused=True)
            gradients.append(torch.cat([part.float().flatten() for part in found if part is not None]))
        _pass_in_training(encoder, group)
    except REFUSALS[True] as error:
        if is_out_of_memory(error):
            raise
        log.info("%s has no gradient here (%s)", used, error)
        return False
    wanted, found_instead = gradients
    return float((found_instead - wanted).norm()) <= GRADIENT_TOLERANCE[encoder.compute_dtype] * float(wanted.norm())


@torch.no_grad()
def _pass_in_training(encoder: Encoder, group: RowGroup) -> None:
    """Raise what a model raises in train mode only, as where its attention has dropout, which FlexAttention has not."""
    was_training, cuda = encoder.training, [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            encoder.train()(group, shared=True)
        finally:
            encoder.train(was_training)


@torch.no_grad()
def require_own_logits(encoder: Encoder, verbalizer: Verbalizer) -> None:
    """Raise ModelError where the logits that L_imp and L_kl are computed from are not those that the model itself gives.

    Some families scale or bend their logits after the output head; one that does so in a way unknown here must not be
    trained on something else than it generates from. Compared in eval mode, in which the encoder is left.
    """
    encoder.eval()
    states, own = encoder.own_logits(torch.from_numpy(verbalizer.prompt(0, 0)).to(encoder.device))
    difference = float((encoder.logits(states) - own).abs().max() / own.abs().max().clamp_min(1e-6))
    give_back(encoder)
    if not difference < LOGIT_TOLERANCE[encoder.compute_dtype]:
        raise ModelError(
            f"{type(encoder.causal_lm).__name__} changes its logits after the output head in a way that kalm does not know "
            f"(they differ by {difference:.2g} of the largest). Train with objective.implicit=false and "
            "objective.kl_weight=0, or report the model."
        )


def require_room(encoder: Encoder, verbalizer: Verbalizer, *, completions: bool) -> None:
    """Raise ModelError where a text of the graph can be longer than the model has positions.

    Cheap where the cuts leave room enough; else the longest query, candidate and completion are looked for.
    """
    settings = verbalizer.settings
    longest = max(map(len, _sample_texts(verbalizer, completions=completions)))
    cuts = settings.max_entity_tokens + settings.max_relation_tokens + completions * settings.max_answer_tokens
    try:
        encoder.require_room(longest + cuts)
    except ModelError:
        encoder.require_room(_longest_text(verbalizer, completions=completions))


def _longest_text(verbalizer: Verbalizer, *, completions: bool) -> int:
    """Return the tokens of the longest text that the graph's entities and relations can be put into."""
    graph = verbalizer.graph
    entities, relations = np.arange(graph.num_entities), np.arange(2 * graph.num_relations)
    candidates = verbalizer.candidates(entities).lengths
    head = np.argmax(candidates)
    queries = verbalizer.queries(np.full_like(relations, head), relations).lengths
    asked = np.full_like(entities, head), np.full_like(entities, np.argmax(queries))
    answers = [verbalizer.completions(*asked, entities).texts.lengths] if completions else []
    return int(np.concatenate([candidates, queries, *answers]).max())


def _sample_texts(verbalizer: Verbalizer, *, completions: bool = True) -> list[TokenIds]:
    """Return queries, candidates and completions of a few triples spread over the graph, and the longest of many.

    No completions where the tokenizer has no end token, with which they would end: a run without them is possible.
    """
    spread, searched = (_texts_of(verbalizer, number, completions) for number in (CHECKED_TRIPLES, SEARCHED_TRIPLES))
    longest = [texts.select(np.argsort(texts.lengths, kind="stable")[-LONGEST_TEXTS:]) for texts in searched]
    return list(Texts.chain([*spread, *longest]))


def _texts_of(verbalizer: Verbalizer, num_triples: int, completions: bool) -> list[Texts]:
    """Return the queries, candidates and completions of so many training triples."""
    triples = verbalizer.graph.triples("train")
    rows = triples[np.linspace(0, len(triples) - 1, min(len(triples), num_triples)).astype(int)]
    heads, relations, tails = rows.T
    can_end = completions and verbalizer.tokenizer.eos_token_id is not None
    return [
        Texts.chain([verbalizer.queries(heads, relations), verbalizer.queries(heads, np.roll(relations, 1))]),
        verbalizer.candidates(np.unique(np.concatenate([heads, tails]))),
        verbalizer.completions(heads, relations, tails).texts if can_end else Texts.of([]),
    ]


def _require_known_tokens(encoder: Encoder, texts: list[TokenIds]) -> None:
    """Raise ModelError where texts have tokens that the model does not know, as with a tokenizer of another model."""
    largest, known = max(int(text.max()) for text in texts), vocabulary_size(encoder.causal_lm)
    if largest >= known:
        raise ModelError(
            f"{type(encoder.causal_lm).__name__}: wanted token ids below {known}, found {largest}. The tokenizer does not "
            "belong to the model; keep both in one folder."
        )
