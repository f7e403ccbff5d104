"""Figures of published numbers: what they show, what they say contradicts it, and how they tell it from ours."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from diablo_theory.reporting import beside_published, published_bars, published_parameters, time_memory
from diablo_theory.reporting.drawing import HERE_TINT
from diablo_theory.reporting.parameters import read_counts
from diablo_theory.reporting.published import conflicts, read_published
from diablo_theory.reporting.steps import read_steps, summarise
from diablo_theory.reporting.style import LIGHT_BLUE

SAVED = Path(__file__).resolve().parents[2] / "paper_results"


@pytest.fixture(scope="module")
def rows():
    return read_published(SAVED / "published")


@pytest.fixture(scope="module")
def commonsense(rows):
    return published_bars.averages(rows, "commonsense").reset_index(drop=True)


def section(**changes):
    table = {"label": ["DiaBlo N=64", "LoRA r=5"], "method": ["diablo", "lora"], "base": "4 bits, rtn"}
    table |= {
        "n": 300,
        "seeds": 3,
        "model": "SmolLM2-135M",
        "scale": "small",
        "task": "word_problems",
        "exact_match": [50.0, 40.0],
    }
    table |= {"exact_match_low": [40.0, 35.0], "exact_match_high": [60.0, 45.0]}
    return pd.DataFrame(table | changes)


def filled(axes):
    """Whether a panel's bars are filled; hatched ones are hollow."""
    bars = [bar for bar in axes.patches if bar.get_width() > 0]
    assert bars
    hollow = {bar.get_hatch() is not None and to_hex(bar.get_facecolor()) == "#ffffff" for bar in bars}
    assert len(hollow) == 1
    return not hollow.pop()


def said(figure):
    return " ".join(figure._supxlabel.get_text().split())


def test_averages_are_the_papers_with_the_quoted_share_and_charts_fill_gaps(commonsense):
    seven = commonsense[commonsense["model"] == "LLaMA2-7B"].set_index("method")
    assert seven.loc["diablo", "name"] == "DiaBlo N=128, 0.52%"
    assert seven.loc["pissa", "name"] == "PiSSA (from a chart)"
    assert seven.loc["smt", "value"] == 83.4  # the table's, not the chart's 81.8
    assert list(seven.index)[-1] == "diablo"


def test_contradictions_are_found_and_named(rows, commonsense):
    others = pd.Series(published_bars.contradictions(commonsense, conflicts(rows))).groupby(
        [commonsense["model"], commonsense["method"]]
    )
    found = others.first()
    assert found[("LLaMA3-8B", "full")] == [(83.6, "SketchTune")]
    assert found[("LLaMA-13B", "dora")] == [(81.5, "DoRA (early) and SketchTune")]
    assert found[("LLaMA2-7B", "smt")] == [(81.8, "the authors' chart")]
    assert found[("LLaMA3-8B", "diablo")] == []


def test_contradictions_are_drawn(rows):
    figure = published_bars.commonsense(rows, conflicts(rows))
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    right = figure.axes[1]
    published, other = (next(line for line in right.lines if line.get_marker() == shape) for shape in "oD")
    assert published.get_ydata()[0] < other.get_ydata()[0]  # the first row's values are too close to stand on one line
    assert {"87.5", "◇ 83.6, SketchTune", "80.8", "◇ 81.5, DoRA (early) and SketchTune"} <= set(words)


@pytest.mark.parametrize("name", ["commonsense", "arithmetic"])
def test_published_bars_are_hollow_and_say_whose_they_are(rows, name):
    more = [conflicts(rows)] if name == "commonsense" else []
    figure = getattr(published_bars, name)(rows, *more)
    assert not any(filled(axes) for axes in figure.axes if axes.patches)
    assert "published, full scale, not reproduced here (quoted from arXiv 2506.03230v2, by way of a note" in said(
        figure
    )


@pytest.mark.parametrize(("name", "key"), [("quantised", "bases"), ("patterns", "patterns")])
def test_what_was_run_here_is_filled_on_a_tinted_ground_with_intervals(rows, name, key):
    alone = getattr(beside_published, name)(rows, {})
    assert not any(filled(axes) for axes in alone.axes)
    assert "run here" not in said(alone)
    figure = getattr(beside_published, name)(rows, {key: section()})
    *published, own = figure.axes
    assert not any(filled(axes) for axes in published)
    assert filled(own)
    assert to_hex(own.get_facecolor()) == HERE_TINT.lower()
    assert "small scale: run here" in own.get_title(loc="left")
    assert "run here on SmolLM2-135M, small scale, 300 problems, 3 seeds" in said(figure)
    assert own.get_xlim() == (0, 100)
    low, high = own.collections[0].get_segments()[0][:, 0]
    assert (low, high) == (40, 60)


def test_rows_of_several_tasks_and_bases_say_which(rows):
    table = section(task=["word_problems", "boolq"], base=["float32", "4 bits, rtn"])
    own = beside_published.quantised(rows, {"bases": table}).axes[-1]
    names = [label.get_text() for label in own.get_yticklabels()]
    assert names == ["Word problems: DiaBlo N=64; float32", "BoolQ: LoRA r=5; 4 bits, rounding to nearest"]


def test_shares_are_the_counted_ones_and_say_where_the_quote_differs(rows):
    placed = published_parameters.places(rows, read_counts(SAVED / "counts.csv"))
    at = placed.set_index(["suite", "model", "setting"])
    quoted, true = at.loc[("commonsense", "LLaMA3-8B", "DiaBlo N=64"), ["trainable_pct", "true_pct"]]
    assert (quoted, round(true, 3)) == (1.04, 0.888)
    assert at.loc[("commonsense", "LLaMA3-8B", "DiaBlo N=64"), "differs"]
    assert not at.loc[("commonsense", "LLaMA2-7B", "DiaBlo N=128"), "differs"]
    assert pd.isna(at.loc[("commonsense", "LLaMA2-7B", "SMT(Best)"), "true_pct"])
    assert not at.loc[("commonsense", "LLaMA2-7B", "MiLoRA r=32"), "differs"]
    assert (at.loc[at["method"] == "full", "true_pct"] == 100).all()


def test_published_epochs_and_measured_steps_are_told_apart(rows):
    figure = time_memory.time_memory(rows, summarise(*read_steps(SAVED / "steps")))
    assert [filled(axes) for axes in figure.axes] == [False, False, True, True]
    titles = [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes]
    assert titles == ["Published", "Published", "Measured here", "Measured here"]
    assert "A step here and an epoch there are different things" in said(figure)
    assert "Machine: Intel(R) Xeon(R) Processor, 2 threads" in said(figure)
    assert "Light blue, einsum: DiaBlo's layer as its authors compute it." in said(figure)
    names = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert to_hex(figure.axes[2].patches[names.index("einsum N=64")].get_facecolor()) == LIGHT_BLUE.lower()
