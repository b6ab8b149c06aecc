"""A graph small enough to think through, tiny encoders of every family, and one step's gradient, for the laws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from pykalm.config import ObjectiveSettings, TextSettings
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.known import known_answers
from pykalm.learn.batches import Batch, BatchBuilder
from pykalm.learn.step import StepLoss, joint_gradient
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.model.last_layer import can_be_narrowed
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.model.own_texts import OwnTexts
from pykalm.text.verbalize import Verbalizer
from tests.tiny_models import TOKENIZER_SIZE, tiny_model, tiny_tokenizer

NAMES = ("ada", "ada b", "bo", "cy", "dan", "eve")
DESCRIPTIONS = ("a poet", "", "a baker of bread", "a poet", "", "a sailor")
# Several tails of one query (ada knows bo and cy), several queries of one tail (bo is known by ada and by dan),
# a triple that is true in both directions (bo likes cy, cy likes bo), and heads that are tails elsewhere.
OWN_LENGTH, NUM_LIKELY = 12, 5
TRIPLES = ((0, 0, 2), (0, 0, 3), (4, 0, 2), (2, 1, 3), (3, 1, 2), (1, 1, 5), (5, 0, 4), (3, 0, 5))


def tiny_graph(triples: tuple[tuple[int, int, int], ...] = TRIPLES) -> KnowledgeGraph:
    """Return six people, two relations and a few triples; the last two of TRIPLES are valid and test."""
    rows = np.array(triples, dtype=np.int64)
    return KnowledgeGraph(
        name="people",
        entity_ids=tuple(f"p{i}" for i in range(len(NAMES))),
        entity_names=NAMES,
        entity_descriptions=DESCRIPTIONS,
        relation_ids=("knows", "likes"),
        relation_texts=("knows", "likes"),
        inverse_texts=("is known by", "is liked by"),
        splits={"train": rows[:-2], "valid": rows[-2:-1], "test": rows[-1:]},
        negatives={},
    )


def tiny_verbalizer(graph: KnowledgeGraph, **settings: Any) -> Verbalizer:
    """Return the wordings of a graph for the tiny tokenizer."""
    return Verbalizer(graph, tiny_tokenizer(), TextSettings(**settings))


def tiny_encoder(family: str = "llama", *, dropout: float = 0.0, **settings: Any) -> Encoder:
    """Return an encoder (float32, or the precision given) with LoRA on every linear layer, far from its start at 0."""
    settings = {"row_tokens": 64, "chunk_tokens": 256, "precision": "fp32", **settings}
    base = tiny_model(family, vocab_size=TOKENIZER_SIZE)
    if settings["precision"] == "bf16":
        base.to(torch.bfloat16)
    model = add_adapter(base, kind="lora", rank=4, dropout=dropout, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Encoder(model, source_fingerprint=family, packed=family != "mamba", **settings)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sparing(encoder: Encoder) -> Encoder:
    """Let an encoder of a family that can leave out all that the start check lets it leave out."""
    encoder.use_attention(MATMUL_ATTENTION)
    encoder.reads_unpadded, encoder.narrows = True, can_be_narrowed(encoder.causal_lm)
    return encoder


def tiny_own_texts() -> OwnTexts:
    """Return three texts of any tokens, with distributions over next tokens that no model has."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(0, TOKENIZER_SIZE, (3, OWN_LENGTH))
    tokens[:, 0] = 1
    likely = np.stack([generator.permutation(TOKENIZER_SIZE)[:NUM_LIKELY] for _ in range(tokens.size)])
    log_p = np.log(generator.dirichlet(np.ones(NUM_LIKELY + 1), tokens.size))
    return OwnTexts(
        tokens.astype(np.int32),
        likely.reshape(*tokens.shape, -1).astype(np.int32),
        log_p.reshape(*tokens.shape, -1).astype(np.float16),
    )


def build_batch(
    encoder: Encoder,
    verbalizer: Verbalizer,
    triples: Any = None,
    *,
    share: float = 1.0,
    explicit: bool = True,
    own: int = 0,
    masks_own_heads: bool = True,
    adds_inverses: bool = True,
) -> Batch:
    """Return the batch of the graph's training triples, or of others, in one trie; every triple completed by default.

    own: so many of the three tiny_own_texts are in it; adds_inverses: False where the triples are directed ones.
    """
    graph = verbalizer.graph
    builder = BatchBuilder(
        graph, verbalizer, known_answers(graph, ["train"]), encoder.lay_out, explicit=explicit, completion_share=share,
        own_texts=tiny_own_texts(), own_tokens=own * OWN_LENGTH, masks_own_heads=masks_own_heads, adds_inverses=adds_inverses,
    )  # fmt: skip
    chosen = graph.triples("train") if triples is None else np.asarray(triples)
    return builder.build(chosen, np.random.default_rng(3))


def gradients(
    encoder: Encoder,
    batch: Batch,
    *,
    memory_tokens: int = 1 << 20,
    seed: int = 0,
    **objective: Any,
) -> tuple[StepLoss, dict[str, Tensor]]:
    """Return the losses of a step and a copy of the gradient of every parameter that learns; λ and β are 1 by default."""
    encoder.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = ObjectiveSettings(**{"implicit_weight": 1.0, "kl_weight": 1.0, **objective})
        loss = joint_gradient(encoder, batch, settings, memory_tokens=memory_tokens)
    return loss, copied_gradients(encoder)


def copied_gradients(encoder: Encoder) -> dict[str, Tensor]:
    """Return a copy of the gradient of every parameter that learns.

    Without L_exp the temperature has none, without L_imp an output head of its own.
    """
    learned = encoder.trainable()
    missing = {name for name, parameter in learned.items() if parameter.grad is None}
    assert missing <= {"log_inverse_temperature", "model.lm_head.weight"}
    return {name: parameter.grad.clone() for name, parameter in learned.items() if parameter.grad is not None}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the largest distance of two gradients of a parameter, relative to the gradient's length."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / second[name].norm().clamp_min(1e-6)) for name in first)


def hands_nothing_on(x: Tensor) -> Tensor:
    """Return x, of which a gradient does not come back."""
    found: Tensor = _Nothing.apply(x)  # type: ignore[no-untyped-call]
    return found


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> None:
        return None


@contextmanager
def replaced(place: Any, name: str, wrong: Callable[..., Any]) -> Iterator[None]:
    """Put a wrong version in place of one function; the body of every seeded break."""
    with mock.patch.object(place, name, wrong):
        yield
