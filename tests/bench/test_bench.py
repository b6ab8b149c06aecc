"""The whole bench on a tiny model and a tiny graph: what it writes, what it prints, what it refuses."""

import json
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console
from torch._dynamo.exc import TorchDynamoException

from pykalm import cli
from pykalm.bench import bench, machine, scaling, training, utilisation
from pykalm.bench.bench import plain, run_bench
from pykalm.bench.own_process import in_own_process
from pykalm.bench.plan import MEASUREMENTS, Plan, Workshop, passes
from pykalm.bench.pykeen_ranks import MISSING, pykeen_version
from pykalm.bench.table import bench_table
from pykalm.bench.timing import Spread
from pykalm.bench.training import Work
from pykalm.errors import GraphError, OutOfMemoryError
from pykalm.model import run as run_module
from pykalm.model.attention import FLEX
from pykalm.model.encoder import Encoder
from pykalm.model.layers import find_layers
from pykalm.model.matmul_attention import NAME
from pykalm.model.packing import choose_passes
from pykalm.text.verbalize import Verbalizer
from tests.laws.common import tiny_encoder, tiny_graph
from tests.learn.workshop import write_graph
from tests.tiny_models import save_tiny_model

MEASURED = ("random", "neighbourhood")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the short form once."""
    folder = tmp_path_factory.mktemp("bench")
    graph, model = write_graph(folder / "people"), save_tiny_model(folder / "model")
    out = folder / "results" / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SQUARES", {"cpu": (128,)})
        patch.setattr(machine, "SECONDS_A_SHAPE", {"cpu": 0.01})
        patch.setattr(scaling, "RANKED_ENTITIES", (1000,))
        options = ["--quick", "--graphs", str(graph), "--model", str(model), "--out", str(out), "--device", "cpu"]
        assert cli.main(["bench", *options, "--batch-size", "4"]) == 0
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_training_is_measured_by_graph_and_batching(results: dict[str, Any]) -> None:
    train = results["train"]["people"]
    for batching in MEASURED:
        found = train[batching]
        for name in ("examples_per_second", "tokens_per_triple", "fill", "host_share", "seconds_per_step"):
            assert found[name] > 0
        assert 0 < found["fill"] <= 1
        assert 0 < found["host_share"] < 1
        low, high = found["spread"]["examples_per_second"]
        assert low <= found["examples_per_second"] <= high
        assert found["separate_unpadded"]["tokens_per_triple"] > found["tokens_per_triple"]


def test_the_steps_of_kalm_are_taken_with_compiled_layers_as_well_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiling itself is tests/model/test_faster.py's."""
    encoder, taken = tiny_encoder(), set()
    shop = SimpleNamespace(
        plan=Plan(repeats=1, threads=1), run=lambda _: SimpleNamespace(encoder=encoder), device=encoder.device
    )

    def step(name: str, number: int) -> Work:
        first = next(stack[0] for _, stack in find_layers(encoder.causal_lm))
        taken.add((name, first._compiled_call_impl is not None))
        return Work(1, 2, 1, host_seconds=1e-9)

    monkeypatch.setattr(training, "published_systems", lambda *_: {
        name: partial(step, "published") for name in (training.PUBLISHED, training.LEAN)})  # fmt: skip
    monkeypatch.setattr(training.KalmSystem, "build", lambda run, batching, packed: partial(
        step, batching if packed else "separate"))  # fmt: skip
    monkeypatch.setattr("pykalm.model.compiled._passes_and_gradient", lambda *_: None)
    found = training.measure_training(shop, "people")  # type: ignore[arg-type]
    assert taken == {
        ("published", False), ("separate", False), ("random", False), ("random", True), ("neighbourhood", False),
        ("neighbourhood", True),
    }  # fmt: skip
    assert found.compiled.keys() == found.batchings.keys() == {"random", "neighbourhood"}
    assert not any(layer._compiled_call_impl for _, stack in find_layers(encoder.causal_lm) for layer in stack)


def test_a_ratio_lies_between_those_of_the_rounds(results: dict[str, Any]) -> None:
    for batching in MEASURED:
        found = results["train"]["people"][batching]
        for name in ("ratio_to_published", "ratio_to_published_without_unused", "ratio_to_separate_unpadded"):
            low, high = found["spread"][name]
            assert 0 < low <= found[name] <= high


def test_utilisation_is_measured_with_compiled_layers_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling itself is tests/model/test_faster.py's; here it is not done, and where it cannot be done nothing is missing."""
    encoder, taken = tiny_encoder(), []
    plan = Plan(repeats=1, threads=1)
    shop = SimpleNamespace(
        plan=plan, run=lambda _: SimpleNamespace(encoder=encoder, graph=tiny_graph()), device=encoder.device
    )

    @dataclass
    class Step:
        encoder: Encoder

        def __call__(self, number: int) -> SimpleNamespace:
            first = next(stack[0] for _, stack in find_layers(encoder.causal_lm))
            taken.append(first._compiled_call_impl is not None)
            time.sleep(0.001)
            return SimpleNamespace(batch=None)

    monkeypatch.setattr(utilisation.KalmSystem, "build", lambda run, batching, packed: Step(encoder))
    monkeypatch.setattr(utilisation, "useful_flops", lambda cost, batch: 10**6)
    monkeypatch.setattr(utilisation, "matmul_peak", lambda *_, **__: 1e12)
    monkeypatch.setattr("pykalm.model.compiled._passes_and_gradient", lambda *_: None)
    found = utilisation.measure_utilisation(shop, "people")  # type: ignore[arg-type]
    assert list(found.share) == ["random", "random, compiled", "neighbourhood", "neighbourhood, compiled"]
    assert taken == [False, True] * 2 * (utilisation.WARMUPS + 1)
    assert found.lowest(compiled=True) == min(found.share[name].median for name in found.share if "compiled" in name)
    assert not any(layer._compiled_call_impl for _, stack in find_layers(encoder.causal_lm) for layer in stack)

    def refuse(*_: object) -> None:
        raise TorchDynamoException("no working C++ compiler found")

    monkeypatch.setattr("pykalm.model.compiled._passes_and_gradient", refuse)
    found = utilisation.measure_utilisation(shop, "people")  # type: ignore[arg-type]
    assert list(found.share) == ["random", "neighbourhood"]
    assert found.lowest(compiled=True) is None


def test_progress_is_told_in_hundredths_of_the_time_that_measurements_take(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, str]] = []
    monkeypatch.setattr(bench, "in_own_process", lambda measure: ({}, {}))
    bench.run_bench(graphs=["world", "umls"], only=("train", "rank"), watch=lambda *task: told.append(task))
    assert told == [
        (0, 100, "training on world (1 of 3)"), (45, 100, "training on umls (2 of 3)"), (91, 100, "ranking (3 of 3)")
    ]  # fmt: skip
    assert set(bench.MINUTES) == set(MEASUREMENTS)


def test_the_other_figures_are_there(results: dict[str, Any]) -> None:
    assert 0 < results["train"]["utilisation"] < 1
    assert results["embed"]["ratio"] > 0
    assert results["embed"]["num_entities"] == results["embed"]["num_all"]
    assert results["embed"]["largest_difference"] < 0.1  # bfloat16, another grouping of the texts
    assert results["rank"]["equal_ranks"] is True
    assert results["rank"]["ratio_to_published"] > 0
    assert results["rank"]["peak_memory"] >= 0
    found = {(part["what"].split(" of people")[0].split(" 256")[0], part["unit"]) for part in results["scaling"]}
    assert found == {
        ("building a batch", "seconds per triple"), ("building a batch of 4", "seconds per triple"),
        ("a step", "seconds per triple"), ("a step", "bytes per triple"), ("ordering an epoch", "bytes per triple"),
        ("ranking", "seconds per score"), ("ranking", "bytes above the vectors"),
    }  # fmt: skip
    assert len(results["scaling"]) == 2 * (1 + 2 + 2) + 2  # both ways of batching, but for ranking


def test_pykeen_is_measured_or_said_to_be_missing(results: dict[str, Any]) -> None:
    rank, found = results["rank"], pykeen_version()
    assert rank["pykeen"] == (found or MISSING)
    assert (rank["ratio_to_pykeen"] is None) == (found is None)


def test_the_results_say_what_they_belong_to(results: dict[str, Any]) -> None:
    assert results["format"] == 1
    assert results["settings"]["graphs"] == ["people"]
    assert results["settings"]["run"]["adapter"]["rank"] == 8
    assert results["settings"]["run"]["adapter"]["dropout"] == 0.05
    assert results["machine"]["threads"] >= 1
    assert {"torch", "transformers"} <= results["machine"]["packages"].keys()


def test_the_table_shows_every_measurement(results: dict[str, Any]) -> None:
    console = Console(width=160, record=True)
    console.print(bench_table(results))
    text = console.export_text()
    for word in ("kalm, random", "kalm, neighbourhood", "published", "utilisation", "padded loop", "PyKEEN", "slope"):
        assert word in text


def test_the_table_says_how_to_install_what_is_missing(results: dict[str, Any]) -> None:
    """Brackets are markup to rich, which would leave them out."""
    console = Console(width=160, record=True)
    console.print(bench_table({**results, "rank": {**results["rank"], "ratio_to_pykeen": None, "pykeen": MISSING}}))
    assert MISSING in console.export_text()


def test_a_spread_becomes_its_median_with_the_range_beside_it() -> None:
    assert plain({"speed": Spread(2.0, 1.0, 3.0), "graph": "people"}) == {
        "speed": 2.0, "graph": "people", "spread": {"speed": [1.0, 3.0]},
    }  # fmt: skip


def test_separate_passes_never_take_flex_attention_and_leave_the_encoder_as_it_was() -> None:
    encoder = tiny_encoder()
    encoder.use_attention(FLEX)
    with passes(encoder, packed=False):
        assert (encoder.attention, encoder.packed, encoder.chunk_tokens) == ("sdpa", False, 256)
    assert (encoder.attention, encoder.packed) == (FLEX, True)


def test_every_run_is_checked_against_the_models_own_attention(tmp_path: Path) -> None:
    """Two runs share a model: what the first has chosen must not be what the second is compared with."""
    graph, model = write_graph(tmp_path / "people"), save_tiny_model(tmp_path / "model")
    workshop, seen = Workshop.open(Plan(model=str(model), graphs=(str(graph),), device="cpu")), []

    def check(encoder: Encoder, verbalizer: Verbalizer) -> None:
        seen.append(encoder.attention)
        choose_passes(encoder, verbalizer)

    with mock.patch.object(run_module, "choose_passes", check):
        chosen = [workshop.run(str(graph)).encoder.attention for _ in range(2)]
    assert seen == ["sdpa", "sdpa"]
    assert chosen == [NAME, NAME]


def test_an_unknown_measurement_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "--only", "train,speed", "--out", str(tmp_path / "results.json")]) == 2
    assert "found speed" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "file"),
    [([], "bench/results.json"), (["--only", "rank"], "runs/bench-part.json"), (["--quick"], "runs/bench-quick.json")],
)
def test_a_part_does_not_take_the_place_of_the_whole(
    options: list[str], file: str, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]
) -> None:
    written = []
    monkeypatch.setattr("pykalm.run_bench", lambda out, **_: (written.append(out), results)[1], raising=False)
    assert cli.main(["bench", *options]) == 0
    assert written == [Path(file)]


def test_every_measurement_of_the_long_form_has_a_process_of_its_own(tmp_path: Path) -> None:
    """What it finds is joined here, and what it refuses is refused here."""
    graph, model = write_graph(tmp_path / "people"), save_tiny_model(tmp_path / "model")
    plan = {"model": str(model), "only": ("rank", "embed"), "device": "cpu", "threads": 1, "repeats": 1}
    with mock.patch.object(Workshop, "open", side_effect=AssertionError("opened in this process")):
        found = run_bench(out=tmp_path / "bench.json", graphs=(str(graph),), **plan)
        assert {"format", "date", "settings", "machine", "rank", "embed"} == found.keys()
        assert found["machine"]["threads"] == 1
        assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
        with pytest.raises(GraphError, match="nowhere"):
            run_bench(graphs=("nowhere",), **plan)


def test_a_process_that_is_ended_is_said() -> None:
    with pytest.raises(OutOfMemoryError, match="found that it was ended"):
        in_own_process(_end_oneself)


def _end_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
