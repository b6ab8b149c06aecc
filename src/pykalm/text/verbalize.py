"""Verbalisation: from entities and relations to token ids. The only place that puts texts together."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykalm.config import TextSettings
from pykalm.errors import GraphError, ModelError
from pykalm.graph.graph import KnowledgeGraph
from pykalm.text.pieces import PieceTokenizer
from pykalm.text.templates import TEMPLATES, Templates, parts, split_space
from pykalm.text.trie import IntArray, TokenIds


@dataclass(frozen=True, eq=False)
class Completion:
    """Hold a prompt and its answer as one text; tokens[answer_start:] are the answer and the end token."""

    tokens: TokenIds
    answer_start: int


class Verbalizer:
    """Turn what a graph knows into token ids, each entity and relation text tokenised once and cut on tokens.

    Literals, entity texts and relation texts are tokenised apart and joined as ids, so that no cut ever needs to decode,
    and the last token of a query or candidate (its pooled mark) is never cut.
    """

    def __init__(
        self, graph: KnowledgeGraph, tokenizer: Any, settings: TextSettings, *, templates: Templates | None = None
    ) -> None:
        self.graph = graph
        self.tokenizer = tokenizer
        self.settings = settings
        self.templates = templates or TEMPLATES[settings.template]
        self._pieces = PieceTokenizer(tokenizer)
        self._cache: dict[tuple[str, str, bool], list[TokenIds]] = {}
        self._literals: dict[tuple[str, bool], TokenIds] = {}

    def for_graph(self, graph: KnowledgeGraph) -> "Verbalizer":
        """Return the same wordings and cuts for another graph."""
        return Verbalizer(graph, self.tokenizer, self.settings, templates=self.templates)

    def query(self, head: int, relation: int) -> TokenIds:
        """Return the text of (head, relation), relation in [0, 2R); pooled at its last token. METHOD.md §1."""
        return self._join(self.templates.query, {"head": ("entity", head), "relation": ("relation", relation)})

    def candidate(self, entity: int) -> TokenIds:
        """Return the text of an entity as a candidate, pooled at its last token."""
        return self._join(self.templates.candidate, {"entity": ("entity", entity)})

    def prompt(self, head: int, relation: int) -> TokenIds:
        """Return what the model reads before it writes the answer to (head, relation, ?)."""
        return self._join(self.templates.completion, {"head": ("entity", head), "relation": ("relation", relation)})

    def completion(self, head: int, relation: int, tail: int) -> Completion:
        """Return prompt, answer and end token of a triple. METHOD.md §3. Raises ModelError without an end token."""
        prompt = self.prompt(head, relation)
        named = {"entity": ("answer", tail), "tail": ("answer", tail), "name": ("name", tail)}
        answer = self._join(self.templates.answer, named, opening=False)
        return Completion(np.concatenate([prompt, answer, [self.end_token_id()]]), len(prompt))

    def queries(self, heads: IntArray, relations: IntArray) -> list[TokenIds]:
        """Return the texts of B queries."""
        return [self.query(int(head), int(relation)) for head, relation in zip(heads, relations, strict=True)]

    def candidates(self, entities: IntArray) -> list[TokenIds]:
        """Return the texts of C candidates."""
        return [self.candidate(int(entity)) for entity in entities]

    def free_query(self, name: str, description: str, relation: int) -> TokenIds:
        """Return the query of an entity that the graph lacks. Raises GraphError when its text is empty."""
        if not name.strip():
            raise GraphError("wanted the text of an entity, found nothing. Give at least a name.")
        text = self.entity_text(name.strip(), description.strip())
        return self._join(self.templates.query, {"head": ("free", text), "relation": ("relation", relation)})

    def entity_text(self, name: str, description: str) -> str:
        """Return D(e): name and description in the wording of the run, or the name alone."""
        if not (description and self.settings.descriptions):
            return name
        fields = {"name": name, "description": description, "": ""}
        return "".join(literal + fields[field] for literal, field in parts(self.templates.entity))

    def end_token_id(self) -> int:
        """Return the token that ends an answer; raises ModelError when the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "wanted a tokenizer with an end token (eos_token), found none: the model could not learn to stop. "
                "Set eos_token in the tokenizer's configuration, or train with objective.implicit=false."
            )
        return int(self.tokenizer.eos_token_id)

    def fingerprint(self) -> str:
        """Return a sha256 over wordings, cuts, tokenizer and the graph's texts: equal means the same token ids."""
        graph = self.graph
        content = [self.templates.to_dict(), self.settings.model_dump(), self.tokenizer_fingerprint(),
                   graph.entity_names, graph.entity_descriptions, graph.relation_texts, graph.inverse_texts]  # fmt: skip
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def tokenizer_fingerprint(self) -> str:
        """Return a sha256 over all of the tokenizer that decides token ids."""
        return self._pieces.fingerprint()

    def count_entity_tokens(self) -> list[int]:
        """Return the number of tokens of every entity's text D(e), before any cut."""
        texts, _ = self._texts("entity")
        return [len(tokens) for tokens in self._pieces.tokens(texts, is_first=True, limit=None)]

    def _join(self, wording: str, values: dict[str, tuple[str, Any]], *, opening: bool = True) -> TokenIds:
        """Join the tokens of a wording's literals and fields; `values` names the kind and number of each field."""
        pieces: list[TokenIds] = [self._pieces.opening] if opening else []
        is_first = opening
        for literal, field in parts(wording):
            bare, space = split_space(literal, field)
            if bare:
                pieces.append(self._literal(bare, is_first))
                is_first = False
            if field:
                pieces.append(self._field(*values[field], space, is_first))
                is_first = False
        return np.concatenate(pieces)

    def _literal(self, text: str, is_first: bool) -> TokenIds:
        if (text, is_first) not in self._literals:
            self._literals[text, is_first] = self._pieces.tokens([text], is_first=is_first, limit=None)[0]
        return self._literals[text, is_first]

    def _field(self, kind: str, value: Any, space: str, is_first: bool) -> TokenIds:
        """Return the cut tokens of a field. The space before it is tokenised with it, as tokenizers expect."""
        if kind == "free":
            return self._pieces.tokens([space + value], is_first=is_first, limit=self.settings.max_entity_tokens)[0]
        key = (kind, space, is_first)
        if key not in self._cache:
            texts, limit = self._texts(kind)
            self._cache[key] = self._pieces.tokens((space + text for text in texts), is_first=is_first, limit=limit)
        tokens: TokenIds = self._cache[key][value]
        return tokens

    def _texts(self, kind: str) -> tuple[Iterable[str], int]:
        """Return all texts of a kind, in the order of their numbers, and the tokens that each may have."""
        graph, settings = self.graph, self.settings
        described = zip(graph.entity_names, graph.entity_descriptions, strict=True)
        kinds: dict[str, tuple[Callable[[], Iterable[str]], int]] = {
            "entity": (lambda: [self.entity_text(*pair) for pair in described], settings.max_entity_tokens),
            "answer": (lambda: [self.entity_text(*pair) for pair in described], settings.max_answer_tokens),
            "name": (lambda: graph.entity_names, settings.max_answer_tokens),
            "relation": (
                lambda: [graph.relation_text(relation) for relation in range(2 * graph.num_relations)],
                settings.max_relation_tokens,
            ),
        }
        texts, limit = kinds[kind]
        return texts(), limit
