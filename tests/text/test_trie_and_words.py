"""Claims about wordings and token tries: every text is spelled as its template says, and laid out exactly once."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from pykalm.config import TextSettings
from pykalm.errors import ConfigError, GraphError, ModelError
from pykalm.text.templates import PREFIX_SHARING, PUBLISHED, TEMPLATES, Templates, parts, split_space
from pykalm.text.trie import TokenTrie, build_trie, row_group
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import tiny_graph
from tests.tiny_models import TOKENIZER_SIZE, tiny_tokenizer


def words(
    tokenizer: Any = None, *, graph: Any = None, templates: Templates | None = None, **settings: Any
) -> Verbalizer:
    graph = graph or tiny_graph()
    return Verbalizer(graph, tokenizer or tiny_tokenizer(), TextSettings(**settings), templates=templates)


def opening_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer, which now opens every text with <s> as Llama's does, and ends it with </s>."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("wording", "cut"),
    [
        ("{head} | {relation}:", [("", "head"), (" | ", "relation"), (":", "")]),
        ("{ {entity} }", [("{ ", "entity"), (" }", "")]),
        ("{{entity}}", [("{", "entity"), ("}", "")]),
        ("{name}{description}", [("", "name"), ("", "description")]),
        ("{unknown} {tail}", [("{unknown} ", "tail")]),
        ("no field", [("no field", "")]),
        ("", []),
    ],
)
def test_a_wording_is_cut_into_literals_and_fields(wording: str, cut: list[tuple[str, str]]) -> None:
    assert list(parts(wording)) == cut
    spelled = "".join(literal + (f"{{{field}}}" if field else "") for literal, field in cut)
    assert spelled == wording


def test_only_spaces_before_a_field_go_with_it() -> None:
    assert split_space(" | ", "relation") == (" |", " ")
    assert split_space("triple:\n", "head") == ("triple:\n", "")
    assert split_space("answer ", "") == ("answer ", "")


def test_wordings_survive_being_data_and_refuse_what_they_are_not() -> None:
    for templates in TEMPLATES.values():
        assert Templates.from_dict(templates.to_dict()) == templates
    for wrong in ({}, {**PUBLISHED.to_dict(), "extra": "x"}, {**PUBLISHED.to_dict(), "query": 3}):
        with pytest.raises(ConfigError, match="templates: wanted"):
            Templates.from_dict(wrong)  # type: ignore[arg-type]


def test_texts_are_spelled_as_the_prefix_sharing_template_says() -> None:
    verbalizer = words()
    decode = verbalizer.tokenizer.decode
    assert decode(verbalizer.query(0, 0)) == "[ ada: a poet, knows ]"
    assert decode(verbalizer.query(2, 3)) == "[ bo: a baker of bread, is liked by ]"
    assert decode(verbalizer.candidate(1)) == "[ ada b ]"
    completion = verbalizer.completion(0, 0, 2)
    assert decode(completion.tokens) == "[ ada: a poet, knows ] bo</s>"
    assert decode(completion.tokens[completion.answer_start :]) == " bo</s>"


def test_texts_are_spelled_as_the_published_template_says_braces_and_all() -> None:
    verbalizer = words(template="published")
    decode = verbalizer.tokenizer.decode
    assert decode(verbalizer.query(0, 0)) == "[ ada: a poet, knows ]"
    assert decode(verbalizer.candidate(0)) == "{ ada: a poet }"
    completion = verbalizer.completion(0, 0, 2)
    prompt, answer = completion.tokens[: completion.answer_start], completion.tokens[completion.answer_start :]
    assert decode(prompt) == (
        "Given the head entity and relation, write a tail entity that completes the triple: ada: a poet, knows\n"
    )
    assert decode(answer) == "bo: a baker of bread</s>"


def test_names_that_look_like_fields_are_taken_as_they_are() -> None:
    graph = dataclasses.replace(
        tiny_graph(), entity_names=("{description}", "{name}", "{head} {relation}", "a", "b", "c")
    )
    verbalizer = words(graph=graph)
    decode = verbalizer.tokenizer.decode
    assert decode(verbalizer.candidate(0)) == "[ {description}: a poet ]"
    assert decode(verbalizer.candidate(1)) == "[ {name} ]"
    assert decode(verbalizer.query(2, 0)) == "[ {head} {relation}: a baker of bread, knows ]"


def test_descriptions_can_be_left_out() -> None:
    verbalizer = words(descriptions=False)
    assert verbalizer.tokenizer.decode(verbalizer.candidate(0)) == "[ ada ]"
    assert verbalizer.entity_text("ada", "a poet") == "ada"


def test_a_begin_token_opens_every_text_once_and_an_end_token_closes_answers_only() -> None:
    plain, opened = words(), words(opening_tokenizer())
    for text, other in (
        (plain.query(0, 1), opened.query(0, 1)),
        (plain.candidate(3), opened.candidate(3)),
        (plain.free_query("zoe", "", 2), opened.free_query("zoe", "", 2)),
        (plain.completion(0, 0, 2).tokens, opened.completion(0, 0, 2).tokens),
    ):
        assert other.tolist() == [1, *text.tolist()]
    assert opened.completion(0, 0, 2).answer_start == plain.completion(0, 0, 2).answer_start + 1


def test_cuts_fall_on_fields_and_never_on_the_mark() -> None:
    """A token is a byte here: an entity text keeps six, a relation text three, an answer two, with the space before them."""
    verbalizer = words(max_entity_tokens=6, max_relation_tokens=3, max_answer_tokens=2)
    decode = verbalizer.tokenizer.decode
    assert decode(verbalizer.query(2, 0)) == "[ bo: a, kn ]"
    assert decode(verbalizer.candidate(2)) == "[ bo: a ]"
    assert decode(verbalizer.completion(2, 0, 0).tokens) == "[ bo: a, kn ] a</s>"
    assert decode(verbalizer.free_query("bo", "a baker of bread", 0)) == "[ bo: a, kn ]"


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("settings", [{}, {"max_entity_tokens": 4}, {"descriptions": False}])
def test_an_entity_of_the_graph_given_as_free_text_has_the_same_query(template: str, settings: dict[str, Any]) -> None:
    verbalizer = words(opening_tokenizer(), template=template, **settings)
    graph = verbalizer.graph
    for entity in range(graph.num_entities):
        for relation in range(2 * graph.num_relations):
            free = verbalizer.free_query(graph.entity_names[entity], graph.entity_descriptions[entity], relation)
            assert free.tolist() == verbalizer.query(entity, relation).tolist()


def test_an_empty_free_text_and_a_tokenizer_without_end_are_refused() -> None:
    with pytest.raises(GraphError, match="Give at least a name"):
        words().free_query("  ", "a description", 0)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"objective\.implicit=false"):
        words(tokenizer).completion(0, 0, 1)


def test_a_fingerprint_changes_with_whatever_changes_token_ids() -> None:
    graph = tiny_graph()
    other_name = dataclasses.replace(graph, entity_names=("eda", *graph.entity_names[1:]))
    other_description = dataclasses.replace(graph, entity_descriptions=("a cook", *graph.entity_descriptions[1:]))
    other_inverse = dataclasses.replace(graph, inverse_texts=("known by", "is liked by"))
    other_triples = dataclasses.replace(graph, splits={"train": graph.triples("train")[:3]})
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ada"])
    wording = dataclasses.replace(PREFIX_SHARING, candidate="{entity} #")
    different = [
        words(), words(graph=other_name), words(graph=other_description), words(graph=other_inverse), words(tokenizer),
        words(max_entity_tokens=9), words(template="published"), words(templates=wording),
    ]  # fmt: skip
    assert len({verbalizer.fingerprint() for verbalizer in different}) == len(different)
    assert (
        words(graph=other_triples).fingerprint()
        == words().fingerprint()
        == words().for_graph(tiny_graph()).fingerprint()
    )
    assert words(templates=wording).for_graph(graph).fingerprint() == words(templates=wording).fingerprint()


def merging_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with "ad", "da" and the given merges: the order decides, the vocabulary is the same."""
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"] |= {"ad": TOKENIZER_SIZE, "da": TOKENIZER_SIZE + 1}
    content["model"]["merges"] = [list(merge) for merge in merges]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def lowercasing_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def test_tokenizers_with_one_vocabulary_that_cut_otherwise_differ_in_their_fingerprint() -> None:
    ending = tiny_tokenizer()
    ending.eos_token = "<pad>"
    tokenizers = [
        tiny_tokenizer(), lowercasing_tokenizer(), opening_tokenizer(), ending, merging_tokenizer(("a", "d"), ("d", "a")),
        merging_tokenizer(("d", "a"), ("a", "d")),
    ]  # fmt: skip
    assert len({words(tokenizer).tokenizer_fingerprint() for tokenizer in tokenizers}) == len(tokenizers)
    assert len({words(tokenizer).fingerprint() for tokenizer in tokenizers}) == len(tokenizers)


def test_padding_and_truncation_that_a_caller_set_leave_the_fingerprint_as_it_is() -> None:
    padding = tiny_tokenizer()
    padding(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert padding.backend_tokenizer.padding
    assert padding.backend_tokenizer.truncation
    assert words(padding).fingerprint() == words().fingerprint()


def test_tokens_are_counted_before_any_cut() -> None:
    """A token is a byte: "ada: a poet", "ada b", "bo: a baker of bread", "cy: a poet", "dan", "eve: a sailor"."""
    assert words(max_entity_tokens=1).count_entity_tokens() == [11, 5, 20, 10, 3, 13]
    assert words(descriptions=False).count_entity_tokens() == [3, 5, 2, 2, 3, 3]


# The trie of ab, abc, abd, b: nodes a, b, c, d below each other or beside, then b at the root.
TEXTS = [np.array(text) for text in ([1, 2, 3], [2], [1, 2], [1, 2, 4])]


def test_a_trie_worked_out_by_hand() -> None:
    trie = build_trie(TEXTS, row_tokens=10)
    assert trie.token_ids.tolist() == [1, 2, 3, 4, 2]
    assert trie.depths.tolist() == [0, 1, 2, 2, 0]
    assert trie.ends.tolist() == [4, 4, 3, 4, 5]
    assert trie.last_nodes().tolist() == [2, 4, 1, 3]
    assert trie.row_starts.tolist() == [0, 5]
    assert trie.paths.tolist() == [[0, 1, 2], [4, -1, -1], [0, 1, -1], [0, 1, 3]]


@pytest.mark.parametrize("texts", [[], [np.array([1]), np.array([], dtype=np.int64)]])
def test_a_trie_of_nothing_is_refused(texts: list[Any]) -> None:
    with pytest.raises(ValueError, match="at least one t"):
        build_trie(texts, row_tokens=8)


def test_a_text_longer_than_a_row_gets_a_row_of_its_own() -> None:
    long = np.arange(9)
    trie = build_trie([np.array([3]), long, np.array([2, 2]), np.array([5])], row_tokens=3)
    assert trie.row_lengths.tolist() == [9, 3, 1]
    assert trie.token_ids[: trie.row_starts[1]].tolist() == long.tolist()


def some_texts(seed: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 3, size=generator.integers(1, 8)) for _ in range(40)]


def tries() -> list[TokenTrie]:
    settings = ((1000, True), (10, True), (1, True), (10, False))
    return [build_trie(some_texts(seed), row_tokens=row, share=share) for seed in range(3) for row, share in settings]


def test_every_text_is_read_off_its_path_and_no_row_holds_a_prefix_twice() -> None:
    for seed in range(5):
        texts = some_texts(seed)
        for row_tokens in (1, 5, 10, 1000):
            trie = build_trie(texts, row_tokens=row_tokens)
            assert (trie.row_lengths <= max(row_tokens, 7)).all()
            for text, path, length in zip(texts, trie.paths, trie.lengths, strict=True):
                assert trie.token_ids[path[:length]].tolist() == text.tolist()
                assert trie.depths[path[:length]].tolist() == list(range(length))
                rows = np.searchsorted(trie.row_starts, path[:length], side="right")
                assert len(set(rows.tolist())) == 1
        prefixes = {tuple(text[: i + 1].tolist()) for text in texts for i in range(len(text))}
        assert build_trie(texts, row_tokens=1000).num_nodes == len(prefixes)


def test_without_sharing_every_distinct_text_is_a_row() -> None:
    texts = some_texts(0)
    trie = build_trie(texts, row_tokens=10, share=False)
    distinct = {tuple(text.tolist()) for text in texts}
    rows = [trie.token_ids[a:b] for a, b in zip(trie.row_starts[:-1], trie.row_starts[1:], strict=True)]
    assert sorted(tuple(row.tolist()) for row in rows) == sorted(distinct)


def test_chunks_hold_every_row_once_and_no_more_tokens_than_asked() -> None:
    for trie in tries():
        for max_tokens in (1, 12, 25, 1000):
            chunks = trie.chunks(max_tokens)
            assert sorted(np.concatenate(chunks).tolist()) == list(range(len(trie.row_lengths)))
            for rows in chunks:
                assert len(rows) == 1 or len(rows) * trie.row_lengths[rows].max() <= max_tokens


def fewest_nodes(texts: list[tuple[int, ...]], row_tokens: int) -> int:
    """Return the fewest nodes of distinct sorted texts in rows of at most row_tokens, by trying every first row."""
    if not texts:
        return 0
    counts = []
    for end in range(1, len(texts) + 1):
        nodes = len({text[: i + 1] for text in texts[:end] for i in range(len(text))})
        if nodes <= max(row_tokens, len(texts[0])):
            counts.append(nodes + fewest_nodes(texts[end:], row_tokens))
    return min(counts)


def test_no_way_of_cutting_a_trie_repeats_fewer_tokens() -> None:
    for seed in range(10):
        texts = some_texts(seed)[:12]
        distinct = sorted({tuple(text.tolist()) for text in texts})
        for row_tokens in (3, 8, 12, 30):
            assert build_trie(texts, row_tokens=row_tokens).num_nodes == fewest_nodes(distinct, row_tokens)


def test_rows_are_filled_with_pieces_and_short_batches_evenly() -> None:
    """Subtrees of 1 to 12 nodes: rows of 64 are full but for a few places, and three rows' worth is three like rows."""
    generator = np.random.default_rng(0)
    texts = [
        np.array([i, *generator.integers(0, 2, size=generator.integers(0, 8))]) for i in range(300) for _ in range(2)
    ]
    trie = build_trie(texts, row_tokens=64)
    assert len(trie.row_lengths) <= -(-trie.num_nodes // 64) + 1
    few = build_trie(texts[:60], row_tokens=100)
    assert len(few.row_lengths) == 3
    assert few.fill(100) > 0.97


def test_fill_counts_the_padding_of_every_chunk() -> None:
    """Rows of 9, 3 and 1 tokens: together 27 places, or 9 and 6, or each alone."""
    trie = build_trie([np.arange(9), np.array([20, 20, 20]), np.array([21])], row_tokens=3)
    assert sorted(trie.row_lengths.tolist()) == [1, 3, 9]
    assert [trie.fill(tokens) for tokens in (27, 9, 1)] == [13 / 27, 13 / 15, 1.0]


def test_a_group_finds_its_nodes_and_only_those() -> None:
    generator = np.random.default_rng(1)
    for trie in tries():
        asked = np.unique(generator.integers(0, trie.num_nodes, size=9))
        seen = []
        for rows in trie.chunks(20):
            group = row_group(trie, rows)
            which, places = group.find(asked)
            assert group.nodes.ravel()[places].tolist() == asked[which].tolist()
            assert group.token_ids.ravel()[places].tolist() == trie.token_ids[asked[which]].tolist()
            seen += which.tolist()
        assert sorted(seen) == list(range(len(asked)))
        group = row_group(trie, trie.chunks(20)[0])
        assert [len(part) for part in group.find(np.zeros(0, dtype=np.int64))] == [0, 0]


def test_padding_of_a_group_sees_itself_only() -> None:
    trie = build_trie([np.array([1, 2, 3]), np.array([4])], row_tokens=1)
    group = row_group(trie, np.array([0, 1]))
    assert group.nodes.tolist() == [[0, 1, 2], [3, -1, -1]]
    assert group.ends.tolist() == [[3, 3, 3], [1, 2, 3]]
    assert group.token_ids[1].tolist() == [4, 0, 0]
