"""Claims about the part of a graph that valid is measured on: what it holds, and that its filter is right."""

import numpy as np
import pytest

from pykalm.evaluate.links import evaluate_links, validation_mrr
from pykalm.graph.graph import KnowledgeGraph
from pykalm.graph.subgraph import restrict_entities, sample_for_validation
from pykalm.text.trie import IntArray
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer


def rows(triples: IntArray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in triples.tolist()]


def ring(count: int = 12) -> KnowledgeGraph:
    """Return a graph where i knows i + 1 and i + 2; every fourth of the first kind is valid."""
    near = [(i, 0, (i + 1) % count) for i in range(count)]
    far = [(i, 0, (i + 2) % count) for i in range(count)]
    names = tuple(f"person {i}" for i in range(count))
    return KnowledgeGraph(
        name="ring",
        entity_ids=names,
        entity_names=names,
        entity_descriptions=("",) * count,
        relation_ids=("knows",),
        relation_texts=("knows",),
        inverse_texts=("is known by",),
        splits={"train": np.array(near[4:] + far), "valid": np.array(near[:4])},
        negatives={},
    )


def test_a_restricted_graph_keeps_the_triples_among_its_entities() -> None:
    """Of six people, ada (0), bo (2) and cy (3) are kept: five triples of train lie among them or not, by hand."""
    part = restrict_entities(tiny_graph(), np.array([3, 0, 2]))
    assert part.entity_ids == ("p0", "p2", "p3")
    assert part.entity_names == ("ada", "bo", "cy")
    assert part.entity_descriptions == ("a poet", "a baker of bread", "a poet")
    # ada knows bo, ada knows cy, bo likes cy, cy likes bo; dan and ada b are gone, and the two last triples need eve.
    assert rows(part.triples("train")) == [(0, 0, 1), (0, 0, 2), (1, 1, 2), (2, 1, 1)]
    assert rows(part.triples("valid")) == rows(part.triples("test")) == []


def test_a_sample_holds_the_drawn_triples_their_entities_and_all_that_is_known_of_these() -> None:
    graph = ring()
    part = sample_for_validation(graph, triples=2, entities=5, seed=3)
    assert part.num_entities == 5
    assert len(part.triples("valid")) == 2
    names = set(part.entity_names)
    spelled = {
        split: {(part.entity_names[h], part.entity_names[t]) for h, _, t in part.triples(split)}
        for split in part.splits
    }
    for split in ("train", "valid"):
        inside = {(graph.entity_names[h], graph.entity_names[t]) for h, _, t in graph.triples(split)}
        inside = {pair for pair in inside if set(pair) <= names}
        wanted = spelled["train"] if split == "train" else spelled["valid (not drawn)"]
        assert wanted == inside
    assert spelled["valid"] <= spelled["valid (not drawn)"]


def test_a_sample_is_drawn_by_seed_and_never_lacks_an_entity_of_its_triples() -> None:
    graph = ring()
    one, same = (sample_for_validation(graph, triples=2, entities=6, seed=1) for _ in range(2))
    assert one.fingerprint() == same.fingerprint()
    drawn = {sample_for_validation(graph, triples=2, entities=6, seed=seed).entity_names for seed in range(8)}
    assert len(drawn) > 1
    few = sample_for_validation(graph, triples=None, entities=1, seed=0)
    assert set(few.entity_names) == {f"person {i}" for i in range(5)}  # valid is 0→1, 1→2, 2→3, 3→4


def test_taking_all_gives_the_mrr_of_the_whole_graph() -> None:
    """None and numbers beyond what there is, against the graph itself."""
    graph, encoder = ring(), tiny_encoder()
    wanted = validation_mrr(graph, encoder, tiny_verbalizer(graph))
    for triples, entities in ((None, None), (99, 99), (4, 12)):
        sample = sample_for_validation(graph, triples=triples, entities=entities, seed=0)
        assert validation_mrr(sample, encoder, tiny_verbalizer(sample)) == wanted


def test_the_filter_of_a_sample_knows_what_the_whole_graph_knows() -> None:
    """A sampled triple ranks as in the whole graph when all entities are candidates: known others stay removed."""
    graph, encoder = ring(), tiny_encoder()
    verbalizer = tiny_verbalizer(graph)
    whole, _ = evaluate_links(graph, encoder, verbalizer, split="valid")
    rank_of = {
        (*row, side): int(rank)
        for side, table in (("tail", whole.tail), ("head", whole.head))
        for row, rank in zip(rows(whole.triples), table.optimistic, strict=True)
    }
    for seed in range(4):
        sample = sample_for_validation(graph, triples=2, entities=None, seed=seed)
        part, _ = evaluate_links(sample, encoder, verbalizer.for_graph(sample), split="valid")
        assert len(part.triples) == 2
        for side, table in (("tail", part.tail), ("head", part.head)):
            for row, rank in zip(rows(part.triples), table.optimistic, strict=True):
                assert rank == rank_of[*row, side]


def test_ranks_in_a_restricted_graph_equal_a_loop_over_its_entities() -> None:
    graph, encoder = ring(), tiny_encoder()
    sample = sample_for_validation(graph, triples=3, entities=8, seed=2)
    verbalizer = tiny_verbalizer(graph)
    report, _ = evaluate_links(sample, encoder, verbalizer.for_graph(sample), split="valid")
    original = [graph.entity_names.index(name) for name in sample.entity_names]
    true = {(int(h), int(t)) for split in graph.splits for h, _, t in graph.triples(split)}
    reciprocal = []
    for head, _, tail in report.triples:
        for forward in (True, False):
            asked, answer = (original[head], original[tail]) if forward else (original[tail], original[head])
            query = encoder.embed([verbalizer.query(asked, 0 if forward else 1)])[0]
            score = {e: float(encoder.embed([verbalizer.candidate(e)])[0] @ query) for e in original}
            known = {e for e in original if ((asked, e) if forward else (e, asked)) in true} - {answer}
            reciprocal.append(1 / (1 + sum(score[e] > score[answer] for e in original if e not in known)))
    assert report.mean.mrr == pytest.approx(np.mean(reciprocal))
