"""Verbalisation: from entities and relations to token ids. The only place that puts texts together."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pykalm.config import TextSettings
from pykalm.errors import GraphError, ModelError
from pykalm.graph.graph import KnowledgeGraph
from pykalm.text.pieces import PieceTokenizer
from pykalm.text.templates import TEMPLATES, Templates, parts, split_space
from pykalm.text.texts import IntArray, Texts, TokenIds, ranges
from pykalm.text.trie import TokenTrie


@dataclass(frozen=True, eq=False)
class Completion:
    """Hold a prompt and its answer as one text; tokens[answer_start:] are the answer and the end token."""

    tokens: TokenIds
    answer_start: int


@dataclass(frozen=True, eq=False)
class Completions:
    """Hold N prompts with their answers as texts; text i is the answer and the end token from answer_starts[i] on."""

    texts: Texts
    answer_starts: IntArray

    @staticmethod
    def none() -> "Completions":
        """Return no completions."""
        return Completions(Texts.of([]), np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        """Return N."""
        return len(self.answer_starts)

    def select(self, numbers: IntArray) -> "Completions":
        """Return some completions, in the order of their numbers."""
        return Completions(self.texts.select(numbers), self.answer_starts[numbers])

    @property
    def num_answer_tokens(self) -> IntArray:
        """Return how many tokens each answer has, the end token among them (N,)."""
        return self.texts.lengths - self.answer_starts


def answer_positions(trie: TokenTrie, completions: Completions, *, start: int = 0) -> tuple[IntArray, IntArray]:
    """Return the nodes before every answer token, and the tokens, text after text: what each node must predict. METHOD.md §3.

    The completions, with or without their last tokens, which predict nothing, are the texts of the trie from `start` on.
    """
    texts, firsts, counts = completions.texts, completions.answer_starts, completions.num_answer_tokens
    before = ranges(firsts - 1, counts)
    nodes = trie.paths[start + np.repeat(np.arange(len(texts)), counts), before]
    return nodes.astype(np.int64), texts.tokens[ranges(texts.offsets[:-1] + firsts, counts)].astype(np.int64)


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
        self._tables: dict[tuple[str, str, bool], Texts] = {}

    def for_graph(self, graph: KnowledgeGraph) -> "Verbalizer":
        """Return the same wordings and cuts for another graph."""
        return Verbalizer(graph, self.tokenizer, self.settings, templates=self.templates)

    def query(self, head: int, relation: int) -> TokenIds:
        """Return the text of (head, relation), relation in [0, 2R); pooled at its last token. METHOD.md §1."""
        return self.queries(_one(head), _one(relation))[0]

    def candidate(self, entity: int) -> TokenIds:
        """Return the text of an entity as a candidate, pooled at its last token."""
        return self.candidates(_one(entity))[0]

    def prompt(self, head: int, relation: int) -> TokenIds:
        """Return what the model reads before it writes the answer to (head, relation, ?)."""
        return self.prompts(_one(head), _one(relation))[0]

    def completion(self, head: int, relation: int, tail: int) -> Completion:
        """Return prompt, answer and end token of a triple. METHOD.md §3. Raises ModelError without an end token."""
        one = self.completions(_one(head), _one(relation), _one(tail))
        return Completion(one.texts[0], int(one.answer_starts[0]))

    def queries(self, heads: IntArray, relations: IntArray) -> Texts:
        """Return the texts of B queries."""
        return self.join(self.templates.query, {"head": ("entity", heads), "relation": ("relation", relations)})

    def candidates(self, entities: IntArray) -> Texts:
        """Return the texts of C candidates."""
        return self.join(self.templates.candidate, {"entity": ("entity", entities)})

    def prompts(self, heads: IntArray, relations: IntArray) -> Texts:
        """Return N prompts."""
        return self.join(self.templates.completion, {"head": ("entity", heads), "relation": ("relation", relations)})

    def completions(self, heads: IntArray, relations: IntArray, tails: IntArray) -> Completions:
        """Return the completions of N triples."""
        prompts = self.prompts(heads, relations)
        named: dict[str, tuple[str, IntArray]]
        named = {"entity": ("answer", tails), "tail": ("answer", tails), "name": ("name", tails)}
        answers = self.join(self.templates.answer, named, opening=False)
        end, each = Texts.of([np.array([self.end_token_id()])]), np.arange(len(tails))
        return Completions(Texts.join([(prompts, each), (answers, each), (end, np.zeros_like(each))]), prompts.lengths)

    def free_query(self, name: str, description: str, relation: int) -> TokenIds:
        """Return the query of an entity that the graph lacks. Raises GraphError when its text is empty."""
        if not name.strip():
            raise GraphError("wanted the text of an entity, found nothing. Give at least a name.")
        text = self.entity_text(name.strip(), description.strip())
        values = {"head": ("free", _one(0)), "relation": ("relation", _one(relation))}
        return self.join(self.templates.query, values, free=text)[0]

    def plain(self, texts: Sequence[str], *, limit: int | None = None) -> Texts:
        """Return texts that are in no wording, as sentences of a book, each cut at `limit` tokens."""
        tokens, each = self._pieces.tokens(texts, is_first=True, limit=limit), np.arange(len(texts))
        return Texts.join([(Texts.of([self._pieces.opening]), np.zeros_like(each)), (tokens, each)])

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
        settings = self.settings.model_dump(exclude={"pooling"})  # no token depends on how texts are pooled
        content = [self.templates.to_dict(), settings, self.tokenizer_fingerprint(),
                   graph.entity_names, graph.entity_descriptions, graph.relation_texts, graph.inverse_texts]  # fmt: skip
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def tokenizer_fingerprint(self) -> str:
        """Return a sha256 over all of the tokenizer that decides token ids."""
        return self._pieces.fingerprint()

    def count_entity_tokens(self) -> list[int]:
        """Return the number of tokens of every entity's text D(e), before any cut."""
        texts, _ = self._texts("entity")
        return list(map(int, self._pieces.tokens(texts, is_first=True, limit=None).lengths))

    def join(
        self, wording: str, values: Mapping[str, tuple[str, IntArray]], *, opening: bool = True, free: str = ""
    ) -> Texts:
        """Join the tokens of a wording's literals and fields; `values` names the kind of each field and N numbers of it.

        Kinds are entity, relation, answer, name and free; opening: whether the wording begins a text of its own.
        """
        count = len(next(iter(values.values()))[1])
        same = np.zeros(count, dtype=np.int64)
        columns = [(Texts.of([self._pieces.opening]), same)] if opening else []
        is_first = opening
        for literal, field in parts(wording):
            bare, space = split_space(literal, field)
            if bare:
                columns.append((self._literal(bare, is_first), same))
                is_first = False
            if field:
                kind, numbers = values[field]
                table = self._free(space + free, is_first) if kind == "free" else self._table(kind, space, is_first)
                columns.append((table, numbers))
                is_first = False
        return Texts.join(columns)

    def _literal(self, text: str, is_first: bool) -> Texts:
        """Return the tokens of a literal, as a table of one."""
        key = ("literal", text, is_first)
        if key not in self._tables:
            self._tables[key] = self._pieces.tokens([text], is_first=is_first, limit=None)
        return self._tables[key]

    def _free(self, text: str, is_first: bool) -> Texts:
        """Return the cut tokens of an entity text that the graph lacks, as a table of one."""
        return self._pieces.tokens([text], is_first=is_first, limit=self.settings.max_entity_tokens)

    def _table(self, kind: str, space: str, is_first: bool) -> Texts:
        """Return the cut tokens of all texts of a kind. The space before a field is tokenised with it, as tokenizers expect."""
        key = (kind, space, is_first)
        if key not in self._tables:
            texts, limit = self._texts(kind)
            self._tables[key] = self._pieces.tokens((space + text for text in texts), is_first=is_first, limit=limit)
        return self._tables[key]

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


def _one(number: int) -> IntArray:
    return np.array([number], dtype=np.int64)
