"""Count the floating point operations that a step needs, from the architecture: what is useful, whatever is done.

Counted, a multiplication and an addition as two: for every distinct prefix of the batch, once, the products with the
weights (2 · in · out forward, the same again for the gradient of the input where something below learns, and again for
that of the weight where it learns itself, as LoRA's two matrices do), and attention over the tokens that it sees (4 · width
of all heads, twice that backward); the logits at the positions that carry loss. Not counted: padding, prefixes that stand
in several rows, the last layer's feed-forward part where its state is not read, recomputation, dropout, norms, rotations,
softmax, the losses, the optimiser. So utilisation has no credit for work that is not needed, whether it is done or not.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pykalm.bench.plan import adapters_of_peft, attention, separate_attention
from pykalm.errors import ModelError
from pykalm.learn.batches import Batch
from pykalm.model.encoder import Encoder
from pykalm.model.last_layer import feed_forward


@dataclass(frozen=True)
class ModelCost:
    """Hold what a model costs, forward and backward: per token, per token seen by another in all layers, per logit row.

    unread: what of a token's cost is the last layer's feed-forward part, which a token whose state is not read does not need.
    """

    token_forward: int
    token_backward: int
    unread_forward: int
    unread_backward: int
    seen_forward: int
    seen_backward: int
    logits_forward: int
    logits_backward: int

    def step(self, num_tokens: int, num_seen: int, num_logits: int, num_unread: int) -> int:
        """Return the operations of a training step; num_unread: those of the tokens whose states are not read."""
        counts = (num_tokens, num_seen, num_logits, -num_unread)
        costs = (
            self.token_forward + self.token_backward,
            self.seen_forward + self.seen_backward,
            self.logits_forward + self.logits_backward,
            self.unread_forward + self.unread_backward,
        )
        return sum(count * cost for count, cost in zip(counts, costs, strict=True))


@dataclass(frozen=True)
class _Product:
    """Hold one product with a weight, as a pass met it."""

    name: str
    size: int
    input_learns: bool
    weight_learns: bool

    @property
    def forward(self) -> int:
        """Return its operations for a token, forward."""
        return 2 * self.size

    @property
    def backward(self) -> int:
        """Return its operations for a token, backward."""
        return 2 * self.size * (self.input_learns + self.weight_learns)


def model_cost(encoder: Encoder) -> ModelCost:
    """Count an adapted model's cost per token from one pass over two tokens, which tells where gradients flow.

    Raises ModelError where a layer's product with a weight is not seen in the pass.
    """
    products = _products(encoder)
    last = feed_forward(encoder.causal_lm) if encoder.pooling == "last" else None
    unread = [product for product in products if last is not None and product.name.startswith(f"{last[0]}.")]
    attentions = _attention_names(encoder.causal_lm)
    width = _attention_width(encoder.causal_lm.config.get_text_config())
    learns = [_attention_learns(name, products) for name in attentions]
    head = encoder.causal_lm.get_output_embeddings().weight
    return ModelCost(
        token_forward=sum(product.forward for product in products),
        token_backward=sum(product.backward for product in products),
        unread_forward=sum(product.forward for product in unread),
        unread_backward=sum(product.backward for product in unread),
        seen_forward=4 * width * len(attentions),
        seen_backward=8 * width * sum(learns),
        logits_forward=2 * head.numel(),
        logits_backward=2 * head.numel() * (1 + head.requires_grad),
    )


def useful_flops(cost: ModelCost, batch: Batch) -> int:
    """Return the operations that a batch needs. A sliding window is not taken off: texts are shorter than any."""
    depths = batch.trie.depths[np.unique(batch.trie.twins)]
    scored = np.unique(batch.trie.twins[batch.answer_nodes])
    others = np.concatenate([batch.query_nodes, batch.candidate_nodes, batch.own_nodes])
    read = np.union1d(scored, batch.trie.twins[others])
    return cost.step(len(depths), int((depths + 1).sum()), len(scored), len(depths) - len(read))


def _products(encoder: Encoder) -> list[_Product]:
    """Return the products with weights of a pass through the layers, in the order in which they are computed."""
    model = encoder.causal_lm
    products: list[_Product] = []
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    linear = {name: module for name, module in linear.items() if module is not head}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            size = inputs[0].shape[-1] * output.shape[-1]
            products.append(_Product(name, size, inputs[0].requires_grad, weight.requires_grad))

        return hook

    # FlexAttention is made for long rows; the products with weights are the same.
    with (
        attention(encoder, separate_attention(encoder)),
        adapters_of_peft(encoder),
        _hooks(linear, note),
        encoder.precision(),
    ):
        model.base_model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=encoder.device), use_cache=False)
    if missing := linear.keys() - {product.name for product in products}:
        raise ModelError(
            f"{type(model).__name__}: wanted to see the product of every linear module in a pass, missed {len(missing)}, "
            f"among them {min(missing)}. Its cost cannot be counted; leave the utilisation out."
        )
    return products


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(make(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention_names(model: nn.Module) -> list[str]:
    """Return the names of the attention modules: those called so that hold no other one."""
    found = [name for name, part in model.named_modules() if "attention" in type(part).__name__.lower()]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _attention_learns(name: str, products: list[_Product]) -> bool:
    """Return whether an attention's scores need a gradient: whether its last base product's input has one."""
    inside = [part for part in products if part.name.startswith(f"{name}.") and ".lora_" not in part.name]
    return inside[-1].input_learns


def _attention_width(config: Any) -> int:
    """Return the width of all query heads together."""
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
