"""The report page in a real browser: no error in its console, every image loads, nothing is wider than a phone."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pykalm.api_report import WrittenReport

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = 390, 1280

# A window of a browser cannot be as narrow as a phone, a frame in it can.
PROBE = """<!doctype html><meta charset="utf-8"><title>probe</title>
<iframe id="frame" src="PAGE" style="width: WIDTHpx; height: 844px; border: 0"></iframe><pre id="result"></pre>
<script>
document.getElementById("frame").addEventListener("load", event => {
  const page = event.target.contentDocument, width = event.target.clientWidth;
  page.querySelectorAll("details").forEach(details => { details.open = true; });
  const scrolls = element => element.closest(".scroll, svg");
  const wide = [...page.querySelectorAll("body *")]
    .filter(element => !scrolls(element.parentElement) && element.getBoundingClientRect().right > width + 1)
    .map(element => `${element.tagName}.${element.className.baseVal ?? element.className}`);
  const letters = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height);
  document.getElementById("result").textContent = JSON.stringify({
    width, page: page.documentElement.scrollWidth, wide: [...new Set(wide)],
    images: page.images.length, broken: [...page.images].filter(image => !image.naturalWidth).length,
    drawings: page.querySelectorAll(".panel svg").length, smallest: Math.min(...letters),
  });
});
</script>"""


def browse(page: Path, folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """Open a page in a frame of a width; return what the probe found and what the browser logged."""
    assert BROWSER is not None
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
               "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0", "--window-size=1400,900",
               f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]  # fmt: skip
    done = subprocess.run(
        [BROWSER, *options, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True, encoding="utf-8"
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1])), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed (Debian: apt install chromium)")
@pytest.mark.parametrize("name", ["hostile", "bare"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_browser_shows_the_page_without_error_or_overflow(
    name: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    report: WrittenReport = request.getfixturevalue(name)
    found, log = browse(report.page, tmp_path, width)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    assert (found["width"], found["page"], found["wide"]) == (width, width, [])
    assert found["broken"] == 0
    assert found["drawings"] == len(report.figures) / 2
    if report.figures:
        assert found["smallest"] >= 7  # pixels of a letter's box: below that a label cannot be read
