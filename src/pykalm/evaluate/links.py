"""Link prediction: both directions of a split's triples, ranked among all entities. EVALUATION.md §1."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pykalm.errors import GraphError, UsageError
from pykalm.evaluate.ranking import (
    CHUNK_QUERIES,
    RankMetrics,
    RankTable,
    join_rank_tables,
    rank,
    rank_metrics,
)
from pykalm.files import replace_file
from pykalm.graph.graph import IntArray, KnowledgeGraph, both_directions
from pykalm.graph.known import known_answers
from pykalm.model.encoder import Progress
from pykalm.model.index import EntityIndex, TextEncoder, distinct_texts, embed_with_entities
from pykalm.text.texts import Texts, TokenIds

RANKS_HEADER = "head\trelation\ttail\tdirection\toptimistic\trealistic\tpessimistic\tnum_candidates"


class GraphTexts(Protocol):
    """Give the token sequences of queries and entities (text.verbalize.Verbalizer does)."""

    def queries(self, heads: IntArray, relations: IntArray) -> Texts | Sequence[TokenIds]: ...

    def candidates(self, entities: IntArray) -> Texts | Sequence[TokenIds]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True, eq=False)
class LinkPredictionReport:
    """Hold the ranks of N triples (N, 3) of a split in both directions, and all that the numbers belong to.

    `tail` has the ranks of t for the queries (h, r, ?), `head` those of h for the queries (t, r⁻¹, ?);
    `about` names model, text setting and seed.
    """

    graph: KnowledgeGraph
    split: str
    protocol: str
    triples: IntArray
    tail: RankTable
    head: RankTable
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def mean(self) -> RankMetrics:
        """Summarise both directions together, each query counting once."""
        return rank_metrics(join_rank_tables([self.head, self.tail]))

    def to_dict(self) -> dict[str, Any]:
        """Return the report without the ranks, for JSON; relations are named by their ids."""
        every_row = np.arange(len(self.triples))
        names = {"graph": self.graph.name, "split": self.split, "protocol": self.protocol}
        return {**names, **self.about, **self._sides(every_row), "relations": dict(self._relations())}

    def save(self, folder: Path, name: str = "links") -> Path:
        """Write `name`.ranks.tsv, with all that the numbers need, and `name`.json; returns its path."""
        self.save_ranks(folder, name)
        summary = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / f"{name}.json", partial(_write_text, text=summary))
        return folder / f"{name}.json"

    def save_ranks(self, folder: Path, name: str = "links") -> None:
        """Write `name`.ranks.tsv: every rank in both directions, from which all figures can be computed again."""
        ranks = "\n".join([RANKS_HEADER, *self._rank_lines()]) + "\n"
        replace_file(folder / f"{name}.ranks.tsv", partial(_write_text, text=ranks))

    def _sides(self, rows: IntArray) -> dict[str, object]:
        head, tail = self.head.select(rows), self.tail.select(rows)
        tables = {"mean": join_rank_tables([head, tail]), "head": head, "tail": tail}
        return {side: rank_metrics(table).to_dict() for side, table in tables.items()}

    def _relations(self) -> Iterator[tuple[str, dict[str, object]]]:
        for relation in np.unique(self.triples[:, 1]).tolist():
            rows = np.flatnonzero(self.triples[:, 1] == relation)
            texts: dict[str, object] = {"text": self.graph.relation_texts[relation], "num_triples": len(rows)}
            yield self.graph.relation_ids[relation], texts | self._sides(rows)

    def _rank_lines(self) -> Iterator[str]:
        entities, relations = self.graph.entity_ids, self.graph.relation_ids
        for direction, table in (("tail", self.tail), ("head", self.head)):
            ranks = zip(table.optimistic, table.realistic, table.pessimistic, table.num_candidates, strict=True)
            for (head, relation, tail), (low, mean, high, num) in zip(self.triples.tolist(), ranks, strict=True):
                ids = f"{entities[head]}\t{relations[relation]}\t{entities[tail]}"
                yield f"{ids}\t{direction}\t{low}\t{mean:.1f}\t{high}\t{num}"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def evaluate_links(
    graph: KnowledgeGraph,
    encoder: TextEncoder,
    texts: GraphTexts,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    index: EntityIndex | None = None,
    chunk_queries: int = CHUNK_QUERIES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    about: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> tuple[LinkPredictionReport, EntityIndex]:
    """Measure link prediction on a split, or on `limit` of its triples drawn by seed, over all entities.

    With an index only the queries are embedded, without one the entities too, in the same pass, and kept in dtype.
    Scores are computed on `device`. Returns the report and the index, to be saved. Raises GraphError for a split that
    is missing or empty, UsageError for a limit below 1, RunError for a stale index, ModelError where a score is NaN.
    """
    triples, sampling = choose_triples(graph, split, limit, seed)
    rows = both_directions(triples, graph.num_relations)
    query_texts = texts.queries(rows[:, 0], rows[:, 1])
    if index is None:
        index, query = embed_with_entities(
            encoder, texts, graph.num_entities, query_texts, dtype=dtype, progress=progress
        )
    else:
        index.require_fresh(encoder, texts)
        distinct, row_of_query = distinct_texts(query_texts)
        query = encoder.embed(distinct, progress=progress)[torch.from_numpy(row_of_query)]
    tail, head = rank_links(graph, index, query, triples, chunk_queries=chunk_queries, device=device)
    protocol = (
        f"filtered by {', '.join(graph.splits)}; all {graph.num_entities} entities are candidates; "
        f"both directions; realistic ranks; {sampling}"
    )
    return LinkPredictionReport(graph, split, protocol, triples, tail, head, about or {}), index


def validation_mrr(
    graph: KnowledgeGraph, encoder: TextEncoder, texts: GraphTexts, *, limit: int | None = None, seed: int = 0
) -> float:
    """Return the MRR on valid in both directions, or on `limit` triples of it, the same at every call."""
    report, _ = evaluate_links(graph, encoder, texts, split="valid", limit=limit, seed=seed)
    return report.mean.mrr


def rank_links(
    graph: KnowledgeGraph,
    index: EntityIndex,
    query: Tensor,
    triples: IntArray,
    *,
    chunk_queries: int = CHUNK_QUERIES,
    device: torch.device | str = "cpu",
) -> tuple[RankTable, RankTable]:
    """Rank the tails, then the heads, of N triples; query (2N, D) in the order of `both_directions`.

    Every other entity that a split knows as an answer is removed. Returns (tail side, head side). All processes call it
    with the same vectors.
    """
    rows = both_directions(triples, graph.num_relations)
    # Triples that ask the same question share its scores: on FB15k-237 nearly every other one.
    questions, first, query_of_target = np.unique(rows[:, :2], axis=0, return_index=True, return_inverse=True)
    ranks = rank(
        query[torch.from_numpy(first)],
        index.vectors,
        row_of_entity=index.row_of_entity,
        targets=rows[:, 2],
        known=known_answers(graph).lookup(questions[:, 0], questions[:, 1]),
        query_of_target=query_of_target,
        chunk_queries=chunk_queries,
        device=device,
    )
    is_tail_side = np.arange(len(rows)) < len(triples)
    return ranks.select(is_tail_side), ranks.select(~is_tail_side)


def choose_triples(graph: KnowledgeGraph, split: str, limit: int | None, seed: int) -> tuple[IntArray, str]:
    """Return the triples to ask about, in the order of the split, and words that say which these are.

    Raises UsageError for a limit below 1, GraphError for a split that is missing or empty.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"wanted a limit of at least one triple, found {limit}. Leave it out to ask about all.")
    triples = graph.triples(split)
    if not len(triples):
        raise GraphError(f"graph '{graph.name}': split '{split}' is empty. Take another one.")
    if limit is None or limit >= len(triples):
        return triples, f"all {len(triples)} triples of the split"
    chosen = np.sort(np.random.default_rng(seed).choice(len(triples), size=limit, replace=False))
    return triples[chosen], f"a sample of {limit} of the {len(triples)} triples of the split, seed {seed}"
