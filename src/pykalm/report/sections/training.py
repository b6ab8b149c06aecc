"""Training: the curves of metrics.jsonl."""

from collections.abc import Iterator, Sequence

from pykalm.report.blocks import Figures, Missing, Note, Section
from pykalm.report.charts import Points, curve
from pykalm.report.drawing import Drawing
from pykalm.report.records import Step
from pykalm.report.run_files import RunFiles

LEAD = "How the losses fell, what that brought on the valid triples, and how sharp the contrast became."


def training_section(run: RunFiles) -> Section:
    """Draw the losses, the valid MRR and the temperature against the step."""
    if not run.steps:
        text = "No step is logged here: the run has no metrics.jsonl, or one that cannot be read."
        return Section("training", "Training", LEAD, [Missing(text, (f"kalm train --out {run.path} --resume",))])
    return Section("training", "Training", LEAD, [Note(_summary(run.steps)), Figures(list(_drawings(run.steps)))])


def points(steps: Sequence[Step], name: str) -> Points:
    """Return the steps at which a value was logged, and the values."""
    found = [(float(step.step), float(getattr(step, name))) for step in steps if getattr(step, name) is not None]
    return [x for x, _ in found], [y for _, y in found]


def _drawings(steps: Sequence[Step]) -> Iterator[Drawing]:
    loss, kl, valid, temperature = (points(steps, name) for name in ("loss", "kl", "valid_mrr", "temperature"))
    parts = {"L_exp, contrast": points(steps, "explicit"), "L_imp, completion": points(steps, "implicit")}
    trained = {label: line for label, line in parts.items() if any(line[1])}  # a part that is off is 0 at every step
    if loss[0]:
        yield curve("training-loss", "Loss L", {"loss": loss}, smooth=True)
    if trained:
        yield curve("training-parts", "Its parts, L_exp + λ · L_imp", trained, smooth=True)
    if any(kl[1]):
        yield curve(
            "training-kl", "L_kl, distance from the base model's language", {"L_kl, nats per token": kl}, smooth=True
        )
    if valid[0]:
        yield curve("training-valid-mrr", "MRR on valid", {"MRR": valid})
    if temperature[0]:
        yield curve("training-temperature", "Temperature τ", {"τ": temperature})


def _summary(steps: Sequence[Step]) -> str:
    """Say how long it went, how fast, and where it was best."""
    text = f"{steps[-1].step:,} steps"
    speeds = sorted(step.examples_per_second for step in steps if step.examples_per_second is not None)
    if speeds:
        text += f", at the median {speeds[len(speeds) // 2]:,.1f} triples a second"
    measured = [(step.valid_mrr, -step.step) for step in steps if step.valid_mrr is not None]
    if measured:
        best, at = max(measured)
        text += f"; best valid MRR {best:.3f} after step {-at:,}, whose weights were kept"
    return f"{text}."
