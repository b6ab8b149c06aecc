"""Link prediction more closely: by relation, by rank, and with the first answers ranked again."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

from pykalm.report.blocks import Block, Figures, Missing, Row, Section, Table
from pykalm.report.charts import columns, intervals, lying_bars, rising
from pykalm.report.drawing import tidy
from pykalm.report.records import Interval, LinksResult, RelationResult
from pykalm.report.run_files import RunFiles
from pykalm.report.sections.links import ranking_cells
from pykalm.report.tables import METRICS

RANK_BOUNDS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
SHOWN_RELATIONS = 24
ONE_PANEL = 6
"""Relations that are drawn one below the other; more are drawn in two panels."""
DIFFERENCES = {"mrr": "MRR", "hits_at_1": "H@1", "hits_at_3": "H@3", "hits_at_10": "H@10"}


def relations_section(run: RunFiles) -> Section:
    """Draw the MRR of each relation and list its numbers."""
    lead = "Where it was learned and where not: the MRR of each relation, the most frequent first."
    if not (run.links and run.links[0].any.relations):
        missing = Missing("The relations have not been measured.", (run.command("links"),))
        return Section("relations", "By relation", lead, [missing])
    labelled, main = run.links[0].by_label(), run.links[0].any.relations
    order = sorted(main, key=lambda key: (-main[key].num_triples, main[key].text))
    shown = order[:SHOWN_RELATIONS]
    middle = -(-len(shown) // 2) if len(shown) > ONE_PANEL else len(shown)
    drawings = [
        lying_bars(
            f"relations-mrr-{number}", "MRR by relation" if number == 1 else "MRR by relation, continued",
            [f"{tidy(main[key].text, 48)} · {main[key].num_triples:,}" for key in part],
            {label: [_mrr(one, key) for key in part] for label, one in labelled.items()},
        )
        for number, part in enumerate((shown[:middle], shown[middle:]), start=1)
        if part
    ]  # fmt: skip
    some = f" The {len(shown)} most frequent of {len(order)} relations." if len(order) > len(shown) else ""
    headings = ("relation", "triples", *METRICS.values(), "MRR head", "MRR tail")
    which = "aligned" if "aligned" in labelled else "unaligned"
    return Section("relations", "By relation", lead, [
        Figures(drawings, f"Mean of both directions; behind each name the number of triples.{some}"),
        Table(headings, [_relation_row(main[key]) for key in order], summary=f"All relations, {which} model"),
    ])  # fmt: skip


def _mrr(result: LinksResult, key: str) -> float:
    return result.relations[key].mean.mrr if key in result.relations else 0.0


def _relation_row(relation: RelationResult) -> Row:
    sides = (f"{side.mrr:.3f}" for side in (relation.head, relation.tail))
    return Row((relation.text, f"{relation.num_triples:,}", *ranking_cells(relation.mean), *sides))


def ranks_section(run: RunFiles) -> Section:
    """Draw how the ranks of the true answers are spread."""
    lead = "At which place the true answer stood. A question is one direction of one triple; ties count as their mean."
    if not run.ranks:
        text = "The ranks are not here: links.ranks.tsv is written beside links.json."
        return Section("ranks", "Ranks", lead, [Missing(text, (run.command("links"),))])
    most = max(max(ranks) for ranks in run.ranks.values())
    bounds = [*RANK_BOUNDS[: bisect_left(RANK_BOUNDS, most) + 1]]
    groups = [f"{bound:,}" for bound in bounds]
    if most > bounds[-1]:
        bounds, groups = [*bounds, int(most) + 1], [*groups, "more"]
    within = {label: shares_within(ranks, bounds) for label, ranks in run.ranks.items()}
    bins = {label: [b - a for a, b in pairwise([0.0, *shares])] for label, shares in within.items()}
    figures = [
        columns(
            "ranks-histogram",
            "Share of questions by rank, in %",
            groups,
            bins,
            x_label="rank of the true answer, up to",
        ),
        rising("ranks-within", "Share answered within the first k (Hits@k)", bounds, within),
    ]
    counts = ", ".join(f"{len(ranks):,} to the {label} model" for label, ranks in run.ranks.items())
    return Section("ranks", "Ranks", lead, [Figures(figures, f"Questions: {counts}.")])


def shares_within(ranks: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """Return the share of ranks that are at most each bound."""
    ordered = sorted(ranks)
    return [bisect_right(ordered, bound) / len(ordered) for bound in bounds]


def rerank_section(run: RunFiles) -> Section:
    """Lay out what scoring the first k again by likelihood brings, with its interval."""
    title = "Re-ranking"
    lead = "The first k answers by cosine are scored again by how likely the language model finds them."
    if not run.rerank:
        return Section("rerank", title, lead, [Missing("This has not been measured.", (run.command("rerank"),))])
    result = run.rerank[0].any
    rows = [
        Row(("by cosine", *ranking_cells(result.plain))),
        Row((f"first {result.k} ranked again", *ranking_cells(result.reranked)), is_emphasised=True),
    ]
    caption = f"k = {result.k}, weight {result.weight:g} on the likelihood, chosen on valid"
    protocol = f"; {result.protocol}" if result.protocol else ""
    blocks: list[Block] = [Table(("order", *METRICS.values()), rows, f"{caption}{protocol}.")]
    found = {label: result.difference[name] for name, label in DIFFERENCES.items() if name in result.difference}
    if found:
        lines = {label: (one.mean, one.low, one.high) for label, one in found.items()}
        drawing = intervals("rerank-difference", "Difference by re-ranking", lines)
        verdict = "; ".join(f"{label} {_verdict(one)}" for label, one in found.items())
        blocks.append(Figures([drawing], f"Means and 95 % intervals of a paired bootstrap. {verdict}."))
    return Section("rerank", title, lead, blocks)


def _verdict(difference: Interval) -> str:
    """Write a difference with its interval, and what it allows to say."""
    says = "better" if difference.low > 0 else "worse" if difference.high < 0 else "undecided"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] ({says})".replace("-", "−")
