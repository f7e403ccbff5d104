import dataclasses

import numpy as np
import pandas as pd
import pytest

from diablo_theory.errors import ConfigError
from diablo_theory.theory import checks
from diablo_theory.theory.checks import CHECKS, COLUMNS, run_checks


def trials(name):
    """One trial of a check on networks holds all of its cases; those on linear problems may take theirs in turn."""
    return 4 if name.startswith("L") else 1


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CHECKS)
def test_every_verdict_passes(name, seed):
    table = run_checks([name], trials=trials(name), seed=seed)
    failed = table[~table.passed]
    assert failed.empty, failed.to_string()
    assert set(table.role) == {"claim", "control"}
    assert np.isfinite(table.select_dtypes("number").to_numpy()).all()


@pytest.mark.parametrize("name", CHECKS)
def test_margins_carry_the_sign_of_what_holds(name):
    table = run_checks([name], trials=trials(name))
    assert ((table.premise_margin > 0) == table.premise_holds).all()
    assert ((table.claim_margin > 0) == table.claim_holds).all()


def test_the_table_has_the_promised_columns():
    assert COLUMNS == (
        "check",
        "statement",
        "role",
        "trial",
        "instance",
        "premise_holds",
        "premise_margin",
        "claim_holds",
        "claim_margin",
        "tolerance",
        "tolerance_reason",
        "passed",
    )
    table = run_checks(["G1"], trials=1)
    assert tuple(table.columns) == COLUMNS
    assert run_checks([], trials=1).empty


def test_a_check_draws_the_same_whatever_else_runs(monkeypatch):
    drawn = []

    def record(generator, number, arithmetic):
        drawn.append((number, generator.initial_seed()))
        return []

    monkeypatch.setitem(CHECKS, "L4", dataclasses.replace(CHECKS["L4"], run=record))
    run_checks(["G1", "L4"], trials=2, seed=5)
    run_checks(["L4"], trials=2, seed=5)
    run_checks(["L4"], trials=2, seed=6)
    assert drawn[:2] == drawn[2:4]
    assert len(set(drawn)) == 4


def test_a_new_check_leaves_the_instances_of_the_others(monkeypatch):
    before = run_checks(["G1"], trials=1)
    monkeypatch.setattr(checks, "CHECKS", {"A1": dataclasses.replace(CHECKS["L4"], name="A1"), **CHECKS})
    pd.testing.assert_frame_equal(run_checks(["G1"], trials=1), before, check_exact=True)


def test_progress_is_told_before_every_trial():
    told = []
    run_checks(["G1", "L4"], trials=2, progress=told.append)
    assert told == ["G1: trial 1 of 2", "G1: trial 2 of 2", "L4: trial 1 of 2", "L4: trial 2 of 2"]


def test_an_unknown_check_names_the_nearest():
    assert run_checks(["l2", "L2"], trials=1).equals(run_checks(["L2"], trials=1))
    with pytest.raises(ConfigError, match=r"unknown check 'L44'\. Did you mean 'L4'\?"):
        run_checks(["L44"])


def test_trials_below_one_are_named():
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        run_checks(trials=0)


def test_the_same_seed_gives_the_same_table_to_the_bit():
    pd.testing.assert_frame_equal(run_checks(trials=1), run_checks(trials=1), check_exact=True)
