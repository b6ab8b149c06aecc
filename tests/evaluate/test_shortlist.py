"""Short lists against sorting, in blocks of every size: entities that share vectors, known answers, too few entities."""

import numpy as np
import pytest
import torch

from pykalm.errors import ModelError
from pykalm.evaluate.completion_loss import completion_loss
from pykalm.evaluate.shortlist import shortlist
from pykalm.model.index import EntityIndex
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer
from tests.laws.test_law_07_rerank import log_likelihood

NUM_QUERIES, NUM_ENTITIES, NUM_VECTORS = 9, 40, 31


def whole_numbers(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    """Return vectors of small whole numbers, whose products are exact, so that many scores are equal."""
    return torch.from_numpy(generator.integers(-2, 3, size=shape)).float()


@pytest.mark.parametrize(("queries", "entities"), [(1, 1), (2, 3), (4, 16), (100, 100)])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_lists_are_what_sorting_gives_in_blocks_of_every_size(queries: int, entities: int, k: int) -> None:
    generator = np.random.default_rng(0)
    query, vectors = whole_numbers(generator, NUM_QUERIES, 6), whole_numbers(generator, NUM_VECTORS, 6)
    row_of_entity = generator.integers(NUM_VECTORS, size=NUM_ENTITIES)
    known = [
        generator.choice(NUM_ENTITIES, size=size, replace=False) for size in generator.integers(1, 12, NUM_QUERIES)
    ]
    query_of_target = np.array([0, 3, 3, 8, 5])
    targets = np.array([known[question][0] for question in query_of_target])
    offsets = np.concatenate([[0], np.cumsum([len(answers) for answers in known])])
    found = shortlist(
        query, EntityIndex(vectors, row_of_entity, ""), targets=targets, query_of_target=query_of_target,
        known=(offsets, np.concatenate(known)), k=k, chunk_queries=queries, chunk_entities=entities,
    )  # fmt: skip
    scores = (query @ vectors.T).numpy()[:, row_of_entity]
    assert found.target_scores.tolist() == scores[query_of_target, targets].tolist()
    for question in range(NUM_QUERIES):
        left = np.setdiff1d(np.arange(NUM_ENTITIES), known[question])
        best = np.sort(scores[question, left])[::-1][:k]
        assert found.scores[question, : len(best)].tolist() == best.tolist()
        listed = found.entities[question, : len(best)]
        assert len(set(listed.tolist())) == len(best)
        assert set(listed.tolist()) <= set(left.tolist())
        assert scores[question, listed].tolist() == best.tolist()
        assert (found.entities[question, len(best) :] == -1).all()
        assert (found.scores[question, len(best) :] == -np.inf).all()


def test_a_vector_that_is_no_number_is_refused() -> None:
    index, none = EntityIndex(torch.full((3, 2), torch.nan), np.arange(3), ""), np.zeros(0, dtype=np.int64)
    with pytest.raises(ModelError, match="NaN"):
        shortlist(torch.ones(1, 2), index, targets=none, query_of_target=none, known=(np.zeros(2, np.int64), none), k=2)


def test_the_completion_loss_of_a_split_is_the_mean_over_its_answer_tokens() -> None:
    """Cy knows eve, and eve is known by cy: one triple of test, both ways, each read in a pass of its own."""
    encoder, verbalizer = tiny_encoder(), tiny_verbalizer(tiny_graph())
    (tail, tail_tokens), (head, head_tokens) = (
        log_likelihood(encoder, verbalizer, *question) for question in ((3, 0, 5), (5, 2, 3))
    )
    found = completion_loss(verbalizer.graph, encoder, verbalizer, split="test")
    assert found == pytest.approx(-(tail + head) / (tail_tokens + head_tokens), rel=1e-5)
