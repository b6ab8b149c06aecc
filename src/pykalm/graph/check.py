"""Check a graph before hours are spent on it: counts, duplicates, overlaps, same texts, leaks."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pykalm.errors import GraphError
from pykalm.graph.graph import SPLITS, IntArray, KnowledgeGraph
from pykalm.graph.leaks import distinct_triples, inverse_leaks, triple_keys

_EXAMPLES = 3


@dataclass(frozen=True)
class SharedTexts:
    """Count the entities whose text another entity has too, and the distinct texts that they share."""

    entities: int
    texts: int


@dataclass(frozen=True)
class GraphCheck:
    """Hold what was counted in a graph; `problems` and `remarks` say it in sentences.

    Dictionaries go by split ("train") or pair of splits ("train/test"). `duplicates` counts rows beyond the
    first, `overlaps` and `inverse_leaks` distinct triples, `unseen_entities` distinct entities that train
    lacks. `cut_texts` is None where no tokenizer was given. `examples` shows up to three cases of
    each kind.
    """

    name: str
    num_entities: int
    num_relations: int
    triples: dict[str, int]
    negatives: dict[str, int]
    duplicates: dict[str, int]
    overlaps: dict[str, int]
    true_negatives: dict[str, int]
    unseen_entities: dict[str, int]
    unused_entities: int
    unused_relations: int
    shared_names: SharedTexts
    shared_texts: SharedTexts
    inverse_leaks: dict[str, int]
    cut_texts: int | None
    max_entity_tokens: int
    untrainable: str | None
    examples: dict[str, tuple[str, ...]]

    @property
    def problems(self) -> list[str]:
        """Say what makes results wrong: it should be mended before training."""
        found = [self.untrainable] if self.untrainable else []
        found += [f"{split}: {count} rows repeat an earlier one." for split, count in _some(self.duplicates)]
        found += [f"{pair}: {count} triples are in both splits." for pair, count in _some(self.overlaps)]
        found += [
            f"{split} negatives: {count} are true, being in a split." for split, count in _some(self.true_negatives)
        ]
        found += [
            f"{split} negatives: {count} rows for {self.triples.get(split, 0)} positives."
            for split, count in self.negatives.items()
            if count != self.triples.get(split, 0)
        ]
        return found

    @property
    def remarks(self) -> list[str]:
        """Say what is worth knowing about the graph, though nothing is wrong with it."""
        found = [
            f"{split}: {count} {'entity is' if count == 1 else 'entities are'} not in train."
            for split, count in _some(self.unseen_entities)
        ]
        for split, count in _some(self.inverse_leaks):
            share = 100 * count / self.triples[split]
            found.append(f"{split}: {count} triples ({share:.1f} %) stand in train the other way round.")
        for what, shared in (("name", self.shared_names), ("text", self.shared_texts)):
            if shared.entities:
                found.append(f"{shared.entities} entities share their {what} with another ({shared.texts} texts).")
        if self.unused_entities or self.unused_relations:
            unused = f"{self.unused_entities} entities and {self.unused_relations} relations"
            found.append(f"{unused} are in no triple.")
        if self.cut_texts is None:
            cut = f"Entity texts of more than {self.max_entity_tokens} tokens, which would be cut"
            found.append(f"{cut}, are not counted: give the model (--model).")
        elif self.cut_texts:
            found.append(f"{self.cut_texts} entity texts are cut at {self.max_entity_tokens} tokens.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON, problems and remarks included."""
        return {**asdict(self), "problems": self.problems, "remarks": self.remarks}


def check_graph(
    graph: KnowledgeGraph,
    text_tokens: Sequence[int] | None = None,
    *,
    max_entity_tokens: int = 50,
) -> GraphCheck:
    """Count what can be wrong with a graph.

    text_tokens (E,): the number of tokens of each entity's text before any cut, where a tokenizer is at hand.
    """
    texts = list(zip(graph.entity_names, graph.entity_descriptions, strict=True))
    train, later = distinct_triples(graph, "train"), [split for split in SPLITS[1:] if split in graph.splits]
    in_train, leaks = np.unique(train[:, [0, 2]]), {split: inverse_leaks(graph, split) for split in later}
    unseen = {split: np.setdiff1d(graph.splits[split][:, [0, 2]], in_train) for split in later}
    overlaps = _overlaps(graph)
    every = np.concatenate(list(graph.splits.values()))
    known = triple_keys(graph, every)
    true = {split: triple_keys(graph, rows) for split, rows in graph.negatives.items()}
    return GraphCheck(
        name=graph.name,
        num_entities=graph.num_entities,
        num_relations=graph.num_relations,
        triples={split: len(rows) for split, rows in graph.splits.items()},
        negatives={split: len(rows) for split, rows in graph.negatives.items()},
        duplicates={split: len(rows) - len(distinct_triples(graph, split)) for split, rows in graph.splits.items()},
        overlaps={pair: len(rows) for pair, rows in overlaps.items()},
        true_negatives={split: int(np.isin(keys, known).sum()) for split, keys in true.items()},
        unseen_entities={split: len(entities) for split, entities in unseen.items()},
        unused_entities=graph.num_entities - len(np.unique(every[:, [0, 2]])),
        unused_relations=graph.num_relations - len(np.unique(every[:, 1])),
        shared_names=_count_shared(graph.entity_names),
        shared_texts=_count_shared(texts),
        inverse_leaks={split: len(rows) for split, rows in leaks.items()},
        cut_texts=None if text_tokens is None else sum(count > max_entity_tokens for count in text_tokens),
        max_entity_tokens=max_entity_tokens,
        untrainable=_untrainable(graph),
        examples=_examples(graph, overlaps, leaks, unseen),
    )


def _overlaps(graph: KnowledgeGraph) -> dict[str, IntArray]:
    found = {}
    splits = [split for split in SPLITS if split in graph.splits]
    for position, first in enumerate(splits):
        for second in splits[position + 1 :]:
            rows = distinct_triples(graph, second)
            shared: npt.NDArray[np.bool_] = np.isin(triple_keys(graph, rows), triple_keys(graph, graph.splits[first]))
            found[f"{first}/{second}"] = rows[shared]
    return found


def _count_shared(texts: Iterable[Hashable]) -> SharedTexts:
    shared = [count for count in Counter(texts).values() if count > 1]
    return SharedTexts(entities=sum(shared), texts=len(shared))


def _untrainable(graph: KnowledgeGraph) -> str | None:
    try:
        graph.require_trainable()
    except GraphError as error:
        return str(error)
    return None


def _examples(
    graph: KnowledgeGraph,
    overlaps: dict[str, IntArray],
    leaks: dict[str, IntArray],
    unseen: dict[str, IntArray],
) -> dict[str, tuple[str, ...]]:
    """Show up to three cases of each kind, in ids; kinds without a case are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for kind, cases in (("overlap", overlaps), ("inverse leak", leaks)):
        for where, rows in cases.items():
            found[f"{kind} {where}"] = tuple(_triple(graph, row) for row in rows[:_EXAMPLES].tolist())
    for split, entities in unseen.items():
        found[f"unseen {split}"] = tuple(graph.entity_ids[entity] for entity in entities[:_EXAMPLES].tolist())
    names = Counter(graph.entity_names).most_common(_EXAMPLES)
    found["shared name"] = tuple(f"{name} ({count})" for name, count in names if count > 1)
    return {kind: cases for kind, cases in found.items() if cases}


def _triple(graph: KnowledgeGraph, row: Sequence[int]) -> str:
    return f"{graph.entity_ids[row[0]]} {graph.relation_ids[row[1]]} {graph.entity_ids[row[2]]}"


def _some(counts: dict[str, int]) -> list[tuple[str, int]]:
    return [(where, count) for where, count in counts.items() if count]
