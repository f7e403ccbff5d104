import io
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
from rich.console import Console

from diablo_theory.reporting.report import examples, provenance, summary, write_report
from diablo_theory.reporting.results import collect


@pytest.fixture(scope="module")
def written(full_results, tmp_path_factory):
    folder = shutil.copytree(full_results, tmp_path_factory.mktemp("report") / "results")
    return write_report(folder)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_one_file_that_loads_nothing(written):
    html = written.read_text()
    assert not re.search(r"https?://|@import|url\(", html)
    tags = Tags()
    tags.feed(html)
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "link", "iframe", "object"}
    images = [attrs for tag, attrs in tags.found if tag == "img"]
    assert len(images) == 6
    assert all(attrs["src"].startswith("data:image/png;base64,") and attrs["alt"] for attrs in images)
    targets = {attrs["href"] for tag, attrs in tags.found if tag == "a"}
    assert targets <= {f"#{attrs['id']}" for _, attrs in tags.found if "id" in attrs}


def test_predictions_are_escaped(written):
    html = written.read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;b&gt;more&lt;/b&gt;" in html


def test_the_folder_is_complete(written):
    folder = written.parent
    assert (folder / "rows.csv").exists()
    assert len(list((folder / "tables").iterdir())) == 5 * 4
    assert len(list((folder / "figures").iterdir())) == 6 * 3
    text = (folder / "report.md").read_text()
    for target in re.findall(r"\]\((.*?)\)", text):
        assert (folder / target).exists()
    assert "no difference seen" in text


def test_the_summary_comes_first_and_the_scale_is_said(written):
    html = written.read_text()
    assert html.index("Summary") < html.index("Theory map")
    assert "not comparable to the paper" in html


def test_writing_again_changes_nothing(small_results, tmp_path):
    folder = shutil.copytree(small_results, tmp_path / "results")
    contents = []
    for _ in range(2):
        write_report(folder)
        contents.append({path: path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]


def test_a_report_of_nothing_names_what_is_missing(make, tmp_path):
    make.manifest(tmp_path, model={}, stages={}, seconds=None, peak_rss_gib=None)
    html = write_report(tmp_path).read_text()
    assert "diablo-theory reproduce" in html
    assert "Figures not drawn" in html
    assert "not recorded" in html


def test_three_right_and_three_wrong(full_results):
    found = examples(collect(full_results))
    counts = found.groupby(["task_name", "label", "right"]).size()
    assert (counts == 3).all()
    assert len(counts) == 2 * (1 + 3 * 2)  # the untouched model has none right


def test_long_answers_are_cut(results):
    path = next(sorted((results / "runs").iterdir())[0].glob("predictions/*.csv"))
    pd.read_csv(path).assign(completion="x" * 5000).to_csv(path, index=False)
    assert examples(collect(results))["completion"].str.len().max() < 800


def test_provenance(full_results):
    lines = provenance(collect(full_results))
    assert lines["Commit"] == "60504b6f00, with uncommitted changes"
    assert lines["Active time"] == "31 min (theory 4 min, runs 25 min, bench 2 min)"
    assert lines["Training seeds"] == "0, 1"


def test_summary_for_the_terminal_is_ascii_text(full_results):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary(collect(full_results)))
    text = console.export_text()
    assert "DiaBlo N=64" in text
    assert "no difference seen" in text
    assert "?" not in text
