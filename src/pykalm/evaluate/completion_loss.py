"""How well a model completes triples that it was not trained on: L_imp of a split. METHOD.md §3."""

from pykalm.evaluate.links import choose_triples
from pykalm.graph.graph import KnowledgeGraph, both_directions
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.likelihood import answer_log_likelihoods
from pykalm.text.verbalize import Verbalizer


def completion_loss(
    graph: KnowledgeGraph,
    encoder: Encoder,
    verbalizer: Verbalizer,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Return the mean −log p over all answer and end tokens of a split's triples in both directions, in nats.

    limit: so many triples, drawn by seed. Raises GraphError for a split that is missing or empty, ModelError for a tokenizer
    without an end token. All processes call it alike.
    """
    triples, _ = choose_triples(graph, split, limit, seed)
    completions = verbalizer.completions(*both_directions(triples, graph.num_relations).T)
    likelihoods = answer_log_likelihoods(encoder, completions, progress=progress)
    return -float(likelihoods.sum()) / int(completions.num_answer_tokens.sum())
