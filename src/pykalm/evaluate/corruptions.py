"""False triples to be told from true ones: an entity is exchanged so that nothing known becomes false. EVALUATION.md §2."""

import numpy as np

from pykalm.errors import GraphError
from pykalm.graph.graph import IntArray, KnowledgeGraph, both_directions
from pykalm.graph.known import KnownAnswers, known_answers


def corrupt_triples(graph: KnowledgeGraph, triples: IntArray, *, seed: int) -> IntArray:
    """Return one false triple (N, 3) for each of N triples: head or tail, by a coin, is another entity, drawn evenly.

    No split of the graph knows the result, whatever it knows; entities of one name count as one, since their questions
    read the same. Where every entity would be right on the one side, the other is taken. Raises GraphError where it
    would be right on both.
    """
    generator = np.random.default_rng([seed, len(triples)])
    known, bearers = known_answers(graph), _bearers(graph)
    sides = generator.permutation((np.arange(len(triples)) + generator.integers(2)) % 2)  # as many heads as tails
    rows = both_directions(triples, graph.num_relations)
    false = triples.copy()
    for place, side in enumerate(sides.tolist()):
        for column, row in ((2, rows[place]), (0, rows[place + len(triples)]))[:: 1 if side else -1]:
            wrong = _wrong_answers(row, known, bearers)
            if len(wrong):
                false[place, column] = generator.choice(wrong)
                break
        else:
            raise GraphError(_no_corruption(graph, triples[place]))
    return false


def hard_negatives(graph: KnowledgeGraph, split: str, *, limit: int | None, seed: int) -> IntArray:
    """Return the false triples (N, 3) that a graph ships for a split, or `limit` of them drawn by seed; maybe none.

    Those that a split of the graph knows as true are left out.
    """
    rows = graph.negatives.get(split, np.zeros((0, 3), dtype=np.int64))
    if limit is not None and limit < len(rows):
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), size=limit, replace=False))]
    true = {tuple(triple) for triples in graph.splits.values() for triple in triples.tolist()}
    return rows[np.array([tuple(row) not in true for row in rows.tolist()], dtype=np.bool_)]


def _bearers(graph: KnowledgeGraph) -> IntArray:
    """Return for every entity (E,) the first one of its name."""
    first: dict[str, int] = {}
    names = [first.setdefault(name, place) for place, name in enumerate(graph.entity_names)]
    return np.array(names, dtype=np.int64)


def _wrong_answers(row: IntArray, known: KnownAnswers, bearers: IntArray) -> IntArray:
    """Return the entities that, by name, do not answer (head, relation, ?), whoever bears the head's name."""
    heads = np.flatnonzero(bearers == bearers[row[0]])
    right = np.zeros(len(bearers), dtype=np.bool_)
    right[bearers[known.lookup(heads, np.full_like(heads, row[1]))[1]]] = True
    return np.flatnonzero(~right[bearers])


def _no_corruption(graph: KnowledgeGraph, triple: IntArray) -> str:
    head, relation, tail = triple.tolist()
    return (
        f"graph '{graph.name}': wanted a false triple beside ({graph.entity_names[head]}, {graph.relation_texts[relation]}, "
        f"{graph.entity_names[tail]}), found that every entity would make it true. Leave classification out: --tasks "
        "tail,head,relation."
    )
