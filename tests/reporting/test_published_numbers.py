"""The published numbers of this repository, and what is told of damaged ones."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.published import AVERAGE, conflicts, odd_averages, read_published

FOLDER = Path(__file__).parents[2] / "paper_results" / "published"
FILE = "arithmetic_diablo.csv"


@pytest.fixture(scope="module")
def published():
    return read_published(FOLDER)


@pytest.fixture
def copied(tmp_path):
    shutil.copy(FOLDER / FILE, tmp_path)
    return tmp_path


def test_all_of_them_fit_the_schema(published):
    assert len(published) == 840
    assert set(published["source"]) == {"published"}
    assert set(published["scale"]) == {"full"}
    drawn = published["certainty"] == "measured"
    assert (published.loc[drawn, "ci_high"] - published.loc[drawn, "value"]).round(9).eq(0.05).all()
    assert published.loc[~drawn, "ci_low"].isna().all()


def test_the_paper_s_own_headline_is_there(published):
    rows = published[(published["file"] == "commonsense_diablo") & (published["method"] == "diablo")]
    assert dict(zip(rows["model"], rows["value"], strict=True)) == {
        "LLaMA2-7B": 83.5,
        "LLaMA3-8B": 87.3,
        "LLaMA-13B": 84.9,
    }


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("metric", "exact_macth", r"Row 2: unknown metric 'exact_macth'.* Did you mean 'exact_match'\?"),
        ("value", 166.5, r"Row 2: value is .*166.5.*; allowed: a percentage from 0 to 100"),
        ("trainable_pct", 101, "Row 2: trainable_pct is .*101.*; allowed: a percentage"),
        ("certainty", "sure", "Row 2: certainty is 'sure'; allowed: one of"),
        ("origin", "", "Row 2: origin is ''; allowed: where a published number stands"),
        ("trainable_params", "112M", "Row 2: trainable_params is '112M'; allowed: a number"),
        ("trainable_params", -1, "Row 2: trainable_params is .*-1.*; allowed: nought or more"),
        ("ci_low", 99.0, "Row 2: ci_low is .*99.*; allowed: at most the value"),
        ("value", float("inf"), "Row 2: value is .*inf.*; allowed: a number"),
        ("suite", "arithmetik", r"Row 2: unknown suite 'arithmetik'\. Did you mean 'arithmetic'\?"),
        ("table", "gsm9k", r"Row 2: unknown table of arithmetic 'gsm9k'\. Did you mean 'gsm8k'\?"),
        ("table", "boolq", "Row 2: unknown table of arithmetic 'boolq'"),
        ("model", "", "Row 2: model is ''; allowed: a name"),
        ("n", -3, "Row 2: n is -3.*; allowed: 1 or more"),
        ("n", "many", "Row 2: n is 'many'; allowed: a number"),
        ("method", "dibalo", r"Row 2: unknown method 'dibalo'.* Did you mean 'diablo'\?"),
        ("suite", "", "Row 2: suite is ''; allowed: a name"),
        ("scale", "small", "Row 2: scale is 'small'; allowed: full"),
        ("schema_version", 2, "Row 2: schema_version is .*2.*; allowed: 3"),
        ("guess", 1, "Unknown column 'guess'"),
    ],
)
def test_what_does_not_fit_is_told_with_its_file(copied, column, value, message):
    rows = pd.read_csv(copied / FILE)
    rows[column] = rows.get(column, pd.Series(dtype=object)).astype(object)
    rows.loc[0, column] = value
    rows.to_csv(copied / FILE, index=False)
    with pytest.raises(ResultsError, match=rf"{FILE}: {message}"):
        read_published(copied)


def test_a_number_that_is_there_twice_is_refused_whichever_file_it_is_in(copied):
    shutil.copy(copied / FILE, copied / "again.csv")
    with pytest.raises(ResultsError, match=rf"again.csv and {FILE} have the same number of .* on "):
        read_published(copied)


def test_truncated_and_missing_files(copied, tmp_path):
    (copied / FILE).write_bytes((copied / FILE).read_bytes()[:400])
    with pytest.raises(ResultsError, match=rf"{FILE}"):
        read_published(copied)
    (copied / FILE).write_text("a\n1\n1,2\n")
    with pytest.raises(ResultsError, match=r"cannot be read \(Error tokenizing data.* saw 2\)\. It was") as refused:
        read_published(copied)
    assert "\n" not in str(refused.value)
    with pytest.raises(ResultsError, match="holds no published numbers"):
        read_published(tmp_path / "nowhere")


def test_means_that_are_not_those_of_their_parts_are_found(published):
    found = odd_averages(published)
    assert found[["file", "model", "setting", "printed"]].to_numpy().tolist() == [
        ["commonsense_sketchtune", "LLaMA3-8B", "LoRA", 82.5]
    ]
    changed = published.copy()
    mean = (changed["file"] == "arithmetic_diablo") & (changed["table"] == AVERAGE) & (changed["method"] == "diablo")
    changed.loc[mean, "value"] += 0.1  # 43.4 of 43.35: as far as rounding goes
    assert len(odd_averages(changed)) == 1 + 1
    changed.loc[mean, "value"] -= 0.05
    assert len(odd_averages(changed)) == 1


def conflict(rows, **named):
    return rows[(rows[list(named)] == pd.Series(named)).all(axis=1)]


def test_sources_that_contradict_each_other_are_listed(published):
    found = conflicts(published)
    full = conflict(found, model="LLaMA3-8B", method="full")
    assert full[["average_1", "average_2"]].to_numpy().tolist() == [[87.5, 83.6]]
    early = conflict(found, model="LLaMA-13B", method="dora", file_2="commonsense_dora-early")
    assert early[["average_1", "average_2"]].to_numpy().tolist() == [[80.8, 81.5]]


def test_other_settings_and_errors_of_reading_are_no_conflicts(published):
    found = conflicts(published)
    assert conflict(found, method="diablo").empty  # bars of 83.5 beside a printed 83.5, N = 64 beside N = 128
    assert not ((found["setting_1"] == "DoRA r=16") & (found["setting_2"] == "DoRA r=32")).any()
    # A "DoRA" of 79.7 is DoRA's own with r = 32, and no conflict with what is quoted of r = 16.
    assert conflict(found, model="LLaMA2-7B", method="dora", setting_1="DoRA r=16").empty
    changed = published.copy()
    bar = (changed["file"] == "commonsense_diablo-bars") & (changed["method"] == "diablo")
    changed.loc[bar, ["value", "ci_low", "ci_high"]] += 0.04
    assert conflict(conflicts(changed), method="diablo").empty
    changed.loc[bar, ["value", "ci_low", "ci_high"]] += 0.04
    assert len(conflict(conflicts(changed), method="diablo")) == 1
