"""Law 9: strings, tokens and scores of a triple agree between training, evaluation and serving."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pykalm.config import Config
from pykalm.evaluate.links import evaluate_links
from pykalm.graph.known import known_answers
from pykalm.learn import step
from pykalm.model import index
from pykalm.model.index import build_index
from pykalm.model.run import Run
from pykalm.text.verbalize import Verbalizer
from pykalm.use.predict import Predictor
from tests.laws.common import build_batch, gradients, replaced, tiny_encoder, tiny_graph, tiny_verbalizer


def spy_on_training(run: Run) -> dict[tuple[str, str], float]:
    """Take one training step and return the cosine of every (query text, candidate text) that its loss saw."""
    batch = build_batch(run.encoder, run.verbalizer)
    seen: dict[str, torch.Tensor] = {}
    right = step.dual_view_loss

    def spy(query: torch.Tensor, candidates: torch.Tensor, **rest: Any) -> torch.Tensor:
        seen["scores"] = (query @ candidates.T).detach()
        return right(query, candidates, **rest)

    with replaced(step, "dual_view_loss", spy):
        gradients(run.encoder, batch)
    decode, paths = run.verbalizer.tokenizer.decode, batch.trie.paths
    spelled = {int(path[path >= 0][-1]): decode(batch.trie.token_ids[path[path >= 0]]) for path in paths}
    return {
        (spelled[int(q)], spelled[int(c)]): float(seen["scores"][i, j])
        for i, q in enumerate(batch.query_nodes)
        for j, c in enumerate(batch.candidate_nodes)
    }


def run_of(**settings: Any) -> Run:
    graph = tiny_graph()
    return Run(Path("."), Config(graph="people"), graph, tiny_encoder(), tiny_verbalizer(graph, **settings))


def test_training_evaluation_and_serving_agree() -> None:
    """Every query of train: the text, and its cosine with every entity, to 2e-6 (float32, other rows of the trie)."""
    for settings in ({}, {"template": "published"}, {"max_entity_tokens": 6, "max_relation_tokens": 5}):
        run = run_of(**settings)
        trained = spy_on_training(run)
        graph, texts, encoder = run.graph, run.verbalizer, run.encoder
        report, vectors = evaluate_links(graph, encoder, texts, split="train")
        predictor = Predictor(graph, encoder, texts, vectors)
        decode = texts.tokenizer.decode
        for head, relation, tail in graph.both_directions("train"):
            query, candidate = decode(texts.query(head, relation)), decode(texts.candidate(tail))
            forward = relation < graph.num_relations
            answers = predictor.predict(
                **{"head" if forward else "tail": graph.entity_ids[head]}, k=6,
                relation=graph.relation_ids[relation % graph.num_relations],
            ).answers  # fmt: skip
            served = {answer.entity: answer.score for answer in answers}[graph.entity_ids[tail]]
            assert abs(served - trained[query, candidate]) < 2e-6, (query, candidate)
            free = texts.free_query(graph.entity_names[head], graph.entity_descriptions[head], int(relation))
            assert np.array_equal(free, texts.query(head, relation))
        assert abs(report.mean.mrr - mrr_by_hand(run, trained)) < 1e-12  # added up in another order


def mrr_by_hand(run: Run, trained: dict[tuple[str, str], float]) -> float:
    """Rank train by the cosines that training saw, filtered by all splits, in a loop."""
    graph, decode = run.graph, run.verbalizer.tokenizer.decode
    known = known_answers(graph)
    reciprocal = []
    vectors = build_index(run.encoder, run.verbalizer, graph.num_entities)
    for head, relation, tail in graph.both_directions("train"):
        text = decode(run.verbalizer.query(head, relation))
        scores = [trained.get((text, decode(run.verbalizer.candidate(e)))) for e in range(graph.num_entities)]
        if None in scores:  # an entity that no training triple holds
            scores = vectors.scores(run.encoder.embed([run.verbalizer.query(head, relation)]))[0].tolist()
        others = set(known.answers(int(head), int(relation)).tolist()) - {int(tail)}
        better = sum(scores[e] > scores[tail] for e in range(graph.num_entities) if e not in others)
        reciprocal.append(1 / (1 + better))
    return float(np.mean(reciprocal))


def serving_forgets_the_description() -> AbstractContextManager[None]:
    right = Verbalizer.free_query
    return replaced(Verbalizer, "free_query", lambda self, name, description, relation: right(self, name, "", relation))


def evaluation_pools_without_the_mark() -> AbstractContextManager[None]:
    """Embed the texts of an evaluation bare, while training closes them with a mark. METHOD.md §7.6."""
    right = index.distinct_texts
    return replaced(index, "distinct_texts", lambda texts: right([text[:-1] for text in texts]))


def inverse_queries_are_worded_forward() -> AbstractContextManager[None]:
    """Ask (t, r⁻¹, ?) with the words of r when serving one query."""
    right = Verbalizer.query

    def wrong(self: Verbalizer, head: int, relation: int) -> Any:
        import sys

        served = sys._getframe(1).f_code.co_name == "_query"
        return right(self, head, relation % self.graph.num_relations if served else relation)

    return replaced(Verbalizer, "query", wrong)


BREAKS = {
    "serving forgets the description": serving_forgets_the_description,
    "evaluation pools without the mark": evaluation_pools_without_the_mark,
    "inverse queries are worded forward": inverse_queries_are_worded_forward,
}
CHECKS = dict.fromkeys(BREAKS, "test_training_evaluation_and_serving_agree")
