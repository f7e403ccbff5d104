import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.speeds import COLUMNS, read_speeds, readable_speeds, speed_table

ROWS = [
    ("layer", "time", 1.0, 0.5, 2500.0, "times", 3, "m1=4", "at most 2"),
    ("layer", "rank", 4096.0, 1, 1, "", 1, "m1=4", ""),
]
HERE = {
    "package_version": "0.1.0",
    "commit": "abc",
    "dirty": False,
    "cpu": "a processor",
    "threads": 2,
    "torch": "2.0.0",
    "date": "2026-11-29",
}
LINES = pd.DataFrame(ROWS, columns=list(COLUMNS)).assign(**HERE)


def save(folder, lines=LINES):
    folder.mkdir(exist_ok=True)
    lines.to_csv(folder / "layer.csv", index=False)


def test_measures_come_back_with_where_they_were_made(tmp_path):
    save(tmp_path)
    pd.testing.assert_frame_equal(read_speeds(tmp_path), LINES)


def test_measures_in_words():
    words = readable_speeds(LINES)
    assert words["Median"].tolist() == ["1.00 times", "4,096"]
    assert words["Range"].tolist() == ["0.500 to 2,500", "—"]
    assert words["Aimed for, or expected"].tolist() == ["at most 2", "—"]


def test_a_setting_that_all_lines_share_is_written_once():
    assert speed_table(LINES).caption == "m1=4"
    assert len(speed_table(LINES.assign(setting=["m1=4", "m1=8"])).columns) == 5


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ResultsError, match="holds no benchmark; `diablo-theory speed --out"):
        read_speeds(tmp_path)
    save(tmp_path, LINES.drop(columns="aim"))
    with pytest.raises(ResultsError, match=r"layer\.csv lacks the column\(s\) aim; `diablo-theory speed layer`"):
        read_speeds(tmp_path)
    (tmp_path / "layer.csv").write_text("")
    with pytest.raises(ResultsError, match=r"layer\.csv cannot be read .*`diablo-theory speed layer` writes it"):
        read_speeds(tmp_path)
