"""What re-ranking brings: the mix chosen on valid, then both orders on the split that is asked, with paired intervals."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pykalm.errors import UsageError
from pykalm.evaluate.bootstrap import SAMPLES, difference_intervals, metric_intervals, plain_intervals, triple_scores
from pykalm.evaluate.links import LinkPredictionReport
from pykalm.evaluate.ranking import CHUNK_QUERIES, rank_metrics
from pykalm.evaluate.rerank import MIXES, PLAIN, K, Mix, Shortlisted, choose_mix, shortlist_links
from pykalm.files import replace_file
from pykalm.graph.graph import KnowledgeGraph
from pykalm.model.encoder import Encoder, Progress
from pykalm.model.index import EntityIndex
from pykalm.text.verbalize import Verbalizer

VALID = "valid"


@dataclass(frozen=True, eq=False)
class RerankReport:
    """Hold what was read on valid and on the asked split, the mix that valid chose, and all that the numbers belong to."""

    graph: KnowledgeGraph
    split: str
    k: int
    mix: Mix
    valid: Shortlisted
    asked: Shortlisted
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        """Return one sentence that says how the ranks came about."""
        return (
            f"filtered by {', '.join(self.graph.splits)}; all {self.graph.num_entities} entities are candidates, the first "
            f"{self.k} of them ordered by cosine / τ + weight · log likelihood of the answer; both directions; realistic "
            f"ranks; {self.asked.sampling}; weight and normalisation chosen by the MRR on {VALID}, {self.valid.sampling}; "
            f"intervals of 95 %, {SAMPLES} bootstrap samples of triples"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report without the ranks, for JSON."""
        plain, reranked = (triple_scores(*self.asked.sides(mix)) for mix in (PLAIN, self.mix))
        return {
            "graph": self.graph.name, "split": self.split, "protocol": self.protocol, **self.about,
            "k": self.k, "weight": self.mix.weight, "normalisation": self.mix.normalisation,
            "temperature": self.asked.temperature,
            "valid": self._valid(),
            "num_triples": len(self.asked.triples),
            "share_listed": len(self.asked.rows) / len(self.asked.plain),
            "plain": rank_metrics(self.asked.ranks(PLAIN)).to_dict(),
            "reranked": rank_metrics(self.asked.ranks(self.mix)).to_dict(),
            "intervals": {"plain": plain_intervals(metric_intervals(plain)),
                          "reranked": plain_intervals(metric_intervals(reranked))},
            "difference": plain_intervals(difference_intervals(reranked, plain)),
        }  # fmt: skip

    def _valid(self) -> dict[str, Any]:
        """Return the MRR of every mix on valid, and the metrics of the one that was chosen beside the plain ones."""
        tried = [
            {"weight": mix.weight, "normalisation": mix.normalisation, "mrr": self.valid.mrr(mix)} for mix in MIXES
        ]
        return {
            "split": VALID,
            "num_triples": len(self.valid.triples),
            "plain": rank_metrics(self.valid.ranks(PLAIN)).to_dict(),
            "reranked": rank_metrics(self.valid.ranks(self.mix)).to_dict(),
            "tried": tried,
        }

    def save(self, folder: Path, name: str = "rerank") -> Path:
        """Write `name`.ranks.tsv, the ranks after re-ranking, and `name`.json; return the path of the latter."""
        tail, head = self.asked.sides(self.mix)
        ranks = LinkPredictionReport(self.graph, self.split, self.protocol, self.asked.triples, tail, head)
        ranks.save_ranks(folder, name)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / f"{name}.json", lambda file: file.write_text(text, encoding="utf-8"))
        return folder / f"{name}.json"


def rerank_links(
    graph: KnowledgeGraph,
    encoder: Encoder,
    verbalizer: Verbalizer,
    index: EntityIndex,
    *,
    split: str = "test",
    k: int = K,
    limit: int | None = None,
    valid_limit: int | None = None,
    seed: int = 0,
    chunk_queries: int = CHUNK_QUERIES,
    device: torch.device | str = "cpu",
    about: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> RerankReport:
    """Choose the mix of both models on valid and measure it on another split. Raises UsageError where that is valid too."""
    if split == VALID:
        raise UsageError("wanted a split to measure on, found valid, on which the weight is chosen. Take --split test.")
    valid, asked = (
        shortlist_links(
            graph, encoder, verbalizer, index, split=part, k=k, limit=number, seed=seed, chunk_queries=chunk_queries,
            device=device, progress=progress,
        )
        for part, number in ((VALID, valid_limit), (split, limit))
    )  # fmt: skip
    return RerankReport(graph, split, k, choose_mix(valid), valid, asked, about or {})
