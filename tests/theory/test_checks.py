import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import ConfigError
from diablo_theory.theory import checks, convexity_checks, descent, optima, stationarity
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.checks import CHECKS, COLUMNS, run_checks
from diablo_theory.theory.problems import linear_problem


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
    with pytest.raises(ConfigError, match=r"unknown check 'l2'\.( Did you mean| Known:)"):
        run_checks(["l2"])
    with pytest.raises(ConfigError, match=r"unknown check 'L44'\. Did you mean 'L4'\?"):
        run_checks(["L44"])


def test_trials_below_one_are_named():
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        run_checks(trials=0)


def failing(name, role=None):
    table = run_checks([name], trials=4)
    failed = table[~table.passed]
    return failed if role is None else failed[failed.role == role]


def without_a_block(original):
    """DiaBlo's minimiser with its first block dropped."""

    def broken(problem, layout):
        optimum = original(problem, layout)
        dW = optimum.update.clone()
        dW[layout.rows(0), layout.cols(0)] = 0
        return dataclasses.replace(optimum, minimiser=dW)

    return broken


def blind_to_ranks(original):
    """A closed form that projects on col X in place of col X_i, so that DiaBlo always looks perfect."""

    def broken(problem, layout):
        full = optima.full_optimum(problem)
        return dataclasses.replace(full, num_parameters=layout.num_parameters)

    return broken


@pytest.mark.parametrize("mutate", [without_a_block, blind_to_ranks])
@pytest.mark.parametrize("name", ["L1", "L2", "L4"])
def test_a_wrong_diablo_optimum_is_noticed(monkeypatch, name, mutate):
    monkeypatch.setattr(optima, "diablo_optimum", mutate(optima.diablo_optimum))
    assert not failing(name, "claim").empty


@pytest.mark.parametrize("name", ["L2", "L4"])
def test_a_wrong_gap_with_a_right_minimiser_is_noticed(monkeypatch, name):
    original = optima.diablo_optimum
    monkeypatch.setattr(
        optima,
        "diablo_optimum",
        lambda p, lo: dataclasses.replace(original(p, lo), relative_gap=torch.tensor(0.5).double()),
    )
    assert not failing(name, "claim").empty


@pytest.mark.parametrize("name", ["L1", "L2", "L4"])
def test_a_projector_one_rank_short_is_noticed(monkeypatch, name):
    original = optima.truncated_svd

    def short(group, cutoff):
        svd = original(group, cutoff)
        return dataclasses.replace(svd, U=svd.U[:, :-1], sigma=svd.sigma[:-1], Vh=svd.Vh[:-1])

    monkeypatch.setattr(optima, "truncated_svd", short)
    assert not failing(name, "claim").empty


@pytest.mark.parametrize("name", ["L2", "L4"])
def test_a_premise_that_always_holds_is_noticed(monkeypatch, name):
    original = stationarity.rank_premise
    monkeypatch.setattr(
        stationarity,
        "rank_premise",
        lambda X, layout, space=None: dataclasses.replace(original(X, layout, space), holds=True),
    )
    assert not failing(name, "control").empty


@pytest.mark.parametrize("off", [-1, 1])
def test_an_off_by_one_rank_in_lora_is_noticed(monkeypatch, off):
    original = optima.lora_optimum
    monkeypatch.setattr(optima, "lora_optimum", lambda p, rho: original(p, max(rho + off, 0)))
    assert not failing("L4").empty


def test_a_wrong_parameter_count_is_noticed(monkeypatch):
    original = optima.lora_rank_at_budget
    monkeypatch.setattr(optima, "lora_rank_at_budget", lambda layout: original(layout) + 1)
    assert not failing("L4", "claim").empty


def test_a_product_that_swaps_two_blocks_is_noticed(monkeypatch):
    original = ops.block_product
    monkeypatch.setattr(ops, "block_product", lambda x, blocks, tail, lo: original(x, blocks.flip(0), tail, lo))
    for name in ("L1", "L2"):
        assert not failing(name, "claim").empty, name


def test_derivatives_equal_the_closed_forms():
    """DiaBlo's Hessian is X_i^T X_i for each output; LoRA's gradient vanishes at A = B = 0."""
    problem = linear_problem(BlockLayout(6, 4, 2), 9, 5, seeded(0))
    gradient, hessian = convexity_checks.derivatives_at_zero(convexity_checks.diablo_adapter(problem), problem)
    X, R = problem.X, problem.R
    squares = [torch.kron(X[:, s].T @ X[:, s], torch.eye(2).double()) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(hessian, torch.block_diag(*squares), rtol=1e-12, atol=1e-12)
    expected = -torch.cat([(X[:, :3].T @ R[:, :2]).flatten(), (X[:, 3:].T @ R[:, 2:]).flatten()])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    gradient, hessian = convexity_checks.derivatives_at_zero(convexity_checks.lora_adapter(problem, 1), problem)
    assert not gradient.any()
    largest = float(torch.linalg.matrix_norm(X.T @ R, 2))
    assert float(torch.linalg.eigvalsh(hessian)[0]) == pytest.approx(-largest, rel=1e-12)


def test_a_convex_lora_is_noticed(monkeypatch):
    """Freeze A: LoRA's controls must then fail, since both the midpoint and the saddle are gone."""

    def frozen(problem, rank):
        m1, m2 = problem.W0.shape
        A = torch.ones(m1, rank, dtype=torch.float64)
        return convexity_checks.Adapter(
            lambda theta: problem.X @ A @ theta[m1 * rank :].reshape(rank, m2), rank * (m1 + m2), None
        )

    monkeypatch.setattr(convexity_checks, "lora_adapter", frozen)
    assert len(failing("L1", "control")) == 8


def test_a_descent_with_another_step_is_noticed(monkeypatch):
    original = descent.gradient_descent
    monkeypatch.setattr(descent, "gradient_descent", lambda p, step, n: original(p, 0.5 * step, n))
    assert not failing("L1").empty


def test_the_same_seed_gives_the_same_table_to_the_bit():
    pd.testing.assert_frame_equal(run_checks(trials=1), run_checks(trials=1), check_exact=True)
