"""A token trie of names, and the rule that keeps a model from writing anything else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pykalm.text.texts import Texts


class NameTrie:
    """Hold the token sequences of N names as a tree; of names with equal tokens the first stands for all.

    A name may be the beginning of another: both end where they end. Raises ValueError for a name without tokens.
    """

    def __init__(self, names: Texts) -> None:
        self._children: list[dict[int, int]] = [{}]
        self._name_of: dict[int, int] = {}
        self._continuations: dict[int, Tensor] = {}
        self.longest = int(names.lengths.max(initial=0))
        for number, tokens in enumerate(names):
            node = 0
            for token in tokens.tolist():
                if token not in self._children[node]:
                    self._children[node][token] = len(self._children)
                    self._children.append({})
                node = self._children[node][token]
            if not node:
                raise ValueError(f"wanted names of one token or more, found none in name {number}")
            self._name_of.setdefault(node, number)

    def find(self, tokens: Sequence[int]) -> int | None:
        """Return the node at the end of some first tokens of a name, or None where no name begins so."""
        node: int | None = 0
        for token in tokens:
            node = None if node is None else self._children[node].get(token)
        return node

    def name_at(self, node: int | None) -> int | None:
        """Return the name that ends at a node, or None."""
        return None if node is None else self._name_of.get(node)

    def continuations(self, node: int) -> Tensor:
        """Return the tokens (n,) that may follow at a node."""
        if node not in self._continuations:
            self._continuations[node] = torch.tensor(list(self._children[node]), dtype=torch.int64)
        return self._continuations[node]


@dataclass(frozen=True, eq=False)
class NamesOnly:
    """Leave a model, at every step, the tokens that continue a name, and the end token where one ends.

    For transformers' generate, as a logits processor: scores (B, V) follow input_ids (B, T), whose first `width` columns
    are prompts. An answer can end in several ways (end token, line end), which mean the same here: the end token
    gets what all `stop_ids` together have, so that a model that ends its lines is not forced to go on.
    """

    names: NameTrie
    width: int
    end_id: int
    stop_ids: tuple[int, ...]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with −inf for all that would leave the names."""
        ends = scores[:, list(self.stop_ids)].logsumexp(dim=-1)
        allowed = torch.full_like(scores, float("-inf"))
        for row, node in enumerate(self._nodes(input_ids)):
            if node is None:  # over, or the rest of a beam without a name
                allowed[row, self.end_id] = 0.0
                continue
            tokens = self.names.continuations(node).to(scores.device)
            allowed[row, tokens] = scores[row, tokens]
            if self.names.name_at(node) is not None:
                allowed[row, self.end_id] = ends[row]
        return allowed

    def _nodes(self, input_ids: Tensor) -> Iterator[int | None]:
        for tokens in input_ids[:, self.width :].tolist():
            yield self.names.find(tokens)
