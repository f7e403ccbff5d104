import numpy as np
import pandas as pd
import pytest

from diablo_theory.reporting.gradient_norms import gradient_norms, norms
from diablo_theory.reporting.plans import NothingToDrawError
from diablo_theory.reporting.style import looks
from diablo_theory.reporting.suites import Suites

STEPS = 8


def made_up(state="finished", **changes):
    """Two seeds of three methods: DiaBlo's norm is the seed's number, LoRA's A 10 and B 100 times it."""
    configs, training = [], []
    for method, label in (("lora", "LoRA r=5"), ("diablo", "DiaBlo N=64"), ("dora", "DoRA r=5")):
        for seed in (1, 2):
            run_id = f"{method}-{seed}"
            config = {"run_id": run_id, "suite": "boolq", "train_on": "boolq", "method": method, "label": label}
            configs.append(config | {"seed": seed, "state": state, "eval_split": "test"} | changes)
            course = pd.DataFrame({"run_id": run_id, "step": np.arange(1, STEPS + 1), "loss": 1.0, "grad_norm": 7.0})
            if method == "diablo":
                course["grad_norm/D"] = float(seed)
            if method == "lora":
                course["grad_norm/A"], course["grad_norm/B"] = 10.0 * seed, 100.0 * seed
                course.loc[0, "grad_norm/A"] = 0.0  # B is zero at the start
            training.append(course)
    return Suites(pd.DataFrame(), pd.DataFrame(configs), pd.DataFrame(), pd.concat(training, ignore_index=True))


def test_means_over_seeds_and_their_range_by_part():
    found = norms(made_up())
    assert list(dict.fromkeys(found["label"])) == ["DiaBlo N=64", "LoRA r=5", "DoRA r=5"]
    at = found[found["step"] == STEPS].set_index(["label", "part"])[["mean", "low", "high", "seeds"]]
    assert tuple(at.loc[("DiaBlo N=64", "D")]) == (1.5, 1, 2, 2)
    assert tuple(at.loc[("LoRA r=5", "A")]) == (15, 10, 20, 2)
    assert tuple(at.loc[("LoRA r=5", "B")]) == (150, 100, 200, 2)
    assert tuple(at.loc[("DoRA r=5", "all")]) == (7, 7, 7, 2)  # it has no parts
    assert len(at) == 4


def test_a_vanishing_norm_is_left_out_of_a_logarithm():
    found = norms(made_up())
    assert found.loc[found["part"] == "A", "step"].min() == 2
    assert found.loc[found["part"] == "B", "step"].min() == 1


def test_a_row_a_method_with_loras_factors_apart_and_a_column_a_task():
    boolq, arc = made_up(), made_up(suite="arc_easy", train_on="arc_easy")
    pairs = zip(boolq.frames().values(), arc.frames().values(), strict=True)
    configs, training = [
        pd.concat([one, two.assign(run_id="arc-" + two["run_id"])], ignore_index=True)
        for one, two in pairs
        if len(one)
    ]
    figure = gradient_norms(Suites(pd.DataFrame(), configs, pd.DataFrame(), training), "Small scale: made up.")
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["ARC-Easy", "BoolQ"]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["DiaBlo\nN=64", "LoRA\nr=5", "DoRA\nr=5"]
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes[1::2]]
    assert legends == [["D"], ["A", "B"], ["all"]]
    lines = [len(axes.lines) for axes in figure.axes]
    assert lines == [1, 1, 2, 2, 1, 1]
    look = looks([("DiaBlo", "diablo"), ("LoRA", "lora"), ("DoRA", "dora")])
    assert [axes.lines[0].get_color() for axes in figure.axes[::2]] == [one.color for one in look.values()]
    assert [axes.lines[0].get_marker() for axes in figure.axes[::2]] == [one.marker for one in look.values()]
    words = " ".join(figure._supxlabel.get_text().split())
    assert "Lines: means over 2 seeds; bands: least to largest seed." in words
    assert "Small scale: made up." in words


def test_the_legend_stands_where_a_method_has_runs():
    suites = made_up()
    suites.configs.loc[suites.configs["method"] != "lora", ["suite", "train_on"]] = "arc_easy"
    figure = gradient_norms(suites, "")
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, False, False, True, True, False]


@pytest.mark.parametrize("changes", [{"state": "diverged"}, {"eval_split": "valid"}, {"suite": "learning_rate"}])
def test_runs_that_do_not_count_are_not_drawn(changes):
    with pytest.raises(NothingToDrawError, match="no finished run of a task's own suite has gradient norms"):
        gradient_norms(made_up(**changes), "")
