"""Link prediction: the numbers before and after alignment, beside published ones."""

from collections.abc import Iterator, Sequence

from pykalm.report.blocks import Block, Missing, Note, Row, Section, Table
from pykalm.report.commands import describe_setting
from pykalm.report.paper import PUBLISHED_LINKS, SOURCE, PublishedLinks, published_graph
from pykalm.report.records import LinksResult, Ranking
from pykalm.report.run_files import Measured, RunFiles
from pykalm.report.tables import METRICS, SIDES, metric_cells

LEAD = "Which entity completes the triple? The true one is ranked among all entities, in both directions."
KALM_GRAPHS = ("WN18RR", "FB15k-237")


def links_section(run: RunFiles) -> Section:
    """Lay out link prediction before and after alignment, and the published rows."""
    blocks: list[Block] = []
    graph = None
    if run.links:
        main = run.links[0]
        blocks.append(_own(main))
        graph = published_graph(main.any.graph)
    if run.links and graph is not None:
        blocks += _beside_published(graph, run.links[0])
    if len(run.links) > 1:
        blocks.append(_other_settings(run.links[1:]))
    blocks += missing_links(run)
    if graph is None:
        blocks += [_published(name) for name in KALM_GRAPHS]
    return Section("links", "Link prediction", LEAD, blocks)


def missing_links(run: RunFiles) -> Iterator[Missing]:
    """Say which of the two models has not been measured, and how to do it."""
    setting = run.links[0].setting if run.links else ()
    measured = run.links[0].by_label() if run.links else {}
    commands = tuple(
        run.command("links", setting, baseline=label == "unaligned")
        for label in ("unaligned", "aligned")
        if label not in measured
    )
    if commands:
        models = (
            "Neither model has" if not measured else f"The {'un' if 'aligned' in measured else ''}aligned model has not"
        )
        yield Missing(f"{models} been measured.", commands)


def ranking_cells(ranking: Ranking) -> tuple[str, ...]:
    """Return MR, MRR, H@1, H@3 and H@10 as they are printed everywhere."""
    return tuple(metric_cells(ranking.model_dump()))


def _own(measured: Measured[LinksResult]) -> Table:
    """Lay out both directions and their mean, the unaligned model first."""
    result, setting = measured.any, describe_setting(measured.setting)
    rows = []
    for label, one in measured.by_label().items():
        rows.append(Row((label,), is_heading=True))
        rows += [Row((side, *ranking_cells(getattr(one, side))), is_emphasised=side == "mean") for side in SIDES]
    protocol = "; ".join(part for part in (setting, result.protocol) if part)
    return Table(("side", *METRICS.values()), rows, f"{result.graph}, {result.split}: {protocol}.")


def _beside_published(graph: str, measured: Measured[LinksResult]) -> Iterator[Block]:
    """Lay out published rows with ours among them, the best MRR last."""
    rows = [(one.mrr or 0.0, Row((one.system, *published_cells(one)))) for one in PUBLISHED_LINKS[graph]]
    for label, one in measured.by_label().items():
        name = f"{one.model or 'this run'}, {label} (this run)"
        rows.append((one.mean.mrr, Row((name, *ranking_cells(one.mean)), is_emphasised=True)))
    ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    yield Table(("system", *METRICS.values()), ordered, f"{graph}, mean of both directions, by MRR. {SOURCE}")
    if measured.setting:
        yield Note(f"This run's rows are not the whole test split: {describe_setting(measured.setting)}.")


def _published(graph: str) -> Table:
    """Lay out the published rows of a graph that is not the run's, for orientation, folded."""
    rows = [Row((one.system, *published_cells(one))) for one in PUBLISHED_LINKS[graph]]
    return Table(("system", *METRICS.values()), rows, SOURCE, summary=f"Published numbers on {graph}, another graph")


def published_cells(row: PublishedLinks) -> tuple[str, ...]:
    """Return the cells of a published row; what was not reported is a dash."""
    values = (row.mrr, row.hits_at_1, row.hits_at_3, row.hits_at_10)
    mean_rank = "–" if row.mr is None else f"{row.mr:,.0f}"
    return mean_rank, *("–" if value is None else f"{value:.3f}" for value in values)


def _other_settings(others: Sequence[Measured[LinksResult]]) -> Table:
    """Lay out what else was measured: other splits, samples and graphs."""
    rows = [
        Row((describe_setting(measured.setting), label, *ranking_cells(one.mean)))
        for measured in others
        for label, one in measured.by_label().items()
    ]
    return Table(("also measured", "model", *METRICS.values()), rows, "Mean of both directions.", num_texts=2)
