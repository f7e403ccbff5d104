"""The report in a real headless browser: nothing runs over a phone's screen, every picture loads, it prints."""

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from diablo_theory.reporting.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]
#: A window of any width, which Chromium's own are not, and in the title what a person would see in it: widths,
#: pictures that did not load, and the size of the smallest letters.
WINDOW = """<title></title><iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe>
<script>window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument, images = [...page.images];
  const broken = images.filter(i => !i.naturalWidth).length;
  const words = [...page.querySelectorAll("p, td, th, li, summary")];
  const sizes = words.map(e => parseFloat(getComputedStyle(e).fontSize));
  const screen = page.defaultView.innerWidth, wide = page.documentElement.scrollWidth;
  document.title = [wide, screen, images.length, broken, Math.min(...sizes)].join(" ");
}}</script>"""


@pytest.fixture(scope="module")
def page(full_results, tmp_path_factory):
    folder = shutil.copytree(full_results, tmp_path_factory.mktemp("report") / "results")
    return write_report(folder, Path(__file__).parents[2] / "paper_results")


def browse(*arguments):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [360, 430, 1200])  # telephones, and a desk
def test_nothing_runs_over_the_screen(page, tmp_path, width):
    looked = tmp_path / "report.html"
    looked.write_text(WINDOW.format(width=width, page=escape(page.read_text())))
    dom = browse("--window-size=1400,1000", "--dump-dom", looked.as_uri())
    title = re.search(r"<title>(.+?)</title>", dom)[1]
    wide, screen, pictures, broken, smallest = map(float, title.split())
    assert screen == pytest.approx(width, abs=20)
    assert wide <= screen
    assert (pictures, broken) == (page.read_text().count("<img "), 0)
    assert pictures > 15
    assert smallest >= 11


def test_it_prints(page, tmp_path):
    browse(f"--print-to-pdf={tmp_path / 'report.pdf'}", page.as_uri())
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
