"""Tables for a terminal of 80 columns or more; they take the same plain data that the results files hold."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pykalm.graph.catalogue import GraphEntry
from pykalm.graph.check import GraphCheck

SIDES = ("head", "tail", "mean")
SHOWN_OTHERS = 5
METRICS = {"mr": "MR", "mrr": "MRR", "hits_at_1": "H@1", "hits_at_3": "H@3", "hits_at_10": "H@10"}


def link_prediction_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay out link prediction results (`LinkPredictionReport.to_dict`) by label, such as unaligned and aligned."""
    first = next(iter(results.values()))
    table = new_table(f"Link prediction on {first['graph']}, {first['split']}", caption=str(first["protocol"]))
    table.add_column("model")
    table.add_column("side")
    for heading in METRICS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for label, result in results.items():
        table.add_section()
        for position, side in enumerate(SIDES):
            style = "bold" if side == "mean" else ""
            cells = [Text(label if position == 0 else ""), Text(side, style=style)]
            table.add_row(*cells, *(Text(cell, style=style) for cell in metric_cells(result[side])))
    return table


def relation_table(result: Mapping[str, Any]) -> Table:
    """Lay out one result by relation, the most frequent first: both sides together, then the MRR of each."""
    table = new_table(f"By relation: {result['graph']}, {result['split']}")
    table.add_column("relation", max_width=32)
    for heading in ("triples", *METRICS.values(), "MRR head", "MRR tail"):
        table.add_column(heading, justify="right", no_wrap=True)
    for relation in sorted(result["relations"].values(), key=lambda relation: -relation["num_triples"]):
        sides = (f"{relation[side]['mrr']:.3f}" for side in ("head", "tail"))
        count = f"{relation['num_triples']:,}"
        table.add_row(Text(relation["text"]), count, *metric_cells(relation["mean"]), *sides)
    return table


def metric_cells(metrics: Mapping[str, float]) -> list[str]:
    """Return MR, MRR, H@1, H@3 and H@10 as they are printed everywhere."""
    return [f"{metrics[name]:,.1f}" if name == "mr" else f"{metrics[name]:.3f}" for name in METRICS]


class PlainPrediction(Protocol):
    """Give a prediction as plain data (use.predict.Prediction does)."""

    def to_dict(self) -> dict[str, Any]: ...


def prediction_table(prediction: PlainPrediction) -> RenderableType:
    """Lay out the answers to a question, under a line for each choice that was made in understanding it."""
    data = prediction.to_dict()
    answers = data["answers"]
    table = new_table(f"{data['entity']['name']} → {data['relation_text']} → ?")
    table.add_column("", justify="right", style="dim")
    has_descriptions = any(answer["description"] for answer in answers)
    table.add_column("answer", no_wrap=True, overflow="ellipsis", max_width=28 if has_descriptions else None)
    table.add_column("cosine", justify="right", no_wrap=True)
    table.add_column("known in", no_wrap=True)
    if has_descriptions:
        table.add_column("description", style="dim")  # the one column that gives way in a narrow terminal
    for answer in answers:
        name = Text(answer["name"], style="bold green" if answer["known_in"] else "bold")
        about = Text(answer["description"], no_wrap=True, overflow="ellipsis")
        cells = (
            Text(str(answer["rank"])),
            name,
            Text(f"{answer['score']:.3f}"),
            Text(answer["known_in"] or "–"),
            about,
        )
        table.add_row(*cells[: len(table.columns)])
    return Group(*_understanding(data), table)


def _understanding(prediction: Mapping[str, Any]) -> list[Text]:
    """Say, where it is not plain, which entity was taken and which others bear its name."""
    entity, others = prediction["entity"], prediction["others"]
    if prediction["how"] == "free text":
        return [Text(f"'{entity['name']}' is read as free text: no split knows its answers.", style="yellow")]
    if not others:
        return []
    lines = [Text(f"{len(others) + 1} entities bear this name; give an id to choose another.", style="yellow")]
    lines.append(_described("taken", entity))
    lines += [_described("not  ", other) for other in others[:SHOWN_OTHERS]]
    if len(others) > SHOWN_OTHERS:
        lines.append(Text(f"  and {len(others) - SHOWN_OTHERS} more", style="dim"))
    return lines


def graph_check_table(check: GraphCheck) -> RenderableType:
    """Lay out the counts of a graph by split, then its problems, its remarks and examples of them."""
    splits = list(check.triples)
    table = new_table(
        f"{check.name}: {check.num_entities:,} entities, {check.num_relations:,} relations", caption=_text_line(check)
    )
    table.add_column("")
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
    rows: dict[str, Mapping[str, int]] = {
        "triples": check.triples,
        "shipped negatives": check.negatives,
        "repeated rows": check.duplicates,
        "entities not in train": check.unseen_entities,
        "inverse in train": check.inverse_leaks,
    }
    for label, counts in rows.items():
        if counts:
            table.add_row(label, *(f"{counts[split]:,}" if split in counts else "" for split in splits))
    verdict = [Text("nothing must be mended", style="green")] if not check.problems else []
    lines = [Text(f"✗ {problem}", style="red") for problem in check.problems]
    lines += [Text(f"• {remark}", style="yellow") for remark in check.remarks]
    return Group(table, *verdict, *lines, *_example_lines(check))


def catalogue_table(entries: Sequence[GraphEntry]) -> Table:
    """Lay out the graphs that go by a name, and where each lies."""
    table = new_table("Graphs by name")
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is", max_width=44)
    table.add_column("where", style="dim", overflow="fold")
    for entry in entries:
        where = str(entry.folder) if entry.folder else f"not here: kalm data fetch {entry.name}"
        table.add_row(Text(entry.name), Text(entry.summary), Text(where))
    return table


def new_table(title: str, *, caption: str | None = None) -> Table:
    """Return an empty table in the style that all tables have."""
    return Table(
        title=Text(title, style="bold"),
        caption=Text(caption, style="dim") if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _described(label: str, entity: Mapping[str, Any]) -> Text:
    description = f": {entity['description']}" if entity["description"] else ""
    line = Text.assemble((f"  {label} ", "dim"), (entity["id"], "bold"), f" {entity['name']}{description}")
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _text_line(check: GraphCheck) -> str:
    """Say how far texts tell entities apart."""
    shared = f"{check.shared_names.entities:,} share their name, {check.shared_texts.entities:,} their whole text"
    if check.cut_texts is None:
        return shared
    return f"{shared}; {check.cut_texts:,} texts are cut at {check.max_entity_tokens} tokens"


def _example_lines(check: GraphCheck) -> list[Text]:
    return [
        Text(f"  {kind}: {example}", style="dim", overflow="ellipsis", no_wrap=True)
        for kind, examples in check.examples.items()
        for example in examples
    ]
