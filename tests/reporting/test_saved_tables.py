"""Saved tables: what their commands cannot have written is told by file, line and column."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.captures import read_captures
from diablo_theory.reporting.convergence import read_descent
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.parameters import read_counts
from diablo_theory.reporting.saved_tables import read_table
from diablo_theory.reporting.speeds import read_speeds
from diablo_theory.reporting.steps import read_steps, side_measures

SAVED = Path(__file__).parents[2] / "paper_results"
KINDS = {"n": "number", "m": "optional", "f": "flag", "t": "text", "b": "blank", "a": "any"}
KINDS |= {"s": "share", "w": ("one", "two"), "c": "count", "r": "real", "e": "maybe", "p": "amount"}
GOOD = "n,m,f,t,b,a,other,w,c,r,e,p,s\n1,,True,x,,,,one,1,inf,,,0\n2.5,3,False,y,,z,1,two,8,-1,True,7,0.5\n"


def read(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    return read_table(tmp_path / "table.csv", KINDS, "make it", [("n", "t")])


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
        (",two,", ",tow,", "line 3: w is 'tow'; allowed: one, two"),
        (",8,", ",8.5,", "line 3: c is .*8.5.*; allowed: a whole number above 0"),
        (",8,", ",0,", "line 3: c is 0; allowed: a whole number above 0"),
        (",-1,", ",,", "line 3: r is nan; allowed: a number, or an infinite one"),
        (",0.5", ",1.5", "line 3: s is 1.5; allowed: a number from 0 to 1"),
        ("True,7", "yes,7", "line 3: e is 'yes'; allowed: True, False or nothing"),
        ("True,7", "True,0", "line 3: p is 0.*; allowed: a number above 0, or nothing"),
        ("2.5,3,False,y", "1,3,False,x", r"table.csv, lines 2 and 3, are both of n 1.*, t x\. `make it` writes it"),
        (
            "2.5,3,False,y",
            "2.5,3,False,y,1",
            r"cannot be read \(Error tokenizing data.*saw 14\)\. `make it` writes it",
        ),
        ("n,m,f", "k,m,f", r"lacks the column\(s\) n; `make it` writes it"),
        (GOOD[GOOD.index("1") :], "", "has no rows"),
        (GOOD, "", "cannot be read"),
        ("2.5,3", '"2.5,3', "cannot be read|lacks|allowed"),
    ],
)
def test_damage_is_told(tmp_path, old, new, message):
    with pytest.raises(ResultsError, match=message) as refused:
        read(tmp_path, GOOD.replace(old, new))
    assert "\n" not in str(refused.value)


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
    "diagnosis/captures.csv": lambda root: read_captures(
        root / "diagnosis" / "captures.csv", Evidence(root, root).layers
    ),
}
#: Of which a further row cannot be told from one that is there.
ONCE = [name for name in READERS if not name.startswith(("speed/", "steps/kernels", "steps/growth", "steps/loading"))]


@pytest.fixture
def saved(tmp_path):
    for folder in ("steps", "speed", "descent", "diagnosis"):
        shutil.copytree(SAVED / folder, tmp_path / folder)
    shutil.copy(SAVED / "counts.csv", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ONCE)
def test_a_row_that_is_there_twice_is_refused(saved, name):
    lines = (saved / name).read_text().splitlines(keepends=True)
    (saved / name).write_text("".join([*lines, lines[-1]]))
    with pytest.raises(ResultsError, match=rf"{name}, lines {len(lines)} and {len(lines) + 1}, are both of "):
        READERS[name](saved)


def test_captures_are_of_the_layers_beside_them(saved):
    file = saved / "diagnosis" / "layers.csv"
    pd.read_csv(file)[1:].to_csv(file, index=False)
    with pytest.raises(ResultsError, match=r"captures.csv and layers.csv beside it are not both of model.layers.0"):
        READERS["diagnosis/captures.csv"](saved)


def test_layers_of_several_numbers_of_blocks_are_refused(saved):
    file = saved / "diagnosis" / "layers.csv"
    table = pd.read_csv(file)
    table.loc[3, "num_blocks"] = 32
    table.to_csv(file, index=False)
    with pytest.raises(ResultsError, match=r"layers.csv is of several N \(32, 64\)"):
        READERS["diagnosis/layers.csv"](saved)


def test_a_count_of_nothing_is_refused(saved):
    table = pd.read_csv(saved / "counts.csv")
    table.loc[2, ["quoted_pct", "quoted_params"]] = None
    table.to_csv(saved / "counts.csv", index=False)
    with pytest.raises(ResultsError, match=r"counts.csv, line 4: quoted_pct and quoted_params are empty"):
        READERS["counts.csv"](saved)


@pytest.mark.parametrize("name", READERS)
def test_every_column_that_is_read_is_checked(saved, name):
    """Without a column, or with a word for every number in it, a reader refuses or reads what it needs not."""
    whole = pd.read_csv(saved / name)
    READERS[name](saved)
    refused = 0
    for column in whole:
        for damaged in (whole.drop(columns=column), whole.assign(**{column: "wrong"})):
            damaged.to_csv(saved / name, index=False)
            refused += told(lambda: READERS[name](saved), Path(name).name)
    assert refused > 3


def told(read, name):
    """Whether reading is refused, by the file's name; what is read goes through."""
    try:
        read()
    except ResultsError as error:
        return name in str(error)
    return False


@pytest.mark.parametrize(("column", "value"), [("model", "LLaMA2-8B"), ("setting", "DiaBlo"), ("file", "elsewhere")])
def test_counts_are_of_published_rows(saved, column, value):
    shutil.copytree(SAVED / "published", saved / "published")
    assert len(Evidence(saved, saved).counts) > 5
    table = pd.read_csv(saved / "counts.csv")
    table.loc[2, column] = value
    table.to_csv(saved / "counts.csv", index=False)
    with pytest.raises(
        ResultsError, match=rf"counts.csv, line 4: no published row is of .*{value}.*; `diablo-theory c"
    ):
        _ = Evidence(saved, saved).counts


@pytest.mark.parametrize(("column", "value"), [("parameters", 0), ("left", 0.0)])
def test_a_descent_that_cannot_be_drawn_is_refused(saved, column, value):
    file = saved / "descent" / "descent.csv"
    table = pd.read_csv(file)
    table.loc[0, column] = value
    table.to_csv(file, index=False)
    with pytest.raises(ResultsError, match=r"descent.csv.*`diablo-theory descend` writes it"):
        READERS["descent/descent.csv"](saved)
