from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.theory.descent import descents

SAVED = Path(__file__).resolve().parents[2] / "paper_results" / "descent" / "descent.csv"


def test_the_saved_descents_are_what_the_code_says():
    """The first steps: rounding grows along a descent, and machines round differently."""
    keys = ["premise", "rank", "method", "parameters", "iteration"]
    saved, made = pd.read_csv(SAVED), descents(iterations=30)
    both = saved.merge(made, on=keys, suffixes=("", "_made"))
    assert len(both) == len(made)
    for name in ("step", "excess", "floor"):
        assert both[name].to_numpy() == pytest.approx(both[f"{name}_made"].to_numpy(), rel=1e-6, abs=1e-9)


def test_the_premise_decides_whether_diablo_reaches_full_fine_tuning():
    saved = pd.read_csv(SAVED)
    floors = saved.groupby(["premise", "method"])["floor"].first()
    assert floors[("holds", "diablo")] == pytest.approx(0, abs=1e-12)
    assert floors[("holds", "lora-frozen-a")] == pytest.approx(0, abs=1e-12)
    assert floors[("holds", "lora")] > 0.1
    assert floors[("fails", "diablo")] > floors[("fails", "lora")] > 0.1
    last = saved.groupby(["premise", "method"]).last()
    assert (last["left"].abs() < 1e-4).all()


def test_every_budget_but_the_full_one_is_the_same():
    sizes = pd.read_csv(SAVED).groupby("method")["parameters"].first().drop("full")
    assert len(set(sizes)) == 1


def test_steps_are_at_least_one():
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        descents(iterations=0)
