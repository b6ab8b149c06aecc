"""Claims about the bench's ways of ranking: each ranks as it says, on the same vectors."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pykalm.bench import ranking
from pykalm.bench.pykeen_ranks import MISSING, pykeen_ranking, pykeen_version
from pykalm.bench.ranking import RankingTask, kalm_ranks, plain_ranks, published_ranks
from pykalm.graph.known import KnownAnswers
from tests.laws.common import tiny_graph


def task() -> RankingTask:
    return RankingTask.build(tiny_graph(), width=2, seed=3, device=torch.device("cpu"))


def by_hand() -> RankingTask:
    """Return one query (0, 0, ?) with the answer 2 and scores 3, 2, 1, 1.5, .5, 1; 0 and 3 are known answers too."""
    rows = np.array([[0, 0, 2]])
    known = KnownAnswers.build(np.array([[0, 0, 0], [0, 0, 2], [0, 0, 3]]), num_relations=1)
    query = torch.ones(1, 1)
    entities = torch.tensor([[3.0], [2.0], [1.0], [1.5], [0.5], [1.0]])
    return RankingTask(tiny_graph(), "test", rows, torch.zeros(1, dtype=torch.int64), query, query, entities, known)


def test_a_plain_rank_leaves_known_answers_out_and_halves_ties() -> None:
    """Above the answer is 1; 5 is level with it."""
    assert plain_ranks(by_hand(), np.array([0])).tolist() == [2.5]


def test_the_published_loop_takes_one_off_known_answers() -> None:
    """So 0, with 3 − 1, still stands above the answer, 3, with 1.5 − 1, no longer; the answer loses nothing."""
    without_ties = dataclasses.replace(by_hand(), entities=by_hand().entities[:5])
    ranks = published_ranks(without_ties, np.array([0]), {(0, 0, 0), (0, 0, 2), (0, 0, 3)})
    assert ranks.tolist() == [3]


def test_kalm_ranks_as_a_plain_loop_does() -> None:
    every = np.arange(len(task().rows))
    assert kalm_ranks(task()).tolist() == plain_ranks(task(), every).tolist()


def test_kalm_ranks_where_the_vectors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU beside the others, which compute there."""
    asked: list[Any] = []
    right = ranking.rank_links

    def spy(*given: Any, **options: Any) -> Any:
        asked.append(options.get("device"))
        return right(*given, **options)

    monkeypatch.setattr(ranking, "rank_links", spy)
    built = task()
    kalm_ranks(built)
    assert asked == [built.query.device]


@pytest.mark.skipif(pykeen_version() is None, reason=MISSING)
def test_kalm_ranks_as_pykeen_does() -> None:
    """Two columns of small whole numbers: many scores are equal."""
    built = task()
    assert len(np.unique((built.query @ built.entities.T).numpy())) < built.query.shape[0] * built.entities.shape[0]
    ranks = pykeen_ranking(built.graph, built.split, keys=built.keys, query=built.distinct, entities=built.entities)()
    assert ranks.tolist() == kalm_ranks(built).tolist()
