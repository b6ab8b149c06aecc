"""The same ranking by PyKEEN's RankBasedEvaluator, which is an optional extra: pip install -e '.[bench]'."""

import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykalm.evaluate.ranking import FloatArray
from pykalm.graph.graph import KnowledgeGraph

BATCH_SIZE = 256
MISSING = "pykeen is not installed: pip install -e '.[bench]'"


def pykeen_version() -> str | None:
    """Return the version of PyKEEN that is installed, if there is one."""
    try:
        return version("pykeen")
    except PackageNotFoundError:
        return None


def pykeen_ranking(
    graph: KnowledgeGraph, split: str, *, keys: Tensor, query: Tensor, entities: Tensor
) -> Callable[[], FloatArray]:
    """Return what ranks a split by PyKEEN's evaluator: realistic ranks (2N,), tail side first.

    keys (K,), ascending: head · 2R + relation of every query; query (K, D) their vectors; entities (E, D).
    """
    from pykeen.evaluation import RankBasedEvaluator  # noqa: PLC0415  # an optional extra

    for name in ("pykeen", "torch_max_mem"):
        logging.getLogger(name).setLevel(logging.ERROR)
    model = _model(graph, keys, query, entities)
    triples = torch.from_numpy(graph.triples(split))
    others = [torch.from_numpy(graph.triples(other)) for other in graph.splits if other != split]

    def ranks() -> FloatArray:
        evaluator = RankBasedEvaluator(clear_on_finalize=False)
        evaluator.evaluate(model, triples, batch_size=BATCH_SIZE, use_tqdm=False, additional_filter_triples=others)
        sides = [np.concatenate(evaluator.ranks[side, "realistic"]) for side in ("tail", "head")]
        return np.concatenate(sides).astype(np.float64)

    return ranks


def _model(graph: KnowledgeGraph, keys: Tensor, query: Tensor, entities: Tensor) -> Any:
    """Return a model of PyKEEN's kind that scores given vectors by their inner product."""
    from pykeen.models import Model  # noqa: PLC0415  # an optional extra
    from pykeen.triples import CoreTriplesFactory  # noqa: PLC0415  # an optional extra

    inverse = graph.num_relations

    class VectorModel(Model):  # type: ignore[misc]  # what PyKEEN evaluates must be derived from its class
        """Look a query's vector up by its key, and multiply it with all entities'."""

        def _scores(self, given: Tensor, relation: Tensor) -> Tensor:
            rows = torch.searchsorted(keys, given * (2 * inverse) + relation)
            return query[rows] @ entities.T

        def score_t(self, hr_batch: Tensor, **ignored: object) -> Tensor:
            return self._scores(hr_batch[:, 0], hr_batch[:, 1])

        def score_h(self, rt_batch: Tensor, **ignored: object) -> Tensor:
            return self._scores(rt_batch[:, 1], rt_batch[:, 0] + inverse)

        def score_hrt(self, hrt_batch: Tensor, **ignored: object) -> Tensor:
            return self.score_t(hrt_batch[:, :2]).gather(1, hrt_batch[:, 2:])

        def score_r(self, ht_batch: Tensor, **ignored: object) -> Tensor:
            raise TypeError("relations are not ranked here: there are vectors for the asked queries only.")

        def collect_regularization_term(self) -> int:
            return 0

        def _get_entity_len(self, **ignored: object) -> int:
            return graph.num_entities

        def _reset_parameters_(self) -> None:
            pass

    factory = CoreTriplesFactory.create(
        torch.from_numpy(graph.triples("train")), num_entities=graph.num_entities, num_relations=graph.num_relations
    )
    model = VectorModel(triples_factory=factory, loss="marginranking", random_seed=0)
    model.register_buffer("entities", entities)  # PyKEEN computes where a model's buffers are
    return model
