"""The demonstration: measure a small language model on the bundled graph, align it, measure it again, ask it."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from pykalm.api import evaluate_links, predict, train
from pykalm.api_report import write_report
from pykalm.evaluate.similarity import sample_triples, similarity_matrix, triple_labels
from pykalm.graph.catalogue import load_graph
from pykalm.learn.train import StepReport
from pykalm.model.encoder import Progress
from pykalm.model.run import Run, load_baseline, load_run
from pykalm.report.figures import similarity_figure
from pykalm.report.tables import link_prediction_table, prediction_table
from pykalm.terminal import print_table, say

# Names alone: the model knows what France is, and a text of three tokens leaves time for more epochs.
SETTINGS = {
    "text.descriptions": False,
    "training.epochs": 4,
    "training.batch_size": 64,
    "training.learning_rate": 2e-3,
    "training.evaluate_every": 44,
}
# Relation, head, tail; what is None is asked.
QUESTIONS = (
    ("has_capital", "France", None),
    ("currency", None, "Euro"),
    ("official_language", "Brazil", None),
    ("borders", "Switzerland", None),
    ("member_of", "Kenya", None),
)


def run_demo(
    out: str | Path,
    *,
    model: str = "smollm2-135m",
    steps: int | None = None,
    watch: Callable[[StepReport], None] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Do the main job on the graph `world` and print what comes out; the run lies in `out`.

    An unfinished run there goes on, a finished one is shown again. steps: train so many steps only. Raises what
    `train` raises.
    """
    out = Path(out)
    graph = load_graph("world")
    count = {split: f"{len(graph.triples(split)):,}" for split in ("train", "valid", "test")}
    say(f"The graph world: {graph.num_entities:,} entities, {graph.num_relations} relations, {count['train']} triples to "
        f"learn from, {count['valid']} to choose by, {count['test']} to be asked.")  # fmt: skip
    run = _aligned_run(out, model, steps, watch, progress)
    say("Measuring the aligned and the unaligned model on the test triples ...")
    aligned = evaluate_links(run, progress=progress)
    unaligned = evaluate_links(run, baseline=True, progress=progress)
    for relation, head, tail in QUESTIONS:
        print_table(prediction_table(predict(run, relation=relation, head=head, tail=tail)))
    figure = draw_similarity(run, out / "report" / "similarity.png")
    print_table(link_prediction_table({"unaligned": unaligned.to_dict(), "aligned": aligned.to_dict()}))
    ratio = aligned.mean.mrr / unaligned.mean.mrr
    print(f"Test MRR {unaligned.mean.mrr:.3f} before, {aligned.mean.mrr:.3f} after: {ratio:.0f} times as high.")
    print(f"The similarity matrices before and after are in {figure}; the run is in {out}.")
    print(f'Ask it: {_command()} predict {out} --head Peru --relation "shares a border with"')
    report = write_report(out)
    for problem in report.problems:
        say(problem)
    print(f"All of it on one page: {report.page}")
    return run


def _command() -> str:
    """Return how `kalm` is called from here: by its path where the shell does not find it."""
    if shutil.which("kalm"):
        return "kalm"
    beside = Path(sys.executable).with_name("kalm")
    return os.path.relpath(beside) if beside.is_file() else f"{sys.executable} -m pykalm"


def draw_similarity(run: Run, path: Path) -> Path:
    """Draw the cosines of test queries and their answers, before and after alignment, as one PNG; return its path."""
    triples = sample_triples(run.graph, "test", count=24, seed=run.config.seed)
    before = similarity_matrix(load_baseline(run).encoder, run.verbalizer, triples)
    after = similarity_matrix(run.encoder, run.verbalizer, triples)
    query_labels, tail_labels = triple_labels(run.graph, triples)
    similarity_figure(before, after, query_labels=query_labels, tail_labels=tail_labels, path=path)
    return path


def _aligned_run(
    out: Path, model: str, steps: int | None, watch: Callable[[StepReport], None] | None, progress: Progress | None
) -> Run:
    """Train a new run, go on with an unfinished one, or open a finished one."""
    if not (out / "config.yaml").exists():
        say(f"Aligning {model} with it; the run is kept in {out} ...")
        settings = {**SETTINGS, "training.max_steps": steps}
        return train("world", out=out, model=model, settings=settings, watch=watch, progress=progress)
    say(f"{out} holds a run already: finishing it where it is unfinished. Delete the folder to train a new one.")
    train(out=out, resume=True, watch=watch)
    return load_run(out)
