import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima, oracles
from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.instances import LARGEST_CONDITION, clear_problem
from diablo_theory.theory.problems import linear_problem
from diablo_theory.theory.reduction import reduce_problem


@st.composite
def linear_problems(draw):
    m1, m2, b = draw(st.integers(1, 10)), draw(st.integers(1, 10)), draw(st.integers(1, 12))
    n = draw(st.integers(1, max(m1, m2)))
    rank = draw(st.integers(0, min(b, m1)))
    return linear_problem(BlockLayout(m1, m2, n), b, rank, seeded(draw(st.integers(0, 10**6))))


@given(linear_problems())
def test_projections_equal_numpys_pseudo_inverse(problem):
    X, R, layout = problem.X.numpy(), problem.R.numpy(), problem.layout
    np.testing.assert_allclose(
        oracles.projection(problem.X, problem.R), X @ np.linalg.pinv(X, rcond=1e-11) @ R, atol=1e-9
    )
    trained = layout.scatter(*layout.gather(torch.ones(layout.in_features, layout.out_features))).numpy() > 0
    columns = []
    for c in range(layout.out_features):
        reached = X[:, trained[:, c]]
        fit = reached @ np.linalg.pinv(reached, rcond=1e-11) @ R[:, c] if reached.any() else np.zeros(len(X))
        columns.append(fit)
    np.testing.assert_allclose(oracles.blockwise_projection(problem), np.stack(columns, 1), atol=1e-8)


@given(linear_problems())
def test_an_excess_is_the_loss_above_full_fine_tuning_over_what_that_captures(problem):
    optimum, full = (f(reduce_problem(problem)) for f in (lambda r: optima.lora_optimum(r, 1), optima.full_optimum))
    captured = 0.5 * float(problem.R.square().sum()) - float(full.minimum)
    if captured > 1e-6:
        lost = oracles.relative_excess(problem, oracles.dense_fit(problem, optimum.update))
        assert lost == pytest.approx(float(optimum.gap) / captured, abs=1e-9)
        assert oracles.relative_tails(problem)[1] == pytest.approx(lost, abs=1e-9)


def test_an_excess_where_nothing_is_captured():
    problem = linear_problem(BlockLayout(4, 3, 2), 5, 0, seeded(0))
    assert oracles.relative_excess(problem, torch.zeros(5, 3)) == 0
    assert oracles.relative_excess(problem, problem.R) == pytest.approx(1)
    nothing = dataclasses.replace(problem, T=torch.zeros_like(problem.T))
    assert oracles.relative_excess(nothing, torch.zeros(5, 3)) == 0
    assert oracles.relative_excess(nothing, torch.ones(5, 3)) == math.inf


def test_a_block_fit_is_the_dense_one_and_refuses_what_lies_outside():
    problem = linear_problem(BlockLayout(7, 5, 3), 9, 4, seeded(0))
    inside = problem.layout.scatter(*problem.layout.gather(torch.ones(7, 5).double()))
    torch.testing.assert_close(oracles.block_fit(problem, inside), problem.X @ inside, rtol=1e-13, atol=1e-13)
    inside[6, 0] = 1e-300
    assert oracles.block_fit(problem, inside).isinf().all()
    assert oracles.relative_excess(problem, oracles.block_fit(problem, inside)) == math.inf


def test_float32_answers_are_given_in_float64():
    problem = linear_problem(BlockLayout(7, 5, 3), 9, 4, seeded(0), arithmetic=Arithmetic(torch.float32))
    wide = oracles.widened(problem)
    assert {wide.X.dtype, wide.W0.dtype, wide.T.dtype, oracles.projection(problem.X, problem.R).dtype} == {
        torch.float64
    }
    assert torch.equal(wide.X.float(), problem.X)
    assert torch.linalg.matrix_rank(wide.X, rtol=1e-13) > 4  # rounding to float32 fills the space ..
    lost = (problem.R.double() - oracles.projection(problem.X, problem.R)).norm()
    assert float(lost / problem.R.norm()) > 0.1  # .. which the projection leaves out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("sizes", "rank"), [((24, 18, 4), 6), ((23, 17, 4), 7), ((12, 10, 12), 2), ((9, 4, 3), 0)])
def test_clear_problems_are_clear_in_every_group(dtype, sizes, rank):
    layout = BlockLayout(*sizes)
    for seed in range(5):
        problem = clear_problem(layout, 40, rank, seeded(seed), Arithmetic(dtype))
        again = clear_problem(layout, 40, rank, seeded(seed))
        torch.testing.assert_close(problem.X.double(), again.X, rtol=1e-6, atol=1e-6)
        if rank:
            largest = torch.linalg.matrix_norm(again.X, 2)
            for i in range(layout.num_blocks):
                sigma = torch.linalg.svdvals(again.X[:, layout.rows(i)])[:rank]
                assert sigma[-1] * LARGEST_CONDITION >= largest


def test_unclear_draws_do_happen():
    """Otherwise the redrawing would be for nothing."""
    layout, generator, weakest = BlockLayout(24, 18, 4), seeded(0), []
    for _ in range(20):
        X = linear_problem(layout, 40, 6, generator).X
        sigma = [torch.linalg.svdvals(X[:, layout.rows(i)])[5] for i in range(4)]
        weakest.append(float(min(sigma) / torch.linalg.matrix_norm(X, 2)))
    assert min(weakest) < 1 / LARGEST_CONDITION < max(weakest)
