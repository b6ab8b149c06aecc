"""Claims about memory: what is predicted is what is used, a budget is kept, and a resumed run keeps its chunks."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pykalm import api
from pykalm.config import ObjectiveSettings
from pykalm.errors import TrainingError
from pykalm.graph.known import known_answers
from pykalm.learn.batches import Batch, BatchBuilder
from pykalm.learn.footprint import (
    PLANNED_SHARE,
    Fit,
    Footprint,
    _bytes_of_a_pass,
    fit_budget,
    measure_footprint,
    peak_bytes,
)
from pykalm.learn.step import joint_gradient
from pykalm.memory import format_size, parse_size
from pykalm.model import packed_weights
from pykalm.model.encoder import Encoder, pooled
from pykalm.model.matmul_attention import NAME as MATMUL_ATTENTION
from pykalm.model.packed_weights import pack_frozen_weights
from pykalm.model.resident import resident_bytes
from pykalm.model.run import read_run_config
from pykalm.text.trie import row_group
from tests.laws.common import tiny_encoder, tiny_graph, tiny_verbalizer
from tests.learn.conftest import Train
from tests.learn.workshop import PROCESSES, SETTINGS, as_options, write_graph
from tests.tiny_models import save_tiny_model

CPU = torch.device("cpu")
MEBI = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("900 mb", 9 * 10**8), ("1.5GiB", 3 << 29), ("16k", 16000), ("4096", 4096), (4096, 4096)],
)
def test_a_size_is_read_as_it_is_written(text: object, size: int) -> None:
    if text == "16k":
        with pytest.raises(ValueError, match="wanted a size such as 8GB"):
            parse_size(text)
    else:
        assert parse_size(text) == size


def test_sizes_are_written_in_the_unit_that_people_use() -> None:
    assert [format_size(size) for size in (7, 1000, 3.25e9)] == ["7 B", "1.0 kB", "3.2 GB"]


def test_peak_bytes_counts_every_tensor_that_lives_at_once() -> None:
    """Counted by hand: five passing tensors are one; exp and sin keep two and add the one that they return."""
    leaf = torch.randn(MEBI, requires_grad=True)

    def passing() -> None:
        for _ in range(5):
            torch.zeros(MEBI).sum()

    assert peak_bytes(passing, CPU) == pytest.approx(4 * MEBI, rel=1e-4)
    assert peak_bytes(lambda: leaf.exp().sin().exp(), CPU) == pytest.approx(3 * 4 * MEBI, rel=1e-4)
    assert peak_bytes(lambda: leaf.detach().add_(1), CPU) == 0  # no memory of its own


def builder_of(encoder: Encoder) -> BatchBuilder:
    graph = tiny_graph()
    return BatchBuilder(
        graph,
        tiny_verbalizer(graph),
        known_answers(graph, ["train"]),
        encoder.lay_out,
        explicit=True,
        completion_share=1,
    )


def footprint_of(encoder: Encoder) -> Footprint:
    builder = builder_of(encoder)
    return measure_footprint(encoder, builder, builder.graph.triples("train"), batch_size=6)


@pytest.mark.parametrize("reads_unpadded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_prediction_is_what_a_step_takes(family: str, reads_unpadded: bool) -> None:
    """The graph and gradient of a whole batch, at a size that was not measured, to a tenth and what is fixed.

    What rows repeat is told apart here: where it is computed once it takes less than is predicted.
    """
    encoder = tiny_encoder(family, row_tokens=32)
    if reads_unpadded:
        encoder.use_attention(MATMUL_ATTENTION)
        encoder.reads_unpadded = True
    footprint, builder = footprint_of(encoder), builder_of(encoder)
    batch = builder.build(builder.graph.triples("train"), np.random.default_rng(0))
    once = batch
    batch = dataclasses.replace(batch, trie=dataclasses.replace(batch.trie, twins=np.arange(batch.trie.num_nodes)))
    padded = sum(row_group(batch.trie, rows).nodes.size for rows in batch.trie.chunks(encoder.chunk_tokens))
    computed = batch.trie.num_nodes if reads_unpadded else padded
    encoder.train()

    def step(batch: Batch = batch) -> None:
        joint_gradient(encoder, batch, ObjectiveSettings(), memory_tokens=1 << 20)

    step()  # makes the gradients
    found, predicted = peak_bytes(step, CPU), footprint.per_token * computed
    beside = footprint.logits + footprint.similarity + footprint.vectors
    assert 0.9 * found - beside <= predicted <= 1.1 * found + beside
    assert peak_bytes(lambda: step(once), CPU) <= 1.02 * found


def test_directions_drawn_apart_bring_twice_as_many_candidates() -> None:
    """One triple has two entities, its two directed ones of a step, drawn each for itself, have up to four."""
    encoder = tiny_encoder()
    together = builder_of(encoder)
    triples = together.graph.triples("train")
    pairs = [
        measure_footprint(encoder, builder, triples, batch_size=1).similarity
        for builder in (together, dataclasses.replace(together, adds_inverses=False))
    ]
    assert pairs[1] == pytest.approx(2 * pairs[0], abs=1)  # whole bytes


def test_a_token_of_rows_end_to_end_is_one_that_is_computed() -> None:
    """Rows of 64 tokens, of which few are full: counted with their padding, a token would take a fifth less."""
    encoder = tiny_encoder(row_tokens=64).train()
    encoder.use_attention(MATMUL_ATTENTION)
    encoder.reads_unpadded = True
    builder = builder_of(encoder)
    trie = builder.build(builder.graph.triples("train"), np.random.default_rng(0)).trie
    per_token, beside = _bytes_of_a_pass(encoder, trie)
    group = row_group(trie, np.arange(len(trie.row_lengths)))

    def step() -> None:
        pooled(encoder(group, shared=True)).sum().backward()  # type: ignore[no-untyped-call]

    assert peak_bytes(step, CPU) == pytest.approx(per_token * trie.num_nodes + beside, rel=0.1)


def test_a_token_takes_what_its_graph_keeps_and_little_more() -> None:
    """The tensors saved for backward, counted by torch's own hooks without the parameters, between two sizes."""
    encoder = tiny_encoder(row_tokens=64).train()
    trie = builder_of(encoder).build(tiny_graph().triples("train"), np.random.default_rng(0)).trie
    parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}

    def kept(num_rows: int) -> tuple[int, int]:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        group = row_group(trie, np.argsort(-trie.row_lengths)[:num_rows])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = encoder(group, shared=True)
        assert states.requires_grad
        return sum(size for place, size in sizes.items() if place not in parameters), group.nodes.size

    (small, few), (large, many) = kept(1), kept(3)
    assert 1 <= footprint_of(encoder).per_token / ((large - small) / (many - few)) < 1.5


def test_packed_weights_are_there_before_the_first_text_and_change_no_token() -> None:
    """They are oneDNN's, which has no storage to count; a pass makes them before the process is measured."""
    encoder = tiny_encoder(precision="bf16", row_tokens=32)
    plain = footprint_of(encoder).per_token
    pack_frozen_weights(encoder.causal_lm)
    assert footprint_of(encoder).per_token == pytest.approx(plain, rel=0.02)
    copies = [packed_weights._copies_of(weight) for name, weight in encoder.named_parameters() if "base_layer" in name]
    assert copies
    assert all(found is not None and found.own is not None for found in copies)


def test_measuring_leaves_no_trace() -> None:
    encoder = tiny_encoder(dropout=0.3)
    before, state = encoder.fingerprint(), torch.get_rng_state()
    footprint_of(encoder)
    assert encoder.fingerprint() == before
    assert not encoder.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in encoder.parameters())


PLAIN = Footprint(always=1000, weights_stage=100, per_token=10, logits=200, similarity=500, vectors=300, row_tokens=64)


def test_a_budget_is_spent_on_the_largest_passes_that_fit() -> None:
    """By hand, of 9,000 planned bytes: (9000 − 1000 − 300 − 200) / 10 = 750 tokens a chunk, 11 rows of 64; 500 less whole."""
    fit = fit_budget(PLAIN, 10_000, device=CPU)
    assert (fit.chunk_tokens, fit.memory_tokens) == (704, 700)
    assert PLAIN.cached(fit.chunk_tokens) <= PLAIN.one_graph(fit.memory_tokens) == PLANNED_SHARE * 10_000
    assert fit_budget(PLAIN, 10**6, device=CPU).chunk_tokens == 2048
    side_by_side = fit_budget(dataclasses.replace(PLAIN, at_once=2), 10_000, device=CPU)
    assert (side_by_side.chunk_tokens, side_by_side.memory_tokens) == (320, 700), "375 tokens for each of two passes"
    gappy = dataclasses.replace(PLAIN, gaps=2.0)  # (8000 / 2 − 300 − 200) / 10 = 350 tokens a chunk
    assert fit_budget(gappy, 10_000, device=CPU) == Fit(memory_tokens=300, chunk_tokens=320)
    assert gappy.one_graph(300) == 9000


def test_a_budget_that_not_even_a_row_fits_into_says_what_would_be_needed() -> None:
    least = 1000 + 300 + 200 + 10 * 64
    with pytest.raises(
        TrainingError, match=r"wanted at least 2.4 kB for one row of 64 tokens \(1.0 kB .* found 2.3 kB"
    ):
        fit_budget(PLAIN, 2300, device=CPU)
    assert fit_budget(PLAIN, round(least / PLANNED_SHARE) + 1, device=CPU).chunk_tokens == 64


def passes(run: Path) -> tuple[int, int]:
    training = read_run_config(run).training
    return training.memory_tokens, training.chunk_tokens


def test_a_run_keeps_the_passes_that_its_budget_chose(train: Train, tmp_path: Path) -> None:
    """Other chunks round otherwise, so a resumed run takes those it began with, unless it is given another budget."""
    less = 6 * resident_bytes() // 5 + 10**9  # what tests before this one hold is there before the first text
    more = less + 10**9
    run = train(**{"training.memory": f"{more}", "training.max_steps": 1})
    chosen = passes(run.path)
    assert chosen != (12288, 1024)
    assert run.config.training.memory == more

    def resumed(**settings: Any) -> tuple[int, int]:
        api.train(tiny_graph(), out=run.path, resume=True, settings=settings)
        return passes(run.path)

    assert resumed() == chosen
    assert resumed(**{"training.memory": f"{more}", "training.memory_tokens": 1}) == chosen
    assert resumed(**{"training.memory": f"{less}"})[0] < chosen[0]
    assert resumed(**{"training.memory": None, "training.memory_tokens": 5, "training.chunk_tokens": 256}) == (5, 256)


def test_a_budget_below_what_is_there_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the model alone is beyond at once: before the base model writes its texts."""
    with monkeypatch.context() as patched:
        patched.setattr("pykalm.model.run.write_own_texts", lambda *_, **__: pytest.fail("texts were written"))
        refused = r"wanted more than the .* and the libraries take .*, found 1\.0 MB\. Give more"
        with pytest.raises(TrainingError, match=refused):
            train(**{"training.memory": "1MB", "objective.kl_weight": 0.1})
    with pytest.raises(TrainingError, match=r"training\.memory: wanted at least .* for one row of 128 tokens"):
        train(**{"training.memory": f"{21 * resident_bytes() // 20}"})


def test_running_out_of_memory_while_measuring_is_explained(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Footprint:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(api, "measure_footprint", refuse)
    with pytest.raises(TrainingError, match=r"out of memory: .*2 GiB\. .*lower training\.row_tokens"):
        train(**{"training.memory": f"{3 * resident_bytes()}"})


def _train_and_report(arguments: list[str], report: str) -> None:
    import resource

    from pykalm import cli

    torch.set_num_threads(1)
    assert cli.main(arguments) == 0
    Path(report).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


@pytest.mark.slow
def test_a_training_stays_below_its_budget(tmp_path: Path) -> None:
    """A model so wide that the batch in one graph would take many times the budget; the peak is the child's own."""
    model = save_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    graph = write_graph(tmp_path / "graph", num_triples=400)
    settings = {**SETTINGS, "training.batch_size": 300, "training.max_steps": 3, "training.row_tokens": 128}
    out, report = tmp_path / "run", tmp_path / "peak"
    options = ["--graph", str(graph), "--model", str(model), "--memory", "1GB", *as_options(settings)]
    process = PROCESSES.Process(target=_train_and_report, args=(["train", "--out", str(out), *options], str(report)))
    process.start()
    process.join()
    assert process.exitcode == 0
    peak, training = int(report.read_text()), read_run_config(out).training
    assert training.memory_tokens < 3000, "the batch would fit into one graph"
    assert peak < 10**9, re.sub(r"\s+", " ", f"{peak=} {training.memory_tokens=} {training.chunk_tokens=}")
