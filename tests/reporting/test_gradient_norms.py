import numpy as np
import pandas as pd
import pytest

from diablo_theory.reporting.gradient_norms import gradient_norms, norms
from diablo_theory.reporting.plans import NothingToDrawError
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


def test_a_panel_a_method_with_loras_factors_apart():
    figure = gradient_norms(made_up(), "Small scale: made up.")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["DiaBlo N=64", "LoRA r=5", "DoRA r=5"]
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [["D"], ["A", "B"], ["all"]]
    words = " ".join(figure._supxlabel.get_text().split())
    assert "BoolQ. Lines: means over 2 seeds; bands: least to largest seed." in words
    assert "Small scale: made up." in words


@pytest.mark.parametrize("changes", [{"state": "diverged"}, {"eval_split": "valid"}, {"suite": "learning_rate"}])
def test_runs_that_do_not_count_are_not_drawn(changes):
    with pytest.raises(NothingToDrawError, match="no finished run of a task's own suite has gradient norms"):
        gradient_norms(made_up(**changes), "")
