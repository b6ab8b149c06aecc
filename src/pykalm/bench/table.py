"""The results of a bench as tables for people; what programs read is the JSON file."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pykalm.bench.plan import BATCHINGS

GIGA, MEGA = 1e9, 1e6


def bench_table(results: Mapping[str, Any]) -> RenderableType:
    """Lay out what was measured: a table each for training, for single figures and for scaling, and what it ran on."""
    parts: list[RenderableType] = []
    train = results.get("train", {})
    if any(isinstance(graph, Mapping) and "published" in graph for graph in train.values()):
        parts.append(_training_table(train))
    if figures := _figures(results):
        table = _table("Other figures", "what", "figure", "smallest – largest")
        for row in figures:
            table.add_row(*row)
        parts.append(table)
    if "scaling" in results:
        parts.append(_scaling_table(results["scaling"]))
    return Group(*parts, *_about(results))


def _training_table(train: Mapping[str, Any]) -> Table:
    table = _table("Training, triples in both directions per second, and times as many as", "graph", "system", "examples/s",
                   "published", "without unused", "separate", "tokens/triple", "fill", "host")  # fmt: skip
    for graph, systems in train.items():
        if not (isinstance(systems, Mapping) and "published" in systems):
            continue
        table.add_section()
        for name in ("published", "published_without_unused"):
            table.add_row(graph, name.replace("_", " "), *_speed_cells(systems[name], ratios=False))
        for batching in BATCHINGS:
            table.add_row(
                graph, f"separate, {batching}", *_speed_cells(systems[batching]["separate_unpadded"], ratios=False)
            )
            kalm, compiled = systems[batching], systems[batching].get("compiled")
            table.add_row(graph, f"kalm, {batching}", *_speed_cells(kalm, ratios=True), style="bold")
            if compiled:
                table.add_row(graph, f"kalm, {batching}, compiled", *_speed_cells(compiled, ratios=True), style="bold")
    return table


def _speed_cells(speed: Mapping[str, Any], *, ratios: bool) -> list[str]:
    names = ("ratio_to_published", "ratio_to_published_without_unused", "ratio_to_separate_unpadded")
    times = [f"{speed[name]:.1f}×" for name in names] if ratios else [""] * len(names)
    host = f"{speed['host_share']:.1%}" if speed["host_share"] else ""
    return [
        f"{speed['examples_per_second']:.2f}",
        *times,
        f"{speed['tokens_per_triple']:.0f}",
        f"{speed['fill']:.1%}",
        host,
    ]


def _figures(results: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of name, figure and range for all that is one number."""
    rows: list[list[str]] = []
    if "utilisation" in results.get("train", {}):
        details = results["train"]["utilisation_details"]
        shares = details["share"]
        rows += [
            _row(f"utilisation, {details['graph']}, {name}", shares, name, "{:.1%}")
            for name in shares
            if name != "spread"
        ]
        rows.append(_row("best matrix product, Gflop/s", details, "peak_flops_per_second", "{:,.0f}", GIGA))
    if "embed" in results:
        embed = results["embed"]
        which = f"{embed['num_entities']:,} of {embed['num_all']:,}"
        rows.append(_row(f"entities embedded per second ({which})", embed, "entities_per_second"))
        rows.append(_row("× a padded loop in file order", embed, "ratio", "{:.1f}×"))
        rows.append(_row("× that loop with logits", embed, "ratio_with_logits", "{:.1f}×"))
    return rows + (_ranking_rows(results["rank"]) if "rank" in results else [])


def _ranking_rows(rank: Mapping[str, Any]) -> list[list[str]]:
    which = f"{rank['num_queries']:,} queries, {rank['num_entities']:,} entities"
    return [
        _row(f"triples ranked per second ({which})", rank, "triples_per_second"),
        _row("× the published loop", rank, "ratio_to_published", "{:,.0f}×"),
        _row("× PyKEEN's evaluator", rank, "ratio_to_pykeen", "{:.1f}×")
        if rank["ratio_to_pykeen"]
        else ["× PyKEEN's evaluator", escape(rank["pykeen"]), ""],
        _row("peak memory of ranking above the vectors, MB", rank, "peak_memory", "{:,.0f}", MEGA),
        ["equal ranks", "yes" if rank["equal_ranks"] else "NO", ""],
    ]


def _row(name: str, data: Mapping[str, Any], key: str, form: str = "{:,.1f}", unit: float = 1.0) -> list[str]:
    """Return a name, a figure and its range over the rounds."""
    ends = data.get("spread", {}).get(key, ())
    return [name, form.format(data[key] / unit), " – ".join(form.format(end / unit) for end in ends)]


def _scaling_table(scaling: list[Mapping[str, Any]]) -> Table:
    table = _table("Cost against size (slope 0: flat)", "what", "unit", "sizes", "cost", "slope")
    for part in scaling:
        sizes = ", ".join(f"{size:,}" for size in part["sizes"])
        costs = ", ".join(f"{cost:.2g}" for cost in part["cost"])
        table.add_row(part["what"], part["unit"], sizes, costs, f"{part['slope']:+.2f}")
    return table


def _about(results: Mapping[str, Any]) -> list[Text]:
    """Say what the figures belong to."""
    machine, settings = results["machine"], results["settings"]
    where = f"{machine['device']} ({machine['processor']}), {machine['threads']} threads, load before {machine['load_average']}"
    what = f"{settings['model']}, seed {settings['seed']}, {settings['batch_size']} triples a step"
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return [Text(line, style="dim") for line in (f"{what}, medians of {settings['repeats']} rounds", where, packages)]


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right")
    return table
