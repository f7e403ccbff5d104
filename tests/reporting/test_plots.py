import shutil
import time

import pytest
from matplotlib.colors import to_rgba

from diablo_theory.reporting.drawing import HERE_TINT
from diablo_theory.reporting.plans import save_plans
from diablo_theory.reporting.plots import REPRODUCE, TUNE, plans, results
from diablo_theory.reporting.results import collect
from diablo_theory.reporting.style import UNDATED, looks
from diablo_theory.reporting.tables import build

STEMS = ["verdicts", "theory_map", "training", "results", "cost", "learning_rates"]


def draw(results, folder):
    data = collect(results)
    return save_plans(plans(data, build(data)), folder)


def test_every_figure_twice_gives_the_same_bytes(small_results, tmp_path):
    written, skipped = draw(small_results, tmp_path / "one")
    assert [path.name for path in written] == [f"{stem}{suffix}" for stem in STEMS for suffix in UNDATED]
    assert not skipped
    time.sleep(1.1)  # a date in the file would show
    again, _ = draw(small_results, tmp_path / "two")
    for one, two in zip(written, again, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    assert not list(tmp_path.rglob(".*"))


def test_missing_inputs_skip_their_figure_and_say_what_makes_them(results, tmp_path):
    for stem in STEMS:
        (tmp_path / f"{stem}.png").write_text("out of date")
    shutil.rmtree(results / "theory")
    shutil.rmtree(results / "runs")
    shutil.rmtree(results / "bench")
    (results / "learning_rates.csv").unlink()
    written, skipped = draw(results, tmp_path)
    assert written == []
    assert skipped == dict.fromkeys(STEMS[:-1], REPRODUCE) | {"learning_rates": TUNE}
    assert not list(tmp_path.glob("*.png"))
    assert "`diablo-theory reproduce`" in REPRODUCE
    assert "`diablo-theory tune TASK --out FOLDER`" in TUNE


@pytest.mark.parametrize("bench", [True, False])
def test_costs_with_only_one_of_their_sources(make, tmp_path, bench):
    make.manifest(tmp_path)
    (make.bench(tmp_path) if bench else make.run(tmp_path, "LoRA r=5"))
    written, skipped = draw(tmp_path, tmp_path / "figures")
    assert "cost.pdf" in {path.name for path in written}
    assert ("results" in skipped) is bench


def test_the_untouched_model_alone_has_scores_but_no_curves(make, tmp_path):
    make.manifest(tmp_path)
    make.run(tmp_path, "Untouched model")
    _, skipped = draw(tmp_path, tmp_path / "figures")
    assert set(skipped) == {"verdicts", "theory_map", "training", "cost", "learning_rates"}


def said(figure):
    return " ".join(figure.get_supxlabel().split())


def test_figures_say_problems_seeds_and_machine(full_results):
    data = collect(full_results)
    tables = build(data)
    drawn = {stem: plan.draw() for stem, plan in plans(data, tables).items()}
    for stem in ("training", "results", "cost", "learning_rates"):
        assert said(drawn[stem]).endswith("not comparable to the paper's 7B numbers. Machine: Intel Xeon, 2 threads.")
        assert {axes.get_facecolor() for axes in drawn[stem].axes} == {to_rgba(HERE_TINT)}, stem
    assert "Bars: 95% intervals of the loss over problems; of exact match none was saved." in said(
        drawn["learning_rates"]
    )
    assert said(drawn["learning_rates"]).startswith(f"{data.learning_rates['n'].iloc[0]} validation problems, 1 seed")
    assert said(results(tables.results.assign(seeds=3), "")) == "Bars: 95% intervals over problems and seeds."
    one = results(tables.results.assign(seeds=1), "")
    assert said(one) == "Bars: 95% intervals over problems alone, so that they say nothing of other seeds."
    assert one.axes[0].get_title(loc="left").endswith("problems, 1 seed")


def test_eight_patterns_have_a_look_each():
    names = [f"pattern {place}" for place in range(7)]
    found = looks([("DiaBlo", "diablo"), *zip(names, names, strict=True)]).values()
    assert len({look.marker for look in found}) == len({look.color for look in found}) == 8


def test_looks_differ_in_marker_and_line_too():
    pairs = [("F", "full"), ("D64", "diablo"), ("D128", "diablo"), ("L", "lora"), ("X", "other")]
    found = looks(pairs).values()
    assert len({look.marker for look in found}) == len({look.line for look in found}) == len(pairs)
