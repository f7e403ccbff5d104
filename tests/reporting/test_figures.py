"""All figures of the saved results: none without a producer, none out of date, the same bytes wherever drawn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from diablo_theory.errors import ResultsError
from diablo_theory.reporting import figures
from diablo_theory.reporting.plans import NothingToDrawError, Plan, save_plans
from diablo_theory.reporting.style import UNDATED

ROOT = Path(__file__).resolve().parents[2]
SAVED, KEPT = ROOT / "paper_results", ROOT / "figures"
#: Of the pixels of two drawings that look alike; at the edges of lines and letters machines may differ.
FEW = 0.002


def apart(one, two):
    """Share of pixels that differ by more than an eighth of the scale in some colour."""
    first, second = imread(one), imread(two)
    if first.shape != second.shape:
        return 1.0
    return float((np.abs(first - second).max(axis=-1) > 1 / 8).mean())


def test_every_figure_is_kept_as_it_is_drawn_or_says_which_command_is_missing(tmp_path):
    """One test, since drawing all takes a while."""
    written, skipped = figures.draw_figures(SAVED, tmp_path)
    made = {path.stem for path in written}
    assert {path.stem for path in written if path.parent.name == "column"} == made
    assert made | set(skipped) == set(figures.all_plans(SAVED))
    assert not made & set(skipped)
    for why in skipped.values():
        assert re.search(r"`diablo-theory \w+", why), why
        assert "paper_results" in why
    kept = {path.relative_to(KEPT) for path in KEPT.rglob("*") if path.suffix in UNDATED}
    # A kept file that nothing draws is an orphan; one that is missing was forgotten.
    assert kept == {path.relative_to(tmp_path) for path in written}, "run `python figures/make_figures.py`"
    changed = {stem: share for stem in made if (share := apart(*(f / f"{stem}.png" for f in (KEPT, tmp_path)))) > FEW}
    assert not changed, "these look otherwise than those kept: `python figures/make_figures.py`, look, and keep them"


def test_every_figure_of_the_papers_says_what_is_on_it():
    assert [stem for stem, entry in figures.ENTRIES.items() if len(entry.caption) < 20] == []


def test_every_image_in_the_readme_has_a_producer():
    shown = set(re.findall(r"!\[[^\]]*\]\(figures/(\w+)\.\w+\)", (ROOT / "README.md").read_text()))
    assert shown
    assert shown <= {stem for stem, plan in figures.all_plans(SAVED).items() if plan.available}


def white_block(figure):
    figure.axes[0].patches[-1].set_facecolor("white")


def moved_word(figure):
    figure.axes[1].texts[-1].set_x(5.5)


@pytest.mark.parametrize("change", [white_block, moved_word])
def test_the_comparison_sees_a_changed_look(tmp_path, change):
    figure = figures.all_plans(SAVED)["method"].draw()
    change(figure)
    save_plans({"changed": Plan(lambda: figure, "")}, tmp_path)
    assert apart(KEPT / "method.png", tmp_path / "changed.png") > FEW


@pytest.mark.slow
def test_another_process_draws_the_same_bytes(tmp_path):
    for seed in ("1", "2"):
        # Sets come in another order there, and it is another second: a date or an order in a file would show.
        command = [sys.executable, "-m", "diablo_theory", "figures", "--results", SAVED, "--out", tmp_path / seed]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
    one, two = (
        {path.relative_to(tmp_path / seed): path.read_bytes() for path in (tmp_path / seed).rglob("*.*")}
        for seed in ("1", "2")
    )
    assert one
    assert one == two


def test_without_saved_results_all_but_the_diagram_are_skipped(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for suffix in UNDATED:
        (out / f"convergence{suffix}").write_text("out of date")
    written, skipped = figures.draw_figures(tmp_path, out)
    assert {path.stem for path in written} == {"method"}
    assert "`diablo-theory descend --out paper_results/descent` produces" in skipped["convergence"]
    assert f"{tmp_path.name}/descent/descent.csv" in skipped["convergence"]
    assert not list(out.glob("convergence*"))


def test_no_folder_is_told():
    with pytest.raises(ResultsError, match="nowhere is no folder of saved results"):
        figures.all_plans(Path("nowhere"))


def test_data_without_anything_of_a_figures_kind_skip_it(tmp_path):
    def nothing():
        raise NothingToDrawError("no run of that kind")

    (tmp_path / "one.svg").write_text("out of date")
    assert save_plans({"one": Plan(nothing, "not there")}, tmp_path) == ([], {"one": "no run of that kind"})
    assert not list(tmp_path.iterdir())
