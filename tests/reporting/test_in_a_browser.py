"""The report in a real headless browser: nothing runs over a phone's screen, every picture loads, it prints."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from diablo_theory.reporting.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]
#: Writes into the title what a person would see: widths, and pictures that did not load.
LOOK = """<script>window.onload = () => {
  const broken = [...document.images].filter(i => !i.naturalWidth).length;
  document.title = [document.documentElement.scrollWidth, window.innerWidth, document.images.length, broken].join(" ");
}</script>"""


@pytest.fixture(scope="module")
def page(full_results, tmp_path_factory):
    folder = shutil.copytree(full_results, tmp_path_factory.mktemp("report") / "results")
    return write_report(folder, Path(__file__).parents[2] / "paper_results")


def browse(*arguments):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [500, 1200])  # the narrowest window that Chromium opens, and a desk's
def test_nothing_runs_over_the_screen(page, tmp_path, width):
    looked = tmp_path / "report.html"
    looked.write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    dom = browse(f"--window-size={width},900", "--dump-dom", looked.as_uri())
    wide, screen, pictures, broken = map(int, re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", dom).groups())
    assert screen == pytest.approx(width, abs=20)
    assert wide <= screen
    assert (pictures, broken) == (page.read_text().count("<img "), 0)
    assert pictures > 15


def test_it_prints(page, tmp_path):
    browse(f"--print-to-pdf={tmp_path / 'report.pdf'}", page.as_uri())
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
