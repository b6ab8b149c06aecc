"""The numbers that lead the page: what alignment changed, in one line each."""

from collections.abc import Iterator

from pykalm.report.blocks import Headline
from pykalm.report.records import Ranking
from pykalm.report.run_files import RunFiles

NONE = "–"


def headlines(run: RunFiles) -> list[Headline]:
    """Return the numbers that were measured, the MRR always first."""
    return [*_links(run), *_questions(run), *_language(run), *_geometry(run)]


def _links(run: RunFiles) -> Iterator[Headline]:
    if not run.links:
        yield Headline("Test MRR", NONE, NONE, "not measured yet")
        return
    main = run.links[0]
    before, after = (one.mean if one else None for one in (main.unaligned, main.aligned))
    ratio = after.mrr / before.mrr if before and after and before.mrr > 0 else None
    note = "" if ratio is None else f"{ratio:,.1f} times as high" if ratio < 10 else f"{ratio:,.0f} times as high"
    split = (main.any.split or "test").capitalize()
    yield Headline(f"{split} MRR", _three(before, "mrr"), _three(after, "mrr"), note)
    note = "the answer is among the first ten"
    yield Headline("Hits@10", _three(before, "hits_at_10"), _three(after, "hits_at_10"), note)


def _questions(run: RunFiles) -> Iterator[Headline]:
    if not run.qa or "tail" not in run.qa[0].any.tasks:
        return
    main = run.qa[0]
    before, after = (one.tasks.get("tail") if one else None for one in (main.unaligned, main.aligned))
    baselines = main.any.tasks["tail"].baselines.values()
    best = max((baseline.any_valid for baseline in baselines), default=None)
    note = "in %" if best is None else f"in %; without a model {100 * best:.1f}"
    old, new = (NONE if one is None else f"{100 * one.any_valid:.1f}" for one in (before, after))
    yield Headline("Tails answered", old, new, note)


def _language(run: RunFiles) -> Iterator[Headline]:
    texts = run.language[0].any.perplexity if run.language else {}
    for name in sorted(texts)[:1]:
        found = (run.language[0].unaligned, run.language[0].aligned)
        before, after = (one.perplexity[name].word if one and name in one.perplexity else None for one in found)
        change = f"{100 * (after / before - 1):+.1f} %, ".replace("-", "−") if before and after else ""
        yield Headline("Perplexity", _plain(before), _plain(after), f"{change}{name} by word, lower is better")


def _geometry(run: RunFiles) -> Iterator[Headline]:
    groups = run.geometry[0].any.groups if run.geometry else {}
    for name in [name for name in ("candidates", "queries") if name in groups][:1]:
        found = (run.geometry[0].unaligned, run.geometry[0].aligned)
        before, after = (one.groups[name].effective_rank if one and name in one.groups else None for one in found)
        if before is not None or after is not None:
            yield Headline("Effective rank", _plain(before), _plain(after), f"of the {name}' vectors, higher is fuller")


def _three(ranking: Ranking | None, metric: str) -> str:
    return NONE if ranking is None else f"{getattr(ranking, metric):.3f}"


def _plain(value: float | None) -> str:
    return NONE if value is None else f"{value:,.1f}"
