"""Geometry: similarity before and after, the spectrum of the vectors, and Theorem 1. docs/method.md §8."""

import base64
import math
from collections.abc import Iterator, Mapping

from pykalm.report.blocks import Block, Figures, Listing, Missing, Note, Picture, Row, Section, Table
from pykalm.report.charts import ROUNDING, columns, limit_curve, matrix, spectrum
from pykalm.report.drawing import COLOURS, Drawing, tidy
from pykalm.report.records import GeometryResult, Matrix, Theorem, TripleSimilarity
from pykalm.report.run_files import RunFiles

MEASURES = {
    "alignment": "alignment",
    "uniformity": "uniformity",
    "mean_cosine": "mean cosine",
    "top_eigenvalue_share": "top eigenvalue",
    "effective_rank": "effective rank",
}
SHOWN_LABELS = 48
TIMES = {"unaligned": "before alignment", "aligned": "after alignment"}


def similarity_section(run: RunFiles) -> Section:
    """Draw the cosines of queries with tails, and of sentences, before and after alignment."""
    lead = "Cosines of questions with their answers: after alignment the diagonal, where the answers are, should stand out."
    results = _results(run)
    triples = {
        label: one.similarity.triples for label, one in results.items() if one.similarity and one.similarity.triples
    }
    sentences = {
        label: one.similarity.sentences for label, one in results.items() if one.similarity and one.similarity.sentences
    }
    blocks: list[Block] = []
    if triples:
        labels = [f"{query} → {tail}" for query, tail in _pairs(next(reversed(triples.values())))]
        matrices = {label: one.matrix for label, one in triples.items()}
        blocks.append(_matrices("triples", "Questions and answers", matrices, diagonal="answers"))
        blocks.append(_listing("The questions and answers, numbered as in the figures", labels))
    else:
        blocks += _demo_picture(run)
    if sentences:
        labels = list(next(reversed(sentences.values())).labels)
        blocks.append(Note("The same for plain sentences, which were not trained on: they show what else has changed."))
        blocks.append(_matrices("sentences", "Sentences", {label: one.matrix for label, one in sentences.items()}))
        blocks.append(_listing("The sentences, numbered as in the figures", labels))
    if not triples or not sentences:
        blocks += _missing(run)
    return Section("similarity", "Similarity", lead, blocks)


def spectrum_section(run: RunFiles) -> Section:
    """Lay out the measures of the vectors and draw their spectra, before and after alignment."""
    lead = "How evenly the vectors fill their space. Theorem 2: uniformity and the top eigenvalue's share fall, the rank rises."
    results = {label: one for label, one in _results(run).items() if one.groups}
    if not results:
        return Section("spectrum", "Representation", lead, list(_missing(run)))
    names = list(dict.fromkeys(name for one in results.values() for name in one.groups))
    rows = [row for name in names for row in _group_rows(name, results)]
    caption = (
        "Alignment: mean squared distance of question and answer. Uniformity: log mean of exp(−2 · squared distance). Top "
        "eigenvalue: its share of the spectrum. Effective rank: exponential of the spectrum's entropy."
    )
    caption += _protocol(results)
    blocks: list[Block] = [Table(("model", *MEASURES.values()), rows, caption)]
    drawings = list(_spectra(names, results))
    if drawings:
        blocks.append(
            Figures(drawings, "Shares of the eigenvalues of the Gram matrix; a flatter line is a fuller space.")
        )
    if len(results) < 2:
        blocks += _missing(run)
    return Section("spectrum", "Representation", lead, blocks)


def theorem_section(run: RunFiles) -> Section:
    """Draw L_exp − log N against N, with the limit that Theorem 1 gives it."""
    title, lead = (
        "Theorem 1",
        "With more negatives N the contrastive loss, less log N, must flatten to a limit that is computed apart.",
    )
    curves = {label: one.theorem_1 for label, one in _results(run).items() if one.theorem_1}
    if not curves:
        return Section("theorem", title, lead, list(_missing(run)))
    drawings = [
        limit_curve(
            f"theorem-{label}", f"L_exp − log N, {label}", (list(map(float, one.num_negatives)), one.normalised_loss),
            limit=one.limit, limit_label="limit of Theorem 1", colour=COLOURS[label],
        )
        for label, one in curves.items()
    ]  # fmt: skip
    return Section(
        "theorem", title, lead, [Figures(drawings, " ".join(_gap(label, one) for label, one in curves.items()))]
    )


def _group_rows(name: str, results: Mapping[str, GeometryResult]) -> Iterator[Row]:
    """Yield the rows of one kind of vectors under a heading."""
    found = {label: one.groups[name] for label, one in results.items() if name in one.groups}
    for group in list(found.values())[-1:]:
        yield Row((f"{name}, {group.num_vectors:,} vectors",), is_heading=True)
    for label, group in found.items():
        yield Row((label, *(_measure(getattr(group, field)) for field in MEASURES)), is_emphasised=label == "aligned")


def _protocol(results: Mapping[str, GeometryResult]) -> str:
    """Say on what the vectors were measured, and that two models were measured on different texts where they were."""
    protocols = {label: one.protocol for label, one in results.items() if one.protocol}
    if len(set(protocols.values())) > 1:
        each = "; ".join(f"{label}: {protocol}" for label, protocol in protocols.items())
        return f" Not of the same texts ({each}): measure both again."
    return "".join(f" Measured on {protocol}." for protocol in dict.fromkeys(protocols.values()))


def _results(run: RunFiles) -> Mapping[str, GeometryResult]:
    return run.geometry[0].by_label() if run.geometry else {}


def _missing(run: RunFiles) -> Iterator[Missing]:
    """Say what has not been measured of the geometry."""
    setting = run.geometry[0].setting if run.geometry else ()
    commands = tuple(
        run.command("geometry", setting, baseline=label == "unaligned")
        for label in ("unaligned", "aligned")
        if label not in _results(run)
    )
    if commands:
        yield Missing(
            "This has not been measured." if len(commands) == 2 else "One of the two models has not been measured.",
            commands,
        )


def _pairs(similarity: TripleSimilarity) -> Iterator[tuple[str, str]]:
    return zip(similarity.queries, similarity.tails, strict=False)


def _matrices(name: str, title: str, matrices: Mapping[str, Matrix], *, diagonal: str | None = None) -> Figures:
    """Draw matrices in one scale, and say how far the diagonal stands out; None: each thing with itself, which says nothing."""
    lowest = math.floor(10 * min(value for one in matrices.values() for row in one for value in row)) / 10
    drawings = [
        matrix(f"similarity-{name}-{label}", f"{title}, {TIMES[label]}", one, lowest=lowest)
        for label, one in matrices.items()
    ]
    caption = "; ".join(f"{TIMES[label]} {_contrast(one, diagonal)}" for label, one in matrices.items())
    return Figures(drawings, f"Mean cosine {caption}.")


def _contrast(cosines: Matrix, diagonal: str | None) -> str:
    """Say how far the diagonal stands out from the rest."""
    others = [value for number, row in enumerate(cosines) for place, value in enumerate(row) if place != number]
    if diagonal is None:
        return _mean(others)
    own = [row[number] for number, row in enumerate(cosines) if number < len(row)]
    return f"of the {diagonal} {_mean(own)}, of all others {_mean(others)}"


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "–"


def _listing(title: str, labels: list[str]) -> Listing:
    shown = [tidy(label, 160) for label in labels[:SHOWN_LABELS]]
    more = len(labels) - len(shown)
    return Listing(f"{title} (the first {len(shown)} of {len(labels)})" if more else title, shown)


def _demo_picture(run: RunFiles) -> Iterator[Picture]:
    """Show the matrices that `kalm demo` has drawn, where the geometry has not been measured."""
    file = run.path / "report" / "similarity.png"
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError:
        content = b""
    if content.startswith(b"\x89PNG"):
        caption = "Drawn by kalm demo: test questions in rows, their answers in columns."
        yield Picture(
            base64.b64encode(content).decode("ascii"), "Cosines of questions and answers before and after", caption
        )


def _spectra(names: list[str], results: Mapping[str, GeometryResult]) -> Iterator[Drawing]:
    for name in names:
        shares = {
            label: one.groups[name].spectrum
            for label, one in results.items()
            if name in one.groups and any(share > ROUNDING for share in one.groups[name].spectrum)
        }
        if shares:
            yield spectrum(f"spectrum-{names.index(name) + 1}", f"Spectrum of the {name}", shares)
    tops = {label: [one.groups[name].top_eigenvalue_share if name in one.groups else None for name in names]
            for label, one in results.items()}  # fmt: skip
    known = {label: [share for share in shares if share is not None] for label, shares in tops.items()}
    if all(len(shares) == len(names) for shares in known.values()):
        yield columns("spectrum-top", "Share of the top eigenvalue, in %", names, known)


def _gap(label: str, theorem: Theorem) -> str:
    """Say how near the curve has come to its limit."""
    number, loss = max(zip(theorem.num_negatives, theorem.normalised_loss, strict=True))
    near = f", {100 * abs(loss / theorem.limit - 1):.1f} % apart" if theorem.limit else ""
    heat = "" if theorem.temperature is None else f" (τ = {theorem.temperature:.4f})"
    text = f"{label.capitalize()}{heat}: {loss:.3f} at N = {number:,}, limit {theorem.limit:.3f}{near}."
    return text.replace("-", "−").replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _measure(value: float | None) -> str:
    return "–" if value is None else (f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}").replace("-", "−")
