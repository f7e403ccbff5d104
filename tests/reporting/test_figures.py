"""All figures of the saved results: none without a producer, none out of date, the same bytes wherever drawn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.testing.compare import compare_images

from diablo_theory.errors import ResultsError
from diablo_theory.reporting import figures
from diablo_theory.reporting.plans import NothingToDrawError, Plan, save_plans
from diablo_theory.reporting.style import UNDATED

ROOT = Path(__file__).resolve().parents[2]
SAVED, KEPT = ROOT / "paper_results", ROOT / "figures"
COMMITTED = sorted(path.stem for path in KEPT.glob("*.png"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, *figures.draw_figures(SAVED, folder)


def test_every_figure_is_drawn_or_says_which_command_is_missing(drawn):
    _, written, skipped = drawn
    made = {path.stem for path in written}
    assert made | set(skipped) == set(figures.plans(SAVED))
    assert not made & set(skipped)
    for why in skipped.values():
        assert re.search(r"`diablo-theory \w+", why), why
        assert "paper_results" in why


def test_every_kept_file_has_a_producer_and_every_producer_its_files(drawn):
    _, written, _ = drawn
    kept = {path.name for path in KEPT.iterdir() if path.suffix in UNDATED}
    assert kept == {path.name for path in written}, "run `python figures/make_figures.py`"


def test_every_image_in_the_readme_has_a_producer():
    shown = re.findall(r"!\[[^\]]*\]\(figures/(\w+)\.\w+\)", (ROOT / "README.md").read_text())
    assert shown
    assert set(shown) <= set(COMMITTED)


@pytest.mark.parametrize("stem", COMMITTED)
def test_figures_look_as_they_are_kept(drawn, stem):
    """Rendering may differ by a shade at the edge of a line; a moved label or another colour is far more."""
    folder = drawn[0]
    copy = folder / "kept" / f"{stem}.png"  # the comparison writes beside what it is given
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes((KEPT / f"{stem}.png").read_bytes())
    assert compare_images(str(copy), str(folder / f"{stem}.png"), tol=2) is None


def test_the_comparison_sees_a_changed_look(drawn):
    folder = drawn[0]
    figure = figures.plans(SAVED)["method"].draw()
    figure.axes[0].patches[-1].set_facecolor("white")
    save_plans({"changed": Plan(lambda: figure, "")}, folder)
    assert compare_images(str(KEPT / "method.png"), str(folder / "changed.png"), tol=2) is not None


def test_another_process_draws_the_same_bytes(drawn, tmp_path):
    _, written, _ = drawn
    command = [sys.executable, "-m", "diablo_theory", "figures", "--results", str(SAVED), "--out", str(tmp_path)]
    # Sets come in another order there, and it is another second: a date or an order in a file would show.
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    for path in written:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_without_saved_results_all_but_the_diagram_are_skipped(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for suffix in UNDATED:
        (out / f"convergence{suffix}").write_text("out of date")
    written, skipped = figures.draw_figures(tmp_path, out)
    assert {path.stem for path in written} == {"method"}
    assert "`diablo-theory descend --out paper_results/descent` produces" in skipped["convergence"]
    assert str(tmp_path / "descent" / "descent.csv") in skipped["convergence"]
    assert not list(out.glob("convergence*"))


def test_no_folder_is_told():
    with pytest.raises(ResultsError, match="nowhere is no folder of saved results"):
        figures.plans(Path("nowhere"))


def test_data_without_anything_of_a_figures_kind_skip_it(tmp_path):
    def nothing():
        raise NothingToDrawError("no run of that kind")

    (tmp_path / "one.svg").write_text("out of date")
    assert save_plans({"one": Plan(nothing, "not there")}, tmp_path) == ([], {"one": "no run of that kind"})
    assert not list(tmp_path.iterdir())
