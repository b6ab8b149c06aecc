"""Claims about pieces of texts: whatever the tokenizer, pieces joined read like one text, and none ends it early."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pykalm.config import TextSettings
from pykalm.graph.graph import KnowledgeGraph
from pykalm.text.pieces import PieceTokenizer
from pykalm.text.templates import TEMPLATES, parts, split_space
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import tiny_graph
from tests.tiny_models import tiny_tokenizer

WORDS = ("▁ada", "▁poet", "▁a", "▁knows", "▁bo", "▁baker", "▁of", "▁bread", "▁[", "▁]", "▁▁")


def sentencepiece_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts "▁" before a text: by a normaliser ("llama2") or Metaspace ("always", "first")."""
    characters = [*"▁[],:\n", *map(chr, range(ord("a"), ord("z") + 1))]
    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *bytes_, *characters, *map("".join, merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=kind, split=False)
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def words(tokenizer: Any, graph: KnowledgeGraph | None = None, **settings: Any) -> Verbalizer:
    return Verbalizer(graph or tiny_graph(), tokenizer, TextSettings(**settings))


KINDS = ("llama2", "always", "first")


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_is_put_before_the_first_piece_of_a_text_only(kind: str) -> None:
    verbalizer = words(sentencepiece_tokenizer(kind))
    spell: Callable[[Any], list[str]] = verbalizer.tokenizer.convert_ids_to_tokens
    assert spell(verbalizer.query(0, 0)) == ["▁[", "▁ada", ":", "▁a", "▁poet", ",", "▁knows", "▁]"]
    assert spell(verbalizer.candidate(0)) == ["▁[", "▁ada", ":", "▁a", "▁poet", "▁]"]
    completion = verbalizer.completion(0, 0, 2)
    assert spell(completion.tokens[completion.answer_start :]) == ["▁bo", "</s>"]


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("kind", KINDS)
def test_joined_pieces_are_the_tokens_of_the_whole_text(kind: str, template: str) -> None:
    """No merge of the tokenizer crosses a piece here, so that the text tokenised at once is the same."""
    verbalizer = words(sentencepiece_tokenizer(kind), template=template)
    tokenizer, graph = verbalizer.tokenizer, verbalizer.graph
    for entity in range(graph.num_entities):
        prompt, completion = verbalizer.prompt(entity, 1), verbalizer.completion(entity, 1, 2)
        for tokens in (verbalizer.query(entity, 3), verbalizer.candidate(entity), prompt, completion.tokens[:-1]):
            text = tokenizer.decode(tokens)
            assert "  " not in text
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens.tolist()
        assert completion.tokens[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_entity_given_as_free_text_has_the_same_query_with_such_a_tokenizer(kind: str) -> None:
    for template in TEMPLATES:
        verbalizer = words(sentencepiece_tokenizer(kind), template=template, max_entity_tokens=4)
        graph = verbalizer.graph
        for entity in range(graph.num_entities):
            free = verbalizer.free_query(graph.entity_names[entity], graph.entity_descriptions[entity], 2)
            assert free.tolist() == verbalizer.query(entity, 2).tolist()


def test_a_piece_that_joins_the_character_before_it_is_taken_as_it_is() -> None:
    """Here a newline and the "k" after it are one token, so that "knows" cannot be had behind a newline."""
    tokenizer = sentencepiece_tokenizer("llama2")
    tokenizer.add_tokens([AddedToken("\nk", normalized=False)])
    plain = tokenizer("knows", add_special_tokens=False)["input_ids"]
    knows, bo = PieceTokenizer(tokenizer).tokens(["knows", " bo"], is_first=False, limit=None)
    assert knows.tolist() == plain
    assert tokenizer.convert_ids_to_tokens(bo) == ["▁bo"]


def separately(verbalizer: Verbalizer, wording: str, values: dict[str, tuple[str, int]]) -> list[int]:
    """Spell a wording by hand: every piece tokenised on its own, fields cut, all joined."""
    found: list[int] = []
    for literal, field in parts(wording):
        bare, space = split_space(literal, field)
        found += verbalizer.tokenizer(bare, add_special_tokens=False)["input_ids"] if bare else []
        if field:
            text, limit = values[field]
            found += verbalizer.tokenizer(space + text, add_special_tokens=False)["input_ids"][:limit]
    return found


def check_pieces_are_as_they_stand_alone(tokenizer: Any, graph: KnowledgeGraph, **settings: int) -> None:
    for template in TEMPLATES.values():
        verbalizer = words(tokenizer, graph, template=template.name, **settings)
        limits = verbalizer.settings
        for entity in range(min(50, graph.num_entities)):
            name, tail = graph.entity_names[entity], graph.entity_names[-1 - entity]
            text = verbalizer.entity_text(name, graph.entity_descriptions[entity])
            tail_text = verbalizer.entity_text(tail, graph.entity_descriptions[-1 - entity])
            values = {
                "head": (text, limits.max_entity_tokens),
                "entity": (text, limits.max_entity_tokens),
                "relation": (graph.relation_text(1), limits.max_relation_tokens),
            }
            answer = {"entity": (tail_text, limits.max_answer_tokens), "name": (tail, limits.max_answer_tokens)}
            whole = separately(verbalizer, template.completion, values)
            whole += separately(verbalizer, template.answer, answer)
            completion = verbalizer.completion(entity, 1, graph.num_entities - 1 - entity)
            assert verbalizer.query(entity, 1).tolist() == separately(verbalizer, template.query, values)
            assert verbalizer.candidate(entity).tolist() == separately(verbalizer, template.candidate, values)
            assert completion.tokens.tolist() == [*whole, tokenizer.eos_token_id]


@pytest.mark.parametrize("settings", [{}, {"max_entity_tokens": 4, "max_relation_tokens": 2, "max_answer_tokens": 3}])
def test_a_byte_level_tokenizer_spells_every_piece_as_it_stands_alone(settings: dict[str, int]) -> None:
    check_pieces_are_as_they_stand_alone(tiny_tokenizer(), tiny_graph(), **settings)


@pytest.mark.slow
def test_the_small_language_model_spells_every_piece_as_it_stands_alone() -> None:
    from pykalm.graph.catalogue import load_graph
    from pykalm.model.known_models import model_cache
    from pykalm.model.load import load_tokenizer

    if not Path(model_cache() / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not in the cache: run `kalm demo` once")
    check_pieces_are_as_they_stand_alone(load_tokenizer("smollm2-135m"), load_graph("world"))


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_special_tokens_inside_names_are_plain_characters(kind: str) -> None:
    tokenizer = tiny_tokenizer() if kind == "bytes" else sentencepiece_tokenizer(kind)
    names = ("a</s>b", "<s>", *tiny_graph().entity_names[2:])
    verbalizer = words(tokenizer, dataclasses.replace(tiny_graph(), entity_names=names))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    texts = [verbalizer.candidate(0), verbalizer.query(1, 0), verbalizer.free_query("x</s>", "a <s> b", 1)]
    answers = [verbalizer.completion(2, 0, tail).tokens[:-1] for tail in (0, 1)]
    assert not any(np.isin(special, tokens).any() for tokens in (*texts, *answers))
    assert tokenizer.decode(answers[0]) == "[ bo: a baker of bread, knows ] a</s>b"


def test_forty_thousand_texts_take_seconds() -> None:
    pieces = PieceTokenizer(sentencepiece_tokenizer("llama2"))
    start = time.perf_counter()
    assert len(pieces.tokens([" ada knows bo, a baker of bread"] * 40_000, is_first=False, limit=50)) == 40_000
    assert time.perf_counter() - start < 20
