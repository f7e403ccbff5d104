"""Saved tables: what their commands cannot have written is told by file, line and column."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.convergence import read_descent
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.parameters import read_counts
from diablo_theory.reporting.saved_tables import read_table
from diablo_theory.reporting.speeds import read_speeds
from diablo_theory.reporting.steps import read_steps, side_measures

SAVED = Path(__file__).parents[2] / "paper_results"
KINDS = {"n": "number", "m": "optional", "f": "flag", "t": "text", "b": "blank", "a": "any"}
GOOD = "n,m,f,t,b,a,other\n1,,True,x,,,\n2.5,3,False,y,,z,1\n"


def read(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    return read_table(tmp_path / "table.csv", KINDS, "make it")


def test_columns_have_their_types(tmp_path):
    found = read(tmp_path, GOOD)
    assert found["n"].tolist() == [1, 2.5]
    assert found["f"].dtype == bool
    assert found["t"].tolist() == ["x", "y"]
    assert found["b"].tolist() == ["", ""]
    assert "other" in found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2.5", "two", r"line 3: n is 'two'; allowed: a number\. `make it` writes it"),
        ("2.5", "", "line 3: n is .*nan.*; allowed: a number"),
        ("2.5", "inf", "line 3: n is .*inf.*; allowed: a number"),
        (",3,", ",three,", "line 3: m is 'three'; allowed: a number or nothing"),
        ("False", "perhaps", "line 3: f is 'perhaps'; allowed: True or False"),
        ("False", "", "line 3: f is nan; allowed: True or False"),
        (",y,", ",,", "line 3: t is nan; allowed: text"),
        ("n,m,f", "k,m,f", r"lacks the column\(s\) n; `make it` writes it"),
        (GOOD[GOOD.index("1") :], "", "has no rows"),
        (GOOD, "", "cannot be read"),
        ("2.5,3", '"2.5,3', "cannot be read|lacks|allowed"),
    ],
)
def test_damage_is_told(tmp_path, old, new, message):
    with pytest.raises(ResultsError, match=message):
        read(tmp_path, GOOD.replace(old, new))


READERS = {
    "steps/times.csv": lambda root: read_steps(root / "steps"),
    "steps/contenders.csv": lambda root: read_steps(root / "steps"),
    "steps/kernels.csv": lambda root: side_measures(root / "steps"),
    "steps/growth.csv": lambda root: side_measures(root / "steps"),
    "steps/loading.csv": lambda root: side_measures(root / "steps"),
    "speed/map.csv": lambda root: read_speeds(root / "speed"),
    "descent/descent.csv": lambda root: read_descent(root / "descent"),
    "counts.csv": lambda root: read_counts(root / "counts.csv"),
    "diagnosis/layers.csv": lambda root: Evidence(root, root).layers,
}


@pytest.mark.parametrize("name", READERS)
def test_every_column_that_is_read_is_checked(tmp_path, name):
    """Without a column, or with a word for every number in it, a reader refuses or reads what it needs not."""
    for folder in ("steps", "speed", "descent", "diagnosis"):
        shutil.copytree(SAVED / folder, tmp_path / folder)
    shutil.copy(SAVED / "counts.csv", tmp_path)
    whole = pd.read_csv(tmp_path / name)
    READERS[name](tmp_path)
    refused = 0
    for column in whole:
        for damaged in (whole.drop(columns=column), whole.assign(**{column: "wrong"})):
            damaged.to_csv(tmp_path / name, index=False)
            refused += told(lambda: READERS[name](tmp_path), Path(name).name)
    assert refused > 3


def told(read, name):
    """Whether reading is refused, by the file's name; what is read goes through."""
    try:
        read()
    except ResultsError as error:
        return name in str(error)
    return False
