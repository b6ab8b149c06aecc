"""What can be said of a run or a question before a model is read, so that nobody waits for a mistake."""

from pathlib import Path

from pykalm.config import Config
from pykalm.evaluate.links import choose_triples
from pykalm.graph.graph import KnowledgeGraph
from pykalm.learn.state import has_finished
from pykalm.resolve import resolve_settings
from pykalm.use.predict import find_entity

__all__ = ["has_ended", "require_names", "require_split"]


def has_ended(out: str | Path, *, config: Config | None = None) -> bool:
    """Return whether the training of a run came to its end, without reading its model.

    Raises RunError where there is no run, ConfigError for a config that it did not begin with.
    """
    resolve_settings(config, {}, Path(out), is_loaded=False)
    return has_finished(Path(out))


def require_names(graph: KnowledgeGraph, *, relation: str, entity: str | None = None) -> None:
    """Raise GraphError, with the nearest names, where a graph lacks what `predict` would be asked about."""
    graph.find_relation(relation)
    if entity is not None:
        find_entity(graph, entity)


def require_split(graph: KnowledgeGraph, config: Config, split: str | None) -> None:
    """Raise GraphError where a graph has no triples in a split, evaluation.split of the settings by default."""
    choose_triples(graph, config.evaluation.split if split is None else split, None, 0)
