"""Figures of geometry: PNG and SVG files that hold what the results say, with and without plain sentences."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from pykalm.report.geometry_figures import draw_geometry, theorem_figure


def result(rank: float, *, names: tuple[str, ...] = ("queries", "candidates", "sentences")) -> dict[str, Any]:
    """Return a geometry result whose spectra fall as 1 / i^(4 / rank)."""
    shares = np.arange(1, 65) ** (-4.0 / rank)
    group = {"num_vectors": 100, "alignment": 0.5, "uniformity": -1.0, "mean_cosine": 0.3, "effective_rank": 7 * rank,
             "top_eigenvalue_share": 0.4, "spectrum": (shares / shares.sum()).tolist()}  # fmt: skip
    numbers = [2**power for power in range(11)]
    similar = {"labels": ["It costs $5 or $6 here.", "A sentence.", "A" * 90], "matrix": [[1.0, 0.2, 0.9 / rank]] * 3}
    return {
        "groups": dict.fromkeys(names, group),
        "theorem_1": {"num_negatives": numbers, "normalised_loss": [-rank + 1 / n for n in numbers], "limit": -rank,
                      "temperature": 0.05},
        "similarity": {"sentences": similar} if "sentences" in names else {},
    }  # fmt: skip


def letters(path: Path) -> str:
    """Return all text of an SVG file."""
    return " ".join("".join(element.itertext()) for element in ElementTree.parse(path).iter() if "text" in element.tag)


def test_theorem_spectrum_and_sentences_are_drawn_as_png_and_svg(tmp_path: Path) -> None:
    files = draw_geometry(result(1.0), result(4.0), tmp_path / "report")
    names = {
        f"{name}{ending}" for name in ("theorem-1", "spectrum", "similarity-sentences") for ending in (".png", ".svg")
    }
    assert {file.name for file in files} == {file.name for file in (tmp_path / "report").iterdir()} == names
    for file in files:
        if file.suffix == ".png":
            assert imread(file).std() > 0.01
    theorem, spectrum = (letters(tmp_path / "report" / f"{name}.svg") for name in ("theorem-1", "spectrum"))
    for words in ("limit −4.00", "measured −4.00", "unaligned", "τ = 0.05", "number of negatives N"):
        assert words in theorem
    for words in ("effective rank 7.0 → 28.0", "plain sentences", "eigenvalue, largest first"):
        assert words in spectrum
    assert "$5 or $6" in letters(tmp_path / "report" / "similarity-sentences.svg")


@pytest.mark.parametrize("lacking", ["before", "after"])
def test_sentences_that_one_result_lacks_are_left_out(tmp_path: Path, lacking: str) -> None:
    short, whole = result(1.0, names=("queries", "candidates")), result(4.0)
    before, after = (short, whole) if lacking == "before" else (whole, short)
    files = draw_geometry(before, after, tmp_path)
    assert {file.stem for file in files} == {"theorem-1", "spectrum"}
    assert "plain sentences" not in letters(tmp_path / "spectrum.svg")


def test_the_same_results_give_the_same_file(tmp_path: Path) -> None:
    curves = {"unaligned": result(1.0)["theorem_1"], "aligned": result(4.0)["theorem_1"]}
    files = [tmp_path / name for name in ("a.svg", "b.svg")]
    for file in files:
        theorem_figure(curves, file)
    assert files[0].read_bytes() == files[1].read_bytes()
