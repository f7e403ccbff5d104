import re

import pandas as pd
import pytest

from diablo_theory.reporting.findings import findings
from diablo_theory.reporting.results import collect
from diablo_theory.reporting.tables import build, interval, latex, markdown, readable, write_tables, write_words


@pytest.fixture(scope="module")
def tables(full_results):
    return build(collect(full_results))


def test_a_line_per_check_and_method(tables):
    assert list(tables.verdicts["passed"]) == [5, 5, 5, 5]
    assert list(tables.results["label"])[:4] == ["Untouched model", "Full fine-tuning", "DiaBlo N=64", "LoRA r=5"]
    claim, control = tables.verdicts.iloc[0], tables.verdicts.iloc[1]
    assert claim["worst_claim_margin"] == pytest.approx(9e-9 / 5)  # the smallest
    assert control["worst_claim_margin"] == pytest.approx(-0.3)  # the closest to holding


def test_scores_are_means_over_seeds(tables, full_results):
    data = collect(full_results)
    mine = data.items[(data.items["task"] == "word_problems") & (data.items["label"] == "LoRA r=5")]
    row = tables.results[(tables.results["task"] == "word_problems") & (tables.results["label"] == "LoRA r=5")].iloc[0]
    assert row["exact_match"] == pytest.approx(100 * mine["exact"].mean())
    assert (row["seeds"], row["n"], row["clusters"]) == (2, 60, mine["cluster"].nunique())
    assert tables.costs.set_index("label").loc["LoRA r=5", "peak_mib"] == 1440


def test_differences_cover_the_three_pairs(tables):
    pairs = tables.differences[["first", "second"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [
        ["DiaBlo N=64", "LoRA r=5"],
        ["DiaBlo N=64", "Full fine-tuning"],
        ["LoRA r=5", "Full fine-tuning"],
    ]
    assert set(tables.differences["metric"]) == {"exact_match", "loss_per_token"}


def test_a_difference_that_is_not_seen_is_said_so(tables, full_results):
    unseen = tables.differences[~tables.differences["seen"]]
    assert len(unseen)
    words = readable(tables)["differences"]
    assert (words["Reading"] == "no difference seen").sum() == len(unseen)
    text = " ".join(f.text for f in findings(collect(full_results), tables))
    assert text.count("no difference seen") == len(unseen)


def test_methods_without_a_common_seed_are_not_compared(make, tmp_path):
    make.manifest(tmp_path)
    make.run(tmp_path, "DiaBlo N=64", seed=0)
    make.run(tmp_path, "LoRA r=5", seed=1)
    assert build(collect(tmp_path)).differences.empty


def test_findings_are_computed(tables, full_results):
    found = findings(collect(full_results), tables)
    text = {topic: " ".join(f.text for f in found if f.topic == topic) for topic in {f.topic for f in found}}
    assert "All 20 verdicts of 2 checks" in text["Theory"]
    assert "before training" in text["Word problems"]
    assert "not comparable to the paper" in text["Scale"]
    assert "of 49 points" in text["Map"]
    assert not any(f.alarm for f in found)


def test_failures_and_unfinished_runs_raise_the_alarm(make, results):
    path = results / "theory" / "verdicts.csv"
    verdicts = pd.read_csv(path)
    verdicts.loc[0, "passed"] = False
    verdicts.to_csv(path, index=False)
    (results / "runs" / "half").mkdir()
    make.manifest(results, finished=None)
    data = collect(results)
    alarms = [f.text for f in findings(data, build(data)) if f.alarm]
    assert any("1 of 20 verdicts did not come out as predicted: L1 (claim: 1 of 5)" in text for text in alarms)
    assert any("half" in text for text in alarms)
    assert any("has not finished" in text for text in alarms)


def test_written_tables(tables, tmp_path):
    written = write_tables(tables, tmp_path)
    assert len(written) == 5 * 4
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "differences.csv"), tables.differences)
    assert (tmp_path / "results.md").read_text().startswith("| Task ")


def test_words():
    assert interval(-0.5, -1, 0.25, unit=" points", sign=True) == "−0.5 points (−1.0 to +0.2)"
    assert interval(float("nan"), 0, 0) == "—"
    assert interval(1, float("nan"), float("nan"), 2) == "1.00"
    assert "a\\|b" in markdown(pd.DataFrame({"x": ["a|b"]}))


def test_words_as_latex_with_booktabs_rules():
    text = latex(pd.DataFrame({"Share, %": ["50%", "a_b & {c} #1"], "Value": ["−2.3", "x < y ± 1"]}))
    assert r"Share, \% & Value \\" in text
    assert r"50\% & $-$2.3 \\" in text
    assert r"a\_b \& \{c\} \#1 & x $<$ y $\pm$ 1 \\" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert text.isascii()


def test_long_cells_break_their_lines_in_latex():
    assert text_of_columns(latex(pd.DataFrame({"a": ["b"], "c": ["d" * 60]}))) == r"lp{0.30\linewidth}"
    assert text_of_columns(latex(pd.DataFrame({"a": ["b"]}))) == "l"


def test_a_table_is_no_wider_than_its_page():
    columns = text_of_columns(latex(pd.DataFrame({name: [name * 300] for name in "abcdef"} | {"short": ["x" * 10]})))
    shares = [float(share) for share in re.findall(r"p\{([\d.]+)", columns)]
    assert len(shares) == 6
    assert 0.5 < sum(shares) <= 0.95 - 0.012 * 10


def text_of_columns(text):
    return text.split("\n")[0].removeprefix(r"\begin{tabular}{").removesuffix("}")


def test_words_are_written_in_every_format(tmp_path):
    files = write_words(pd.DataFrame({"a": ["<b>"]}), tmp_path / "tables", "t")
    assert [file.name for file in files] == ["t.md", "t.tex", "t.html"]
    assert "&lt;b&gt;" in (tmp_path / "tables" / "t.html").read_text()
