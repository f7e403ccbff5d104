"""The report on everything that is saved: claims, published beside reproduced, conflicts, deviations, ages."""

import re
import shutil
from datetime import date
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.overview import counted, decided_claims, inputs, overview, readable_published
from diablo_theory.reporting.report import write_report

ROOT = Path(__file__).parents[2]
DAY = date(2030, 1, 2)


@pytest.fixture(scope="module")
def saved():
    return Evidence(ROOT / "paper_results" / "reproduced", ROOT / "paper_results")


@pytest.fixture(scope="module")
def parts(saved):
    return {part.id: part for part in overview(saved, DAY, pd.DataFrame(columns=["input", "date"]))}


@pytest.fixture(scope="module")
def page(full_results, tmp_path_factory):
    folder = shutil.copytree(full_results, tmp_path_factory.mktemp("report") / "results")
    return write_report(folder, ROOT / "paper_results", DAY)


def test_the_page_has_the_claims_first_and_every_part(page, parts, saved):
    html = page.read_text()
    headings = list(map(unescape, re.findall(r"<h2>(.*?)</h2>", html)))
    assert headings[:3] == ["Summary", "Claims", "Theory"]
    assert re.search(r"Collected: \d+ runs at small scale", html)
    assert html.count('<article class="claim"') == len(decided_claims(saved))
    assert {part.heading for part in parts.values()} <= set(headings)
    assert headings[-2:] == ["What was run where", "Rerun"]
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)


def test_no_path_of_this_machine_is_told(page):
    assert str(ROOT) not in page.read_text() + (page.parent / "report.md").read_text()


def test_markdown_has_the_same_parts(page, parts):
    text = (page.parent / "report.md").read_text()
    assert all(f"## {part.heading}" in text for part in parts.values())
    assert text.index("## Claims") < text.index("## Theory")
    assert (page.parent / "tables" / "claims.tex").is_file()


def test_every_answer_links_to_what_it_was_computed_from(page):
    html = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    articles = dict(re.findall(r'<article class="claim" id="claim-([^"]+)">(.*?)</article>', html, re.DOTALL))
    for found in decided_claims(Evidence(page.parent, ROOT / "paper_results")):
        links = re.findall(r'href="#([^"]+)"', articles[found.claim.id])
        assert set(links) <= set(ids)
        assert links or all(answer.source == "—" for answer in found.answers), found.claim.id
    assert {"check-L2", "figure-verdicts"} <= set(re.findall(r'href="#([^"]+)"', articles["linear-expressivity"]))
    row = re.search(r'<tr id="check-L2">(.*?)</tr>', html)[1]
    assert "L2" in row
    assert "<td>L2</td>" not in html.split('<tr id="check-L2">')[0]


def test_every_published_suite_is_shown(parts, saved):
    ids = {name for shown in parts["suites"].shown for name in shown.ids}
    # What papers print of parameters alone stands beside true counts.
    assert {f"published-{suite}" for suite in saved.published["suite"]} - ids == {"published-parameters"}


def test_the_summary_counts_claims(saved):
    decided = decided_claims(saved)
    text = counted(decided)
    numbers = [int(number) for number in re.findall(r"\b(\d+) ", text)]
    assert numbers[0] == sum(numbers[1:]) == sum(found.claim.by == "paper" for found in decided)
    assert "1 does not hold here" in text or "do not hold here" in text
    own = [found for found in decided if found.claim.by == "ours"]
    assert counted(decided, "ours").startswith(f"Of {len(own)} claims of this project's own ")


def test_published_numbers_say_where_they_stand_and_how_sure_they_are(parts, saved):
    tables = {shown.title: shown.frame for shown in parts["suites"].shown}
    table = tables["Commonsense reasoning: published, at full scale"]
    bars = table[table["How sure"] == "drawn, ± 0.05"]
    assert set(bars["Task"]) == {"Average"}
    assert {"printed", "quoted"} < set(table["How sure"])
    assert table["Source"].str.contains("quoted there from").any()
    assert "GPT-3.5 (ChatGPT)" not in set(table["Model"])
    paper = readable_published(saved.published[saved.published["suite"] == "arithmetic"])
    assert {"GSM8K", "MATH", "Average"} <= set(paper["Task"])


def test_every_suite_of_the_paper_is_there_reproduced_or_not(parts):
    titles = [shown.title for shown in parts["suites"].shown]
    for suite in ("Code", "Safety", "Efficiency"):
        assert f"{suite}: published, at full scale" in titles
        assert f"{suite}: nothing reproduced here yet" in titles


def test_conflicts_and_averages_that_do_not_add_up(parts):
    apart, means = (shown.frame for shown in parts["conflicts"].shown)
    assert apart["Numbers that differ"].str.fullmatch(r"\d+ of \d+").all()
    assert means["Printed"].tolist() == ["82.5"]


def test_deviations_are_those_of_readme(parts):
    frame = parts["deviations"].shown[0].frame
    assert {"ragged-blocks", "lora-budget", "s2ft-like"} <= set(frame["Name"])
    assert frame["What is done"].str.len().gt(30).all()
    assert not frame["What is done"].str.contains("\n").any()


def test_deviations_of_other_papers_are_said_to_be_missing(tmp_path):
    shutil.copytree(ROOT / "paper_results" / "published", tmp_path / "papers" / "published")
    parts = overview(Evidence(tmp_path, tmp_path / "papers"), DAY, pd.DataFrame(columns=["input", "date"]))
    assert next(part for part in parts if part.id == "deviations").text.startswith("Those of the code are listed")


def test_ages_are_counted_from_the_day_of_the_report(saved):
    made = pd.DataFrame(
        [{"input": "x", "date": "2030-01-01"}, {"input": "y", "date": ""}, {"input": "z", "date": "2030-01-02"}]
    )
    frame = next(part for part in overview(saved, DAY, made) if part.id == "inputs").shown[0].frame
    assert frame["Age"].tolist()[:3] == ["1 day", "—", "today"]
    assert frame["Made on"].tolist()[1] == "not noted"
    assert len(frame) == 3 + len(inputs(saved))


@pytest.mark.parametrize("name", ["published/code_diablo.csv", "reproduced/suites/rows.csv"])
def test_rows_of_another_schema_are_refused(tmp_path, full_results, name):
    papers = tmp_path / "paper_results"
    for part in ("published", "reproduced/suites"):
        shutil.copytree(ROOT / "paper_results" / part, papers / part)
    rows = pd.read_csv(papers / name)
    rows.loc[1, "schema_version"] = 2  # one among others
    rows.to_csv(papers / name, index=False)
    results = shutil.copytree(full_results, tmp_path / "results")
    with pytest.raises(ResultsError, match=rf"{Path(name).name}: Row \d: schema_version is 2; allowed: 3"):
        write_report(results, papers)
    assert not (results / "report.html").exists()


def test_a_folder_with_nothing_but_published_numbers_is_enough(tmp_path, full_results):
    papers = tmp_path / "paper_results"
    shutil.copytree(ROOT / "paper_results" / "published", papers / "published")
    html = write_report(shutil.copytree(full_results, tmp_path / "results"), papers, DAY).read_text()
    assert "Conflicts between sources" in html
    assert 'id="claims"' not in html
