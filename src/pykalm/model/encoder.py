"""The encoder: a causal language model that reads token tries, pools their texts, and holds the temperature."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pykalm.errors import ModelError
from pykalm.memory import explained_memory
from pykalm.model import unpadded
from pykalm.model.arrays import on_device
from pykalm.model.attention import BLOCK, FLEX, padded_to_blocks, trie_attention
from pykalm.model.dropout import drawing_from
from pykalm.model.last_layer import narrowed_to
from pykalm.model.layers import computing_in, find_layers
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.model.pooling import POOLINGS
from pykalm.model.sharding import give_back, is_sharded, shard, whole
from pykalm.model.side_by_side import moves_what_is_shared, side_by_side
from pykalm.processes import failing_together, gather_rows, rank, share_out
from pykalm.text.texts import IntArray, Texts, TokenIds, sorted_rows
from pykalm.text.trie import RowGroup, TokenTrie, build_trie, row_group

TEXTS_AT_ONCE = 1 << 16
Progress = Callable[[int, int], None]


class Encoder(nn.Module):
    """Map texts to unit vectors: the last layer's state (after the final norm) at a text's last token. METHOD.md §1.

    With pooling "mean" it is the mean over all tokens of the text. Knows nothing of strings. `packed` says whether the
    texts of a batch share one trie; where a model cannot take its mask, every text is a row of its own. `reads_unpadded`
    says whether the model reads a trie's rows end to end, where its attention can tell them apart, `narrows` whether its last
    layer can be computed in part (last_layer.py). log(1/τ) is a parameter here, so it is optimised and saved with the model.
    In eval mode until a trainer calls train(); dropout then is that of the model's own config, plus the adapter's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source_fingerprint: str,
        temperature: float = 0.05,
        learn_temperature: bool = True,
        precision: Literal["bf16", "fp32"] = "bf16",
        row_tokens: int = 256,
        chunk_tokens: int = 2048,
        packed: bool = True,
        attention: Literal["auto", "sdpa", "flex"] = "auto",
        pooling: Literal["last", "mean"] = "last",
    ) -> None:
        super().__init__()
        self.model = model
        self.source_fingerprint = source_fingerprint
        self.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.row_tokens, self.chunk_tokens, self.packed = row_tokens, chunk_tokens, packed
        self.wanted_attention, self.pooling = attention, pooling
        self.reads_unpadded = self.narrows = False
        self._moves: bool | None = None
        self.is_compiled = False
        device = next(model.parameters()).device
        start = torch.tensor(math.log(1 / temperature), dtype=torch.float32, device=device)
        self.log_inverse_temperature = nn.Parameter(start, requires_grad=learn_temperature)
        self.eval()  # a new module is in train mode, where a model whose config has dropout reads no text the same twice

    @property
    def causal_lm(self) -> Any:
        """Return the Hugging Face causal LM inside the adapter, if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Return where the texts are computed."""
        return self.log_inverse_temperature.device

    @property
    def width(self) -> int:
        """Return D, the width of a vector: that of the states which the output head reads."""
        return int(self.causal_lm.get_output_embeddings().weight.shape[-1])

    @property
    def attention(self) -> str:
        """Return the name that transformers has for the attention in use."""
        return str(self.causal_lm.config._attn_implementation)

    def use_attention(self, name: str) -> None:
        """Compute attention in another way from now on, by the name that transformers has for it."""
        if name != self.attention:
            self.causal_lm.set_attn_implementation(name)

    @property
    def unpadded(self) -> bool:
        """Return whether passes over rows that share a trie compute no padding, but in attention."""
        return self.reads_unpadded and self.attention == MATMUL_ATTENTION and self.device.type == "cpu"

    def faster_attentions(self) -> list[str]:
        """Name what to try before the model's own attention on this device, for models that let it be chosen."""
        can_choose = self.attention == "sdpa" and type(self.causal_lm)._can_set_attn_implementation()
        if not can_choose or self.wanted_attention == "sdpa":
            return []
        if self.device.type == "cuda":
            is_made_for_it = getattr(self.causal_lm, "_supports_flex_attn", False)
            return [FLEX] if is_made_for_it and not is_sharded(self) else []  # its check asks for plain gradients
        return [MATMUL_ATTENTION] if self.device.type == "cpu" and self.wanted_attention == "auto" else []

    def chunks_at_once(self, of: int | None = None) -> int:
        """Return how many chunks, of so many, are computed at the same time: on a CPU one for each of PyTorch's threads.

        One where attention is compiled (FlexAttention holds on to Python), where weights are shared out among processes, and
        where a pass moves what all threads share.
        """
        if of in (0, 1) or self.device.type != "cpu" or is_sharded(self) or self.attention == FLEX:
            return 1
        return 1 if self._moves_what_is_shared() else torch.get_num_threads()

    def train(self, mode: bool = True) -> "Encoder":
        """Turn dropout on or off, as every module does."""
        self._moves = None  # how a pass works may depend on it
        super().train(mode)
        return self

    @property
    def computes_again(self) -> bool:
        """Return whether the backward pass computes layers again, with the numbers that dropout drew."""
        return self.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.causal_lm.modules()
        )

    def _moves_what_is_shared(self) -> bool:
        """Return whether passes in the present mode move what threads share; so does what is computed again, and draws anew."""

        def read_two() -> None:
            with drawing_from(0), self.precision():
                self.causal_lm.base_model(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False)

        if self._moves is None:
            self._moves = self.computes_again or moves_what_is_shared(self.causal_lm, read_two)
        return self._moves

    def precision(self) -> torch.autocast:
        """Return the context in which the model computes: bfloat16 by autocast, or nothing."""
        return computing_in(self.compute_dtype, self.device)

    def share_weights_out(self) -> None:
        """Let every process hold a part of the weights only, whose gradients and vectors stay the same (FSDP)."""
        layers = [layer for _, stack in find_layers(self.causal_lm) for layer in stack]
        shard(self, layers=layers, whole=self.log_inverse_temperature, methods=["own_logits"])

    def temperature(self) -> float:
        """Return τ; inf or 0 where a training has thrown log(1/τ) out of range."""
        return float(self.log_inverse_temperature.detach().double().neg().exp())

    def require_room(self, num_tokens: int) -> None:
        """Raise ModelError where a text of so many tokens is longer than the model has positions."""
        positions = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < num_tokens:
            raise ModelError(
                f"{type(self.causal_lm).__name__}: wanted texts of at most {positions} tokens (max_position_embeddings), "
                f"found one of {num_tokens}. Lower text.max_entity_tokens, text.max_relation_tokens or "
                "text.max_answer_tokens, or take a model of longer texts."
            )

    def lay_out(self, texts: Texts | Sequence[TokenIds]) -> TokenTrie:
        """Put texts into one trie, or one text a row where the model needs separate passes."""
        return build_trie(texts, row_tokens=self.row_tokens, share=self.packed)

    def fill(self, trie: TokenTrie) -> float:
        """Return the share of nodes among them and the padding that passes over a trie compute, that of attention left out."""
        if trie.shared and self.unpadded:
            return 1.0
        return trie.fill(self.chunk_tokens, self._width) if trie.shared else trie.fill(self.chunk_tokens)

    def _width(self, rows: int, longest: int) -> int:
        """Return the tokens to which rows of a trie are padded in a pass.

        Whole blocks for FlexAttention. In compiled layers several rows have the length of all, for another one would be another
        form to compile, in the middle of a training.
        """
        if self.attention != FLEX:
            return longest
        least = self.row_tokens if self.is_compiled and rows > 1 else 0
        return -(-max(longest, least) // BLOCK) * BLOCK

    def forward(self, group: RowGroup, *, shared: bool, wanted: IntArray | None = None) -> Tensor:
        """Return the states (rows · width, D) of a group of rows, flattened, with gradient where that is on.

        wanted (P,): the places there of the states that are read, None for all; others may be anything.
        """
        if shared and self.unpadded:
            where = unpadded.layout(group)
            arguments = unpadded.arguments(self.causal_lm.config, group, where, self.compute_dtype)
            with self.precision(), self._narrowed_to(None if wanted is None else np.unique(where.of[wanted])):
                read = self.causal_lm.base_model(use_cache=False, **arguments)
            return unpadded.padded(read[0][0], where)
        token_ids, depths, ends = (on_device(part, self.device) for part in (group.token_ids, group.depths, group.ends))
        width = token_ids.shape[1]
        if shared and self.attention == FLEX:
            token_ids, depths, ends = padded_to_blocks(token_ids, depths, ends, width=self._width(*token_ids.shape))
        arguments = {"input_ids": token_ids, "use_cache": False}
        if shared:
            mask = trie_attention(self.causal_lm.config, ends, depths, self.compute_dtype)
            arguments |= {"position_ids": depths, "attention_mask": mask}
        with self.precision(), self._narrowed_to(wanted):
            states: Tensor = self.causal_lm.base_model(**arguments)[0]
        return states[:, :width].flatten(0, 1)

    def wanted(self, ends: IntArray, *others: IntArray) -> IntArray | None:
        """Return the places of the states that vectors of texts that end at `ends` are made of, and others; None for all."""
        return np.unique(np.concatenate([ends, *others])) if self.pooling == "last" else None

    @property
    def narrow(self) -> bool:
        """Return whether passes compute the last layer's feed-forward part where they are told what is wanted of them."""
        return self.narrows and self.pooling == "last" and self.device.type == "cpu" and not is_sharded(self)

    def _narrowed_to(self, places: IntArray | None) -> AbstractContextManager[None]:
        """Return the context of a pass of which only the states at some places (P,) of its flattened tokens are read."""
        if places is None or not self.narrow or self.computes_again:
            return nullcontext()
        return narrowed_to(torch.from_numpy(places if len(places) else np.zeros(1, dtype=np.int64)))

    def read(self, states: Tensor, group: RowGroup, places: IntArray) -> Tensor:
        """Return what the vectors (P, D) of texts are made of, from the states of their group and the places where they end."""
        return POOLINGS[self.pooling](states, group, places)

    def own_logits(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return states (T, D) of a text (T,) and the logits (T, V) that the model itself gives, whatever `logits` does."""
        with self.precision():
            logits: Tensor = self.causal_lm(input_ids=token_ids[None], use_cache=False).logits[0]
            states: Tensor = self.causal_lm.base_model(input_ids=token_ids[None], use_cache=False)[0][0]
        return states, logits.float()

    def logits(self, states: Tensor) -> Tensor:
        """Return float32 logits (T, V) of states (T, D), with the scaling and soft-capping that some families apply."""
        config = self.causal_lm.config
        with self.precision():
            logits: Tensor = self.causal_lm.get_output_embeddings()(states).float()
        scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
        logits = logits if scale == 1 else logits * scale  # a row of logits is long, and kept for the backward pass
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def embed(self, texts: Texts | Sequence[TokenIds], *, progress: Progress | None = None) -> Tensor:
        """Return the vectors of N texts (N, D), float32 unit rows on the CPU, in eval mode and without gradient.

        Texts are laid out in sorted slices, so that those with a common prefix share it however many there are;
        progress is called with (tokens done, tokens in all). All processes call it with the same texts and share them
        out. Raises ModelError for a text longer than the model has positions, and OutOfMemoryError.
        """
        texts = Texts.of(texts)
        self.require_room(int(texts.lengths.max(initial=0)))
        order = sorted_rows(texts.padded())
        slices = [order[start : start + TEXTS_AT_ONCE] for start in range(0, len(order), TEXTS_AT_ONCE)]
        total, done = len(texts.tokens), 0
        vectors = torch.empty(len(texts), self.width)
        was_training = self.training
        self.eval()
        try:
            with explained_memory("Lower training.chunk_tokens, the tokens that are computed at once."):
                for slice_ in slices:
                    chosen = texts.select(slice_)
                    trie = self.lay_out(chosen)
                    share = len(chosen.tokens) / trie.num_nodes

                    def report(nodes: int, base: int = done, share: float = share) -> None:
                        if progress is not None:
                            progress(min(total, base + int(nodes * share)), total)

                    vectors[torch.from_numpy(slice_)] = self._embed_trie(trie, report)
                    done += len(chosen.tokens)
        finally:
            give_back(self)
            self.train(was_training)
        return vectors

    def _embed_trie(self, trie: TokenTrie, report: Callable[[int], None]) -> Tensor:
        """Return the vectors of a trie's texts, every distinct text read once, by one of the processes.

        The chunks are those of one process, so that the vectors are the same bits however many there are.
        """
        wanted, back = np.unique(trie.last_nodes(), return_inverse=True)
        chunks = trie.chunks(self.chunk_tokens)
        owners = share_out(np.array([len(rows) * int(trie.row_lengths[rows].max()) for rows in chunks]))
        chunk_of_row = np.empty(len(trie.row_lengths), dtype=np.int64)
        for number, rows in enumerate(chunks):
            chunk_of_row[rows] = number
        owner_of_text = owners[chunk_of_row[trie.rows_of(wanted)]]
        own, own_chunks = wanted[owner_of_text == rank()], [chunks[i] for i in np.flatnonzero(owners == rank())]
        idle = np.bincount(owners).max() - len(own_chunks) if is_sharded(self) else 0
        vectors = torch.empty(len(own), self.width)

        def vectors_of(rows: IntArray) -> tuple[IntArray, Tensor]:
            group = row_group(trie, rows)
            which, places = group.find(own)
            states = self(group, shared=trie.shared, wanted=self.wanted(places))
            return which, pooled(self.read(states, group, places)).cpu()

        with failing_together():
            at_once = self.chunks_at_once(len(own_chunks))
            with closing(side_by_side(vectors_of, own_chunks, at_once=at_once)) as results:
                for done, (which, found) in enumerate(results):
                    vectors[torch.from_numpy(which)] = found
                    report(trie.num_nodes * (done + 1) // len(own_chunks))
            for _ in range(idle):  # all processes gather the weights for every pass
                self(row_group(trie, chunks[0][:1]), shared=trie.shared)
        return gather_rows(vectors, owner_of_text)[torch.from_numpy(back)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name; the temperature among them where it is learned."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def fingerprint(self) -> str:
        """Return a sha256 over base model, learned weights, temperature, passes and pooling: equal means equal vectors."""
        pooling = "" if self.pooling == "last" else f" {self.pooling}"  # none was named before there was another
        digest = hashlib.sha256(f"{self.source_fingerprint} {self.compute_dtype} {self.packed}{pooling}".encode())
        for name, parameter in sorted({**self.trainable(), "τ": self.log_inverse_temperature}.items()):
            digest.update(name.encode())
            digest.update(whole(parameter.detach()).float().cpu().numpy().tobytes())
        for name, module in sorted(self.named_modules()):
            if isinstance(module, LoraLayer):  # the weights alone do not say by how much they count
                digest.update(f"{name} {sorted(module.scaling.items())}".encode())
        return digest.hexdigest()


def pooled(states: Tensor) -> Tensor:
    """Return states (N, D) as unit rows in float32, whatever the weights are in."""
    return F.normalize(states.float(), dim=-1)
