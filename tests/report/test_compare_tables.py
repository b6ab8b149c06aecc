"""Tables with intervals and spread: every figure stands in them, and they fit into 80 columns."""

from pathlib import Path
from typing import Any

from pykalm.api_compare import compare_runs
from pykalm.report.compare_tables import ablation_table, comparison_table, rerank_table
from tests.evaluate.test_compare import measure
from tests.report.test_tables import printed

METRICS = {"mr": 12.34, "mrr": 0.5, "hits_at_1": 0.4, "hits_at_3": 0.55, "hits_at_10": 0.7}


def ends(mean: float, low: float, high: float) -> dict[str, Any]:
    return {name: {"mean": mean, "low": low, "high": high} for name in METRICS if name != "mr"}


def test_runs_and_their_differences_stand_in_the_table(tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        measure(tmp_path, name)
    result = compare_runs([tmp_path / "alpha", tmp_path / "beta"])
    text = printed(comparison_table(result))
    for row in result["runs"]:
        assert row["label"] in text
        assert f"{row['metrics']['mrr']:.3f}" in text
        assert "{low:.3f}…{high:.3f}".format(**row["intervals"]["mrr"]) in text
    difference = result["runs"][1]["difference"]["mrr"]
    assert f"{difference['mean']:+.3f}" in text
    assert f"{difference['low']:+.3f}…{difference['high']:+.3f}" in text
    assert "− alpha" in text


def test_a_difference_whose_interval_excludes_zero_bears_a_star() -> None:
    result: dict[str, Any] = {
        "graph": "world", "split": "test", "k": 20, "weight": 0.1, "normalisation": "mean", "share_listed": 0.875,
        "valid": {"num_triples": 50, "plain": METRICS, "reranked": {**METRICS, "mrr": 0.625}},
        "plain": METRICS, "reranked": {**METRICS, "mrr": 0.52},
        "intervals": {"plain": ends(0.5, 0.45, 0.55), "reranked": ends(0.52, 0.47, 0.57)},
        "difference": {**ends(0.02, 0.01, 0.03), "hits_at_1": {"mean": 0.01, "low": -0.01, "high": 0.03}},
    }  # fmt: skip
    text = printed(rerank_table(result))
    assert text.count("+0.020*") == 3
    assert "+0.010 " in text
    assert "-0.010…+0.030" in text
    for words in ("weight 0.1, mean", "0.500 → 0.625", "88%", "first 20"):
        assert words in " ".join(text.split())


def test_variants_stand_with_mean_and_spread() -> None:
    def figures(mean: float | None, deviation: float | None) -> dict[str, Any]:
        names = (*METRICS, "answer_loss", "mrr_difference")
        return {"figures": {name: {"mean": mean, "deviation": deviation, "count": 2} for name in names}}

    result = {
        "graph": "world", "split": "test", "model": "tiny", "seeds": [0, 1], "budget": "5 steps of 6 triples",
        "variants": {"reference": figures(0.25, 0.0125), "prefix-sharing-template": figures(0.5, None),
                     "bare": figures(None, None)},
    }  # fmt: skip
    text = printed(ablation_table(result), width=100)
    assert text.count("0.250±0.013") + text.count("0.250±0.012") == 6  # as the machine rounds a half
    assert "+0.250" in text
    assert text.count("0.500") == 6
    assert "–" in text
    assert "seeds 0, 1" in text
