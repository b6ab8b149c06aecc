"""Answers that a model writes: in batches, of which no answer depends, with what all prompts begin with computed once."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pykalm.errors import UsageError
from pykalm.memory import explained_memory, is_out_of_memory
from pykalm.model.attention import FLEX
from pykalm.model.encoder import Encoder
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.model.name_trie import NamesOnly, NameTrie
from pykalm.model.packing import REFUSALS
from pykalm.model.padding import common_prefix, left_padded
from pykalm.model.sharding import is_sharded
from pykalm.processes import gather
from pykalm.text.texts import IntArray, Texts

log = logging.getLogger(__name__)

Layout = Literal["shared", "padded", "even"]
LAYOUTS: tuple[Layout, ...] = ("shared", "padded", "even")

MAX_ROWS = 256
"""Answers that are written at once; beams count."""

DEAD = -1e8
"""Beam search marks what is no answer by scores of −10⁹ and below; no name is as unlikely."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06}
"""Distance by which a batch may move the logits of a next token, around 0 and of length 1, and be right. Rounding of a real
135M model in bfloat16 moves them by 0.03 at most, padding that is seen or counted by 0.1 to 0.5 (docs/log.md)."""

MEMORY_REMEDY = "Lower training.chunk_tokens (in the run's config.yaml), the tokens that are computed at once."


@contextmanager
def speaking(encoder: Encoder) -> Iterator[Any]:
    """Let an encoder's model generate for a while: in eval mode, with plain attention, without settings of its maker.

    A model may come with a temperature or a penalty of its own for generation; greedy answers know none. Attention made
    for tries takes no cache, so SDPA stands in for it. Yields the causal LM.
    """
    model, attention, was_training = encoder.causal_lm, encoder.attention, encoder.training
    makers = model.generation_config
    try:
        if attention in (MATMUL_ATTENTION, FLEX):
            encoder.use_attention("sdpa")
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        encoder.eval()
        with torch.no_grad(), encoder.precision():
            yield model
    finally:
        model.generation_config = makers
        encoder.use_attention(attention)
        encoder.train(was_training)


class Speaker:
    """Write answers to N prompts. `batches` are the prompts, by number, that are answered at once, always the same.

    Prompts of a batch are padded at the left, where no token sees the padding and positions do not count it. With the
    layout "shared", what all prompts begin with is computed once and kept as keys and values; padding then stands behind
    it. By default the fastest layout is taken that gives the next token of some prompts the logits that it has when the
    prompt stands alone; "even", where batches have prompts of one length only, always does. Raises ModelError for a prompt
    longer than the model has positions, UsageError where the processes hold parts of the weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        prompts: Texts,
        *,
        end_id: int,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        names: NameTrie | None = None,
        layout: Layout | None = None,
    ) -> None:
        if is_sharded(encoder):
            raise UsageError("wanted whole weights to write answers with, found --use_fsdp. Launch without it.")
        self.encoder, self.prompts, self.names, self.max_new_tokens = encoder, prompts, names, max_new_tokens
        self._longest = int(prompts.lengths.max()) + max(max_new_tokens, names.longest + 1 if names else 0)
        encoder.require_room(self._longest)
        own = encoder.causal_lm.generation_config.eos_token_id
        ends = own if isinstance(own, list) else [] if own is None else [own]
        self.end_id, self.stop_ids = end_id, tuple(sorted({end_id, *stop_ids, *ends}))
        self._prefix = common_prefix(prompts)
        self._cache = self._read_prefix()
        self.layout = self._fastest_layout() if layout is None else layout
        self.batches = self._cut()

    def write(self, batch: IntArray) -> list[list[int]]:
        """Return what the model writes, the likeliest token after the other, with the token at which it stops."""
        written, _ = self._generate(batch, self.layout)
        return [_until(tokens, self.stop_ids) for tokens in written.tolist()]

    def choose(self, batch: IntArray) -> list[int]:
        """Return the name, by number, that the model writes where only tokens that continue one are left to it."""
        written, _ = self._generate(batch, self.layout, names=self.names)
        chosen = [self._name_in(tokens) for tokens in written.tolist()]
        assert None not in chosen, "a constrained answer left the names"
        return [name for name in chosen if name is not None]

    def rank(self, batch: IntArray, k: int) -> list[list[tuple[int, float]]]:
        """Return for every prompt of a batch the k likeliest names, by number, with their log-likelihoods, best first.

        That of all tokens of a name and of its end, found by a beam search over the trie with k beams (2 at least): exact
        where these are as many as the names, else a likely name whose beginning is unlikely may be missed.
        """
        beams = max(2, k)
        num_parts = -(-len(batch) // max(1, self._num_rows(batch) // beams))
        settings = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0, "output_scores": True,
                    "eos_token_id": self.end_id}  # fmt: skip
        found: list[list[tuple[int, float]]] = []
        for part in np.array_split(batch, num_parts):
            written, output = self._generate(part, self.layout, names=self.names, **settings)
            scores = output.sequences_scores.view(len(part), beams).tolist()
            for row, tokens in enumerate(written.view(len(part), beams, -1).tolist()):
                named = zip(map(self._name_in, tokens), scores[row], strict=True)
                found.append([(name, score) for name, score in named if name is not None and score > DEAD][:k])
        return found

    def _name_in(self, tokens: list[int]) -> int | None:
        """Return the name that stands before the end token, or None."""
        assert self.names is not None, "names are chosen where there are some"
        written = _until(tokens, (self.end_id,))
        return self.names.name_at(self.names.find(written[:-1])) if written[-1] == self.end_id else None

    def _generate(
        self, rows: IntArray, layout: Layout, *, names: NameTrie | None = None, **settings: Any
    ) -> tuple[Tensor, Any]:
        """Let transformers continue some prompts in a layout, by names only or freely; return the new tokens and all."""
        prefix = self._prefix if layout == "shared" else self._prefix[:0]
        token_ids, mask = left_padded(self.prompts.select(rows), prefix=prefix, filler=self.end_id)
        width, device = token_ids.shape[1], self.encoder.device
        inputs = {
            "input_ids": torch.from_numpy(token_ids).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
        }
        usual = {
            "eos_token_id": list(self.stop_ids), "pad_token_id": self.end_id, "do_sample": False,
            "return_dict_in_generate": True, "max_new_tokens": names.longest + 1 if names else self.max_new_tokens,
        }  # fmt: skip
        config = GenerationConfig(**(usual | settings))  # type: ignore[no-untyped-call]
        rules = [NamesOnly(names, width, self.end_id, self.stop_ids)] if names else []
        with explained_memory(MEMORY_REMEDY), speaking(self.encoder) as model:
            cache = self._copied_cache(len(rows) * settings.get("num_beams", 1)) if layout == "shared" else {}
            output = model.generate(
                **inputs, **cache, generation_config=config, logits_processor=LogitsProcessorList(rules)
            )
        return output.sequences[:, width:], output

    def _copied_cache(self, rows: int) -> dict[str, Any]:
        """Return the prefix for so many rows: generation writes into what it is given."""
        cache: Any = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return {"past_key_values": cache}

    def _read_prefix(self) -> DynamicCache | None:
        """Return the keys and values of what all prompts begin with, or None where the model's cannot be shared.

        Padding behind the prefix moves it away, which a window would see; states that are no keys and values (mamba)
        have no padding behind them.
        """
        if not len(self._prefix):
            return None
        with explained_memory(MEMORY_REMEDY), speaking(self.encoder) as model:
            token_ids = torch.from_numpy(self._prefix).to(self.encoder.device)[None]
            cache = getattr(model.base_model(input_ids=token_ids, use_cache=True), "past_key_values", None)
        layers = cache.layers if isinstance(cache, DynamicCache) else [None]
        is_plain = all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and self._longest < layer.sliding_window)
            for layer in layers
        )
        return cache if is_plain else None

    def _fastest_layout(self) -> Layout:
        """Return the first layout in which a short, a middling and a long prompt are read as each alone, for all processes."""
        found: list[Layout] = gather(self._right_layout())
        return max(found, key=LAYOUTS.index)

    def _right_layout(self) -> Layout:
        order = np.argsort(self.prompts.lengths, kind="stable")
        rows = order[np.unique([0, len(order) // 2, len(order) - 1])]
        if len(rows) == 1:
            return "even"
        alone = torch.cat([self._first_logits(row, "even") for row in rows[:, None]])
        for layout in LAYOUTS[:-1]:
            if layout == "shared" and self._cache is None:
                continue
            if self._difference(rows, layout, alone) <= TOLERANCE[self.encoder.compute_dtype]:
                return layout
        log.warning(
            "kalm: %s does not read padded prompts as it reads each alone; prompts of one length share a batch: same "
            "answers, slower.", type(self.encoder.causal_lm).__name__,
        )  # fmt: skip
        return "even"

    def _difference(self, rows: IntArray, layout: Layout, alone: Tensor) -> float:
        try:
            return float((self._first_logits(rows, layout) - alone).norm(dim=-1).max())
        except REFUSALS[False] as error:
            if is_out_of_memory(error):
                raise
            log.info("%s takes no layout %s (%s)", type(self.encoder.causal_lm).__name__, layout, error)
            return float("inf")

    def _first_logits(self, rows: IntArray, layout: Layout) -> Tensor:
        """Return the logits (n, V) of the first token of some answers, around 0 and scaled to length 1."""
        logits = self._generate(rows, layout, max_new_tokens=1, output_logits=True)[1].logits[0].float()
        return F.normalize(logits - logits.mean(dim=-1, keepdim=True), dim=-1)

    def _cut(self) -> list[IntArray]:
        """Cut the prompts, long ones first, into batches."""
        left, batches = np.argsort(-self.prompts.lengths, kind="stable"), []
        while len(left):
            batch = left[: self._num_rows(left)]
            if self.layout == "even":
                batch = batch[self.prompts.lengths[batch] == self.prompts.lengths[batch[0]]]
            batches.append(batch)
            left = left[len(batch) :]
        return batches

    def _num_rows(self, rows: IntArray) -> int:
        """Return how many prompts, as long as the longest of some, make chunk_tokens tokens; one at least."""
        shared = len(self._prefix) if self.layout == "shared" else 0
        longest = int(self.prompts.lengths[rows].max()) - shared
        return max(1, min(self.encoder.chunk_tokens // longest, MAX_ROWS))


def _until(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Return the tokens up to the first stop, with it: its text may begin with the answer's last letters."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return list(tokens[: end + 1])
