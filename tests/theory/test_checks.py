import dataclasses

import pandas as pd
import pytest

from diablo_theory import ops
from diablo_theory.errors import ConfigError
from diablo_theory.theory import descent, stationarity
from diablo_theory.theory.checks import CHECKS, COLUMNS, run_checks


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["G1", "S1"])
def test_every_verdict_passes(assert_passes, name, seed):
    assert_passes(name, seed)


def test_checks_stand_in_order_and_state_what_they_check():
    assert list(CHECKS) == sorted(CHECKS, key=lambda name: ("GLSD".index(name[0]), name[1:]))
    assert all(check.statement.endswith(".") for check in CHECKS.values())


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


def test_progress_is_told_before_every_trial():
    told = []
    run_checks(["G1", "L4"], trials=2, progress=told.append)
    assert told == ["G1: trial 1 of 2", "G1: trial 2 of 2", "L4: trial 1 of 2", "L4: trial 2 of 2"]


def test_an_unknown_check_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown check 'l2'\.( Did you mean| Known:)"):
        run_checks(["l2"])
    with pytest.raises(ConfigError, match=r"unknown check 'L44'\. Did you mean 'L4'\?"):
        run_checks(["L44"])


def test_trials_below_one_are_named():
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        run_checks(trials=0)


def test_a_product_that_drops_the_tail_is_noticed(monkeypatch, failing):
    original = ops.block_product

    def broken(x, blocks, tail, layout):
        return original(x, blocks, None if tail is None else 0 * tail, layout)

    monkeypatch.setattr(ops, "block_product", broken)
    assert not failing("G1", "claim").empty


def test_a_product_that_swaps_two_blocks_is_noticed(monkeypatch, failing):
    original = ops.block_product
    monkeypatch.setattr(ops, "block_product", lambda x, blocks, tail, lo: original(x, blocks.flip(0), tail, lo))
    for name in ("G1", "S1"):
        assert not failing(name, "claim").empty, name


def test_an_amplification_that_is_too_small_is_noticed(monkeypatch, failing):
    original = stationarity.certificate
    monkeypatch.setattr(
        stationarity,
        "certificate",
        lambda X, g, layout: dataclasses.replace(
            original(X, g, layout), amplification=0.1 * original(X, g, layout).amplification
        ),
    )
    assert not failing("S1", "claim").empty


def test_blocks_that_are_not_trained_are_noticed(monkeypatch, failing):
    monkeypatch.setattr(descent, "minimise_blocks", lambda problem, **_: problem.zero_updates())
    assert not failing("S1", "claim").empty


def test_the_same_seed_gives_the_same_table_to_the_bit():
    pd.testing.assert_frame_equal(run_checks(trials=1), run_checks(trials=1), check_exact=True)
