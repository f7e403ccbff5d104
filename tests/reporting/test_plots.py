import shutil
import time

import pytest

from diablo_theory.reporting.plans import save_plans
from diablo_theory.reporting.plots import REPRODUCE, TUNE, plans
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


def test_looks_differ_in_marker_and_line_too():
    pairs = [("F", "full"), ("D64", "diablo"), ("D128", "diablo"), ("L", "lora"), ("X", "other")]
    found = looks(pairs).values()
    assert len({look.marker for look in found}) == len({look.line for look in found}) == len(pairs)
