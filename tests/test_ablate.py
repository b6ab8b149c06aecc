"""Ablations: every variant with every seed at one budget, resumed where stopped, summed up with spread."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from pykalm import ablate
from pykalm.ablate import VARIANTS, run_ablation
from pykalm.config import load_config
from pykalm.errors import ConfigError, GraphError, UsageError
from pykalm.learn.state import read_metrics
from pykalm.model.run import load_run, read_run_config
from tests.learn.workshop import SETTINGS, write_graph
from tests.tiny_models import save_tiny_model

NAMES, SEEDS, STEPS = ("reference", "query-view"), (0, 1), 2
LINKS = Path("results") / "links.json"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what every sweep of these tests shares: a small graph, a tiny model, two steps."""
    folder = tmp_path_factory.mktemp("ablation")
    graph = write_graph(folder / "graph", num_triples=30, valid=5, test=6)
    return {"graph": graph, "model": save_tiny_model(folder / "model"), "settings": SETTINGS, "steps": STEPS}


@pytest.fixture(scope="module")
def swept(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a finished sweep of two variants and two seeds, and what it returned."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, run_ablation(out=out, variants=NAMES, seeds=SEEDS, **given)


def test_every_variant_and_seed_is_a_run_of_the_same_budget(swept: tuple[Path, dict[str, Any]]) -> None:
    out, result = swept
    for name in NAMES:
        for seed in SEEDS:
            config = read_run_config(out / name / f"seed-{seed}")
            assert (config.seed, config.training.max_steps, config.training.batch_size) == (seed, STEPS, 6)
            assert config.objective.views == ("query" if name == "query-view" else "both")
            assert len(read_metrics(out / name / f"seed-{seed}")) == STEPS
    assert result["budget"] == "2 steps of 6 triples"
    assert load_run(out / "query-view" / "seed-1").config.objective.views == "query"


def test_figures_are_those_of_the_runs_with_mean_and_spread(swept: tuple[Path, dict[str, Any]]) -> None:
    out, result = swept
    mrr = {
        name: [json.loads((out / name / f"seed-{seed}" / LINKS).read_text())["mean"]["mrr"] for seed in SEEDS]
        for name in NAMES
    }
    for name in NAMES:
        figure = result["variants"][name]["figures"]["mrr"]
        assert figure["count"] == 2
        assert figure["mean"] == pytest.approx(statistics.fmean(mrr[name]))
        assert figure["deviation"] == pytest.approx(abs(mrr[name][0] - mrr[name][1]) / 2**0.5)
    differences = [second - first for first, second in zip(*mrr.values(), strict=True)]
    assert result["variants"]["query-view"]["figures"]["mrr_difference"]["mean"] == pytest.approx(sum(differences) / 2)
    assert result["variants"]["reference"]["figures"]["mrr_difference"]["mean"] == 0
    assert {tuple(run["splits"]) for run in result["runs"]} == {("valid", "test")}
    assert json.loads((out / "ablation.json").read_text(encoding="utf-8")) == result


def test_the_answer_loss_of_an_untrained_byte_model_is_about_that_of_chance(swept: tuple[Path, dict[str, Any]]) -> None:
    """A random model over 259 tokens: log 259 = 5.6 nats, and its opinions, which are random, cost a little more."""
    loss = swept[1]["variants"]["reference"]["figures"]["answer_loss"]["mean"]
    assert 4.5 < loss < 8


def test_what_is_there_is_not_trained_again(
    swept: tuple[Path, dict[str, Any]], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = swept
    trained: list[str] = []
    monkeypatch.setattr(ablate, "train", lambda **settings: trained.append(settings["out"]))
    assert run_ablation(out=out, variants=NAMES, seeds=SEEDS, **given) == result
    assert trained == []


def test_an_unfinished_run_goes_on_and_others_are_added(
    swept: tuple[Path, dict[str, Any]], given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of one run is missing, as after a kill while it was measured: it ends as it would have."""
    shutil.copytree(swept[0], tmp_path / "out")
    record = tmp_path / "out" / "reference" / "seed-1" / ablate.RECORD
    before = json.loads(record.read_text(encoding="utf-8"))
    record.unlink()
    trained: list[tuple[str, bool]] = []
    right = ablate.train

    def spy(**settings: Any) -> Any:
        trained.append((f"{settings['out'].parent.name}/{settings['out'].name}", settings["resume"]))
        return right(**settings)

    monkeypatch.setattr(ablate, "train", spy)
    result = run_ablation(out=tmp_path / "out", variants=("reference", "no-margin"), seeds=(1,), **given)
    assert trained == [("reference/seed-1", True), ("no-margin/seed-1", False)]
    assert json.loads(record.read_text(encoding="utf-8")) == before
    assert list(result["variants"]) == ["reference", "no-margin"]
    assert result["variants"]["no-margin"]["figures"]["mrr"]["deviation"] is None


def test_runs_of_other_settings_are_not_taken_for_these(
    swept: tuple[Path, dict[str, Any]], given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"training\.max_steps: saved 2, found 3"):
        run_ablation(out=swept[0], variants=NAMES, seeds=SEEDS, **{**given, "steps": 3})


def test_one_learning_rate_is_that_of_all_variants_and_of_later_calls(given: dict[str, Any], tmp_path: Path) -> None:
    """The automatic one of steps of 4 triples; a sweep that was begun with another one is not joined to it."""
    settings = {**given["settings"], "training.batch_size": 4}
    swept = {"out": tmp_path / "out", "seeds": (0,), **given}
    variants = {"reference": {}, "larger": {"training.batch_size": 16}}
    found = run_ablation(**{**swept, "variants": variants, "settings": settings | {"training.learning_rate": "auto"}})
    assert found["shared"]["training"]["learning_rate"] == 5e-4
    rates = [read_run_config(tmp_path / "out" / name / "seed-0").training.learning_rate for name in variants]
    assert rates == [5e-4, 5e-4]
    again = {**swept, "settings": settings | {"training.learning_rate": 0.01}}
    with pytest.raises(ConfigError, match=r"training\.learning_rate: saved 0.0005, found 0.01"):
        run_ablation(**{**again, "variants": ("reference",)})
    later = {**swept, "settings": settings | {"training.learning_rate": "auto", "training.batch_size": 8}}
    with pytest.raises(ConfigError, match=r"training\.learning_rate: saved 0.0005, found 0.00071"):
        run_ablation(**{**later, "variants": ("reference",)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": ("reference", "nonsense")}, "wanted some of reference, .*; found nonsense"),
        ({"variants": ("prefix-sharing-template",)}, "prefix-sharing-template changes nothing"),
        ({"variants": ()}, "found none"),
        ({"seeds": ()}, r"found \[\]"),
        ({"seeds": (1, 1)}, r"found \[1, 1\]"),
        ({"split": "train"}, "wanted valid or test, found 'train'"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_made(
    given: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_ablation(out=tmp_path / "out", **{"variants": NAMES, "seeds": SEEDS, **given, **change})
    assert not (tmp_path / "out").exists()


def test_a_split_that_the_graph_lacks_is_said_before_training(given: dict[str, Any], tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph", num_triples=20, valid=0, test=4)
    with pytest.raises(GraphError, match="valid"):
        run_ablation(out=tmp_path / "out", split="valid", **{**given, "graph": graph})
    assert not (tmp_path / "out").exists()


def test_every_named_variant_is_a_setting_and_the_default_leaves_out_what_changes_nothing() -> None:
    reference = load_config(None, [], graph="world")
    chosen = ablate._choose(None, reference)
    assert set(VARIANTS) - set(chosen) == {
        "prefix-sharing-template", "with-descriptions", "kl", "directions-together",
    }  # fmt: skip
    names_only = load_config(None, ["text.descriptions=false"], graph="world")
    assert set(VARIANTS) - set(ablate._choose(None, names_only)) == {
        "prefix-sharing-template", "names-only", "kl", "directions-together",
    }  # fmt: skip
    small = load_config(None, ["training.batch_size=8"], graph="world")
    assert "directions-together" in ablate._choose(None, small)
    assert "directions-apart" not in ablate._choose(None, small)


def test_neighbourhoods_are_swept_without_what_they_cannot_be() -> None:
    reference = load_config(None, ["training.batching=neighbourhood"], graph="world")
    chosen = ablate._choose(None, reference)
    assert "self-negatives-among" in chosen
    assert not {"directions-apart", "directions-together"} & set(chosen)
    with pytest.raises(ConfigError, match="directions is apart; found neighbourhood"):
        ablate._choose(["reference", "directions-apart"], reference)


def test_variants_of_ones_own_are_taken_by_name() -> None:
    reference = load_config(None, [], graph="world")
    own = {"reference": {}, "hot": {"objective.temperature": 0.5}}
    assert ablate._choose(own, reference) == own
    with pytest.raises(ConfigError, match=r"objective\.heat is not a setting"):
        ablate._choose({"hot": {"objective.heat": 0.5}}, reference)
