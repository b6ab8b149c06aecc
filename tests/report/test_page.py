"""The report page: whole, self-contained and safe, whatever the run holds and whatever its graph's names are."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from pykalm.api_report import WrittenReport, write_report
from pykalm.errors import RunError
from pykalm.report.page import SECTIONS
from tests.report.html_page import Page
from tests.report.sample_run import HOSTILE, write_bare_run, write_full_run

TITLES = ("Training", "Link prediction", "By relation", "Ranks", "Re-ranking", "Question answering", "Case studies", "Language",
          "Similarity", "Representation", "Theorem 1", "Settings", "Data, versions, commands")  # fmt: skip


@pytest.fixture(scope="module")
def page(hostile: WrittenReport) -> Page:
    return Page.read(hostile.page)


@pytest.mark.parametrize("name", ["hostile", "bare"])
def test_every_tag_is_closed_and_every_section_is_there(name: str, request: pytest.FixtureRequest) -> None:
    found = Page.read(request.getfixturevalue(name).page)
    assert (found.misplaced, found.open) == ([], [])
    assert tuple(text for tag, text in found.texts if tag == "h2") == TITLES
    assert len(TITLES) == len(SECTIONS)


def test_links_of_the_contents_lead_to_sections(page: Page) -> None:
    targets = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(targets) == len(TITLES)
    assert {target.removeprefix("#") for target in targets} <= set(page.ids())


def test_ids_are_unique_and_every_reference_finds_its_id(hostile: WrittenReport, page: Page) -> None:
    ids = page.ids()
    assert len(ids) == len(set(ids))
    referenced = re.findall(r'(?:url\(#|href="#)([^)"]+)', hostile.page.read_text(encoding="utf-8"))
    assert set(referenced) <= set(ids)
    assert len(referenced) > 50


def test_nothing_is_fetched_and_nothing_runs(hostile: WrittenReport, page: Page) -> None:
    assert [address for address in page.fetched() if not address.startswith(("data:", "#"))] == []
    assert {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags} == set()
    assert [name for _, attributes in page.tags for name in attributes if name.startswith("on")] == []
    css = "".join(text for tag, text in page.texts if tag == "style")
    assert "@import" not in css
    assert "url(" not in css
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", hostile.page.read_text(encoding="utf-8")))
    assert addresses <= {"http://www.w3.org/1999/xlink"}  # the name of a namespace


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_as_it_is(page: Page, name: str) -> None:
    shown = " ".join(re.sub(r"[\x00-\x1f]", lambda found: " " if found[0] in "\t\n" else "\ufffd", name).split())
    assert shown in page.text()


def test_hostile_names_add_no_tag(page: Page) -> None:
    assert [attributes for tag, attributes in page.tags if tag == "img" and "onerror" in attributes] == []
    assert "alert(1)" in page.text()


def test_every_figure_is_a_valid_svg_and_png_file_beside_the_page(hostile: WrittenReport) -> None:
    folder = hostile.page.parent / "figures"
    assert set(hostile.figures) == set(folder.iterdir())
    stems = [figure.stem for figure in hostile.figures]
    assert len(stems) == 2 * len(set(stems)) > 30
    for figure in hostile.figures:
        if figure.suffix == ".svg":
            assert ElementTree.parse(figure).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert imread(figure).std() > 0


def test_figures_of_the_page_take_the_colours_of_its_reader(hostile: WrittenReport) -> None:
    html = hostile.page.read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    # A colour that is no variable would be as dark on a dark page as on a light one.
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", drawings)) == set()
    variables = set(re.findall(r"var\((--\w+)\)", drawings))
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL))
    assert variables <= light
    assert variables <= dark


def test_the_headline_is_the_mrr_before_and_after(page: Page) -> None:
    assert re.search(r"Test MRR 0\.\d{3} → 0\.\d{3} [\d.,]+ times as high", page.text())


def test_a_bare_run_says_how_to_make_every_section(bare: WrittenReport) -> None:
    text, run = Page.read(bare.page).text(), bare.page.parent.parent
    for command in ("links", "qa", "language", "geometry", "rerank"):
        assert f"kalm evaluate {command} {run}" in text
    assert f"kalm train --out {run} --resume" in text
    assert f"kalm evaluate links {run} --baseline" in text
    assert bare.figures == ()
    assert bare.problems == ()


@pytest.mark.usefixtures("undrawn")
def test_published_rows_stand_among_ours_where_the_graph_is_theirs(full: Path) -> None:
    for file in (full / "results").glob("links*.json"):
        file.write_text(
            file.read_text(encoding="utf-8").replace('"graph": "world"', '"graph": "WN18RR"'), encoding="utf-8"
        )
    text = Page.read(write_report(full).page).text()
    assert "Published on WN18RR, another graph" not in text
    row = "smollm2-135m, unaligned (this run)"
    assert text.index("Llama-2-7B, unaligned") < text.index(row) < text.index("MoCoKGC – 0.742")
    assert "KaLM, Mistral-7B 25 0.634 0.526 0.743 0.872" in text


def test_two_models_that_were_measured_on_different_texts_are_not_passed_off_as_comparable(tmp_path: Path) -> None:
    write_full_run(tmp_path)
    file = tmp_path / "results" / "geometry.baseline.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"protocol": "five"}), encoding="utf-8")
    page = write_report(tmp_path).page.read_text(encoding="utf-8")
    assert "Not of the same texts (unaligned: five; aligned: a sample by seed): measure both again." in page


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    run = write_bare_run(tmp_path / "run")
    first = write_report(run).page.read_bytes()
    assert write_report(run).page.read_bytes()[:500] == first[:500]
    assert sorted(path.name for path in (run / "report").iterdir()) == ["index.html"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"wanted a run folder, found no config\.yaml in it\. Give a folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
