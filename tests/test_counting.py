"""Quoted parameters, counted again."""

from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.counting import count_published
from diablo_theory.errors import ResultsError
from diablo_theory.reporting.parameters import COUNTS, read_counts, readable_counts, reading

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def counts():
    return count_published(ROOT / "paper_results" / "published")


def test_counts_are_those_worked_out_by_hand(counts):
    """4096 x 14336 twice, 4096 x 4096, and k, v of 4096 x 1024, over 64, in 32 layers: 71,303,168 of 8,030,261,248."""
    row = counts[
        (counts["model"] == "LLaMA3-8B") & (counts["suite"] == "commonsense") & (counts["method"] == "diablo")
    ]
    by_hand = 32 * (2 * 4096 * 14_336 + 4096 * 4096 + 2 * 4096 * 1024) // 64
    assert row["params"].tolist() == [by_hand] == [71_303_168]
    assert row["pct"].iloc[0] == pytest.approx(100 * by_hand / 8_030_261_248)
    assert row["quoted_pct"].tolist() == [1.04]


def test_every_quote_is_explained(counts):
    found = {row["setting"]: reading(row) for row in counts[counts["suite"] == "commonsense"].to_dict("records")}
    assert found["DiaBlo N=128"] == "as counted"
    assert all(reading(row) for row in counts.to_dict("records"))
    grouped = counts[(counts["model"] == "LLaMA3-8B") & (counts["method"] == "diablo")]
    assert {reading(row) for row in grouped.to_dict("records")} == {
        "key and value matrices counted as wide as the query's"
    }


def test_a_quote_that_no_count_gives_has_no_reading(counts):
    assert reading(dict(counts.iloc[0]) | {"quoted_pct": 3.14}) == ""
    assert reading(dict(counts.iloc[0]) | {"quoted_pct": 3.14, "pct_bare": None}) == ""  # one that was not counted
    other = readable_counts(counts.assign(quoted_pct=3.14, quoted_params=None))
    assert set(other["The quote is"]) == {"none of the ways tried"}


def test_the_saved_table_is_current(counts):
    pd.testing.assert_frame_equal(read_counts(ROOT / "paper_results" / "counts.csv"), counts, check_dtype=False)


def test_the_command_tells_and_writes(shell, tmp_path):
    status, out, _ = shell("count", "--published", ROOT / "paper_results" / "published", "--out", tmp_path / "counts")
    assert status == 0
    assert "71,303,168" in out
    assert list(read_counts(tmp_path / "counts" / "counts.csv")) == list(COUNTS)
    status, _, told = shell("count", "--published", tmp_path / "nowhere")
    assert status == 1
    assert "holds no published numbers" in told.replace("\n", " ")


@pytest.mark.parametrize("size", ["0", "123456"])
def test_a_size_that_no_model_has_is_told_with_its_row(tmp_path, size):
    name = "commonsense_diablo.csv"
    text = (ROOT / "paper_results" / "published" / name).read_text()
    (tmp_path / name).write_text(text.replace("DiaBlo N=128", f"DiaBlo N={size}"))
    message = rf"{name}, DiaBlo N={size} on LLaMA2-7B, .*: this cannot be counted: num_blocks must be .*, got {size}"
    with pytest.raises(ResultsError, match=message):
        count_published(tmp_path)


def test_damaged_tables_are_told(tmp_path):
    with pytest.raises(ResultsError, match=r"counts.csv cannot be read .*diablo-theory count"):
        read_counts(tmp_path / "counts.csv")
    (tmp_path / "counts.csv").write_text("suite,model\n")
    with pytest.raises(ResultsError, match="lacks the column"):
        read_counts(tmp_path / "counts.csv")
