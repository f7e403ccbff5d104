import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import ConfigError
from diablo_theory.theory import curvature, dynamics, optima, parametrisations, starts
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, seeded
from diablo_theory.theory.problems import linear_problem
from diablo_theory.theory.reduction import reduce_problem

GD, ADAM = dynamics.OPTIMISERS
LAYOUT = BlockLayout(7, 5, 3)
PROBLEM = linear_problem(LAYOUT, 12, 3, seeded(0))


def methods(problem=PROBLEM, rank=2):
    usual = starts.usual_start(*problem.W0.shape, rank, seeded(1))
    return [
        parametrisations.diablo(problem),
        parametrisations.lora(problem, usual),
        parametrisations.lora(problem, starts.pissa_start(problem.W0, rank)),
        parametrisations.frozen_lora(problem, usual.A),
    ]


def blocks_of(theta, layout=LAYOUT):
    inside = layout.complete * layout.block_rows * layout.block_cols
    tail = theta[inside:].reshape(layout.tail) if layout.tail else None
    return layout.scatter(theta[:inside].reshape(layout.complete, layout.block_rows, layout.block_cols), tail)


def test_gradient_descents_first_step_is_along_the_dense_gradient():
    run = dynamics.descend(parametrisations.diablo(PROBLEM), GD, 0.01, 2)
    assert not run.parameters[0].any()
    masked = LAYOUT.scatter(*LAYOUT.gather(PROBLEM.X.T @ PROBLEM.R))
    torch.testing.assert_close(blocks_of(run.parameters[1]), 0.01 * masked, rtol=1e-13, atol=1e-13)


def test_adams_first_step_is_the_sign_of_the_gradient():
    method = parametrisations.diablo(PROBLEM)
    run = dynamics.descend(method, ADAM, 0.01, 2)
    gradient = run.gradients[0]
    torch.testing.assert_close(run.parameters[1], -0.01 * gradient / (gradient.abs() + 1e-8), rtol=1e-12, atol=1e-12)


def test_a_run_is_a_plain_loop():
    """Adam as its authors wrote it, with a step that shrinks geometrically to its last fraction."""
    method = methods()[1]
    theta, m, v = method.start.clone(), torch.zeros(method.size).double(), torch.zeros(method.size).double()
    run = dynamics.descend(method, ADAM, 0.1, 5, decay=0.01)
    for k in range(5):
        gradient = curvature.derivatives(method, theta)[0]
        torch.testing.assert_close(run.gradients[k], gradient, rtol=1e-9, atol=1e-11)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        corrected = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        theta = theta - 0.1 * 0.01 ** (k / 4) * corrected
        torch.testing.assert_close(run.parameters[k + 1], theta, rtol=1e-9, atol=1e-11)
        assert float(run.losses[k + 1]) == pytest.approx(float(method.loss(theta)), rel=1e-12)


def test_gradient_descent_on_diablo_is_each_block_alone():
    run = dynamics.descend(parametrisations.diablo(PROBLEM), GD, 0.01, 25)
    dense = blocks_of(run.last)
    for i in range(LAYOUT.count):
        X, R = PROBLEM.X[:, LAYOUT.rows(i)], PROBLEM.R[:, LAYOUT.cols(i)]
        D = torch.zeros(X.shape[1], R.shape[1]).double()
        for _ in range(25):
            D = D - 0.01 * X.T @ (X @ D - R)
        torch.testing.assert_close(dense[LAYOUT.rows(i), LAYOUT.cols(i)], D, rtol=1e-12, atol=1e-13)


def test_gradient_descent_finds_the_minimum_norm_solution_where_there_are_many():
    problem = linear_problem(BlockLayout(12, 6, 3), 12, 2, seeded(6))
    step = 1 / float(torch.linalg.matrix_norm(problem.X, 2)) ** 2
    last = dynamics.descend(parametrisations.diablo(problem), GD, step, 400).last
    expected = optima.diablo_optimum(reduce_problem(problem), problem.layout).update
    torch.testing.assert_close(blocks_of(last, problem.layout), expected, rtol=1e-8, atol=1e-8)


def test_trajectories_are_one_tidy_table():
    table = dynamics.trajectories(PROBLEM, methods(), GD, [0.001, 0.01], 6)
    assert list(table.columns) == [
        "method",
        "start",
        "parameters",
        "optimiser",
        "step",
        "iteration",
        "loss",
        "excess",
    ]
    assert len(table) == 4 * 2 * 7
    runs = table.groupby(["method", "start", "step"], sort=False)
    assert [key[:2] for key in list(runs.groups)[::2]] == [
        ("diablo", "zero"),
        ("lora", "usual"),
        ("lora", "pissa"),
        ("lora-frozen-a", "zero"),
    ]
    assert table.groupby("method", sort=False).parameters.first().to_dict() == {
        "diablo": LAYOUT.num_parameters,
        "lora": 2 * 12,
        "lora-frozen-a": 2 * 5,
    }
    assert runs.loss.first().nunique() <= 2  # the same function at the start, but for rounding
    assert runs.loss.first().to_numpy() == pytest.approx(0.5 * float(PROBLEM.R.square().sum()), rel=1e-12)
    assert (runs.loss.diff().dropna() < 0).all()
    assert (runs.iteration.max() == 6).all()


def test_an_excess_is_the_loss_above_full_fine_tuning():
    table = dynamics.trajectories(PROBLEM, methods(), ADAM, [0.05], 40, decay=0.1)
    minimum = float(optima.full_optimum(reduce_problem(PROBLEM)).minimum)
    np.testing.assert_allclose(table.excess, table.loss - minimum, rtol=1e-9, atol=1e-12)
    gap = float(optima.diablo_optimum(reduce_problem(PROBLEM), LAYOUT).gap)
    assert (table.excess[table.method == "diablo"] >= gap).all()


def test_a_table_is_the_same_from_the_same_seed():
    problems = [linear_problem(LAYOUT, 12, 3, seeded(seed)) for seed in (4, 4, 5)]
    tables = [dynamics.trajectories(p, methods(p), ADAM, [0.1], 5) for p in problems]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert not tables[0].loss.equals(tables[2].loss)


@pytest.mark.parametrize("index", range(4))
def test_the_tail_of_a_run_has_the_rate_that_curvature_predicts(index):
    """The slowest mode alone is left in the end; for LoRA the Hessian is that of the point that descent reached."""
    problem = linear_problem(BlockLayout(9, 6, 3), 20, 2, seeded(3), condition=3.0, target="low-rank", noise=0.2)
    method = methods(dynamics.in_coordinates(problem), rank=1)[index]
    run = dynamics.descend(method, GD, 0.004, 3000)
    eigenvalues = torch.linalg.eigvalsh(curvature.derivatives(method, run.last)[1])
    nonzero = eigenvalues[eigenvalues.abs() > 1e-6 * eigenvalues[-1]]
    predicted = curvature.contraction(nonzero, 0.004)
    assert 0.5 < predicted < 0.9999
    measured = dynamics.measured_rate(run.gradient_norms)
    assert math.log(measured) == pytest.approx(math.log(predicted), rel=0.05)


def test_a_measured_rate_looks_at_the_tail_above_rounding():
    k = torch.arange(200).double()
    assert dynamics.measured_rate(0.9**k) == pytest.approx(0.9, rel=1e-12)
    assert dynamics.measured_rate(100 * 0.3**k + 0.9**k) == pytest.approx(0.9, rel=1e-6)
    assert dynamics.measured_rate(torch.maximum(0.5**k, torch.tensor(1e-16))) == pytest.approx(0.5, rel=1e-12)
    assert dynamics.measured_rate(1.1**k) == pytest.approx(1.1, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coordinates_have_the_same_landscape_without_the_noise(dtype):
    problem = linear_problem(LAYOUT, 12, 3, seeded(0), scale=100.0, arithmetic=Arithmetic(dtype))
    short = dynamics.in_coordinates(problem)
    assert short.X.shape == (3, 7)
    assert short.X.dtype == short.W0.dtype == torch.float64
    outside = float(optima.full_optimum(reduce_problem(problem)).minimum)
    for first, second in zip(methods(problem), methods(short), strict=True):
        theta = gaussian(1, first.size, seeded(2))[0]
        eps = torch.finfo(dtype).eps
        assert float(second.loss(theta)) + outside == pytest.approx(float(first.loss(theta)), rel=100 * eps)


def test_bad_input_is_named():
    method = parametrisations.diablo(PROBLEM)
    with pytest.raises(ConfigError, match=r"unknown optimiser 'adm'\. Did you mean 'adam'\?"):
        dynamics.descend(method, "adm", 0.1, 5)
    for step in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"step must be positive, got {step}"):
            dynamics.descend(method, GD, step, 5)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        dynamics.descend(method, GD, 0.1, 0)
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"decay must be above 0 and at most 1, got {decay}"):
            dynamics.descend(method, GD, 0.1, 5, decay=decay)
    with pytest.raises(ValueError, match="the rank of X must be at least 1, got 0"):
        dynamics.in_coordinates(
            dataclasses.replace(PROBLEM, X=torch.zeros_like(PROBLEM.X), T=torch.zeros_like(PROBLEM.T))
        )


def test_a_start_of_its_own_is_used():
    method, start = parametrisations.diablo(PROBLEM), torch.ones(LAYOUT.num_parameters).double()
    run = dynamics.descend(method, GD, 0.001, 3, start=start)
    assert torch.equal(run.parameters[0], start)
    assert run.losses.shape == run.gradient_norms.shape == (4,)
