import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, seeded
from diablo_theory.theory.column_space import column_space
from diablo_theory.theory.problems import LinearProblem, linear_problem, low_rank_inputs
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance

LOSS = tolerance("loss").value


@st.composite
def linear_problems(draw):
    m1, m2, b = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 16))
    n = draw(st.integers(1, max(m1, m2)))
    rank = draw(st.integers(0, min(b, m1)))
    return linear_problem(BlockLayout(m1, m2, n), b, rank, seeded(draw(st.integers(0, 10**6))))


def full(problem, rtol=None):
    return optima.full_optimum(reduce_problem(problem, rtol))


def diablo(problem):
    return optima.diablo_optimum(reduce_problem(problem), problem.layout)


def lora(problem, rank):
    return optima.lora_optimum(reduce_problem(problem), rank)


def loss(problem, dW):
    return 0.5 * np.linalg.norm(problem.X.numpy() @ (problem.W0.numpy() + dW) - problem.T.numpy()) ** 2


def masked_least_squares(problem):
    """DiaBlo's minimum by one dense least-squares problem a column of the output, over the rows that reach it."""
    X, R, layout, total = problem.X.numpy(), problem.R.numpy(), problem.layout, 0.0
    trained = layout.scatter(*layout.gather(torch.ones(layout.in_features, layout.out_features))).numpy() > 0
    for column in range(layout.out_features):
        reached = X[:, trained[:, column]]
        fit = 0.0
        if reached.shape[1] and reached.any():
            solution, *_ = scipy.linalg.lstsq(reached, R[:, column], cond=1e-11)
            fit = reached @ solution
        total += 0.5 * np.linalg.norm(R[:, column] - fit) ** 2
    return total


def eckart_young(problem, rank):
    """LoRA's minimum through a pivoted QR basis of col X."""
    X, R = problem.X.numpy(), problem.R.numpy()
    Q, triangle, _ = scipy.linalg.qr(X, mode="economic", pivoting=True)
    scale = abs(triangle[0, 0])
    Q = Q[:, np.abs(np.diag(triangle)) > 1e-11 * scale]
    inside = Q.T @ R
    tail = np.linalg.svd(inside, compute_uv=False)[rank:] if inside.size else np.zeros(0)
    return 0.5 * np.linalg.norm(R - Q @ inside) ** 2 + 0.5 * np.sum(tail**2)


def alternating_least_squares(problem, rank, restarts=6, sweeps=300):
    X, R, best = problem.X.numpy(), problem.R.numpy(), np.inf
    rng = np.random.default_rng(0)
    for _ in range(restarts):
        A = rng.standard_normal((X.shape[1], rank))
        for _ in range(sweeps):
            B = scipy.linalg.lstsq(X @ A, R)[0]
            A = scipy.linalg.lstsq(X, R @ np.linalg.pinv(B))[0]
        B = scipy.linalg.lstsq(X @ A, R)[0]
        best = min(best, 0.5 * np.linalg.norm(X @ A @ B - R) ** 2)
    return best


def assert_attained(problem, optimum, minimum):
    scale = 0.5 * float(problem.R.square().sum())
    for value in (optimum.minimum, loss(problem, optimum.update.numpy())):
        assert abs(value - minimum) <= LOSS * scale, f"{value!r} against {minimum!r}, scale {scale!r}"


@given(linear_problems())
def test_diablo_equals_masked_least_squares(problem):
    optimum, layout = diablo(problem), problem.layout
    assert_attained(problem, optimum, masked_least_squares(problem))
    inside = layout.scatter(*layout.gather(optimum.update))
    assert torch.equal(inside, optimum.update)
    assert optimum.num_parameters == layout.num_parameters


@given(linear_problems())
def test_full_equals_least_squares(problem):
    solution, *_ = scipy.linalg.lstsq(problem.X.numpy(), problem.R.numpy(), cond=1e-11)
    optimum = full(problem)
    assert_attained(problem, optimum, loss(problem, solution))
    np.testing.assert_allclose(optimum.update.numpy(), solution, rtol=1e-7, atol=1e-7)
    assert (optimum.gap, optimum.relative_gap) == (0.0, 0.0)
    assert optimum.num_parameters == problem.W0.numel()


@given(linear_problems(), st.integers(0, 6))
def test_lora_equals_eckart_young_through_qr(problem, rank):
    optimum = lora(problem, rank)
    assert_attained(problem, optimum, eckart_young(problem, rank))
    if rank < min(problem.W0.shape):
        sigma = np.linalg.svd(optimum.update.numpy(), compute_uv=False)
        assert np.all(sigma[rank:] <= 1e-9 * max(sigma[0], 1e-300))
    assert optimum.num_parameters == rank * sum(problem.W0.shape)


@pytest.mark.parametrize(("rank", "seed"), [(1, 0), (2, 1), (3, 2)])
def test_lora_equals_brute_force(rank, seed):
    problem = linear_problem(BlockLayout(7, 6, 2), 12, 5, seeded(seed))
    brute = alternating_least_squares(problem, rank)
    minimum = lora(problem, rank).minimum
    assert minimum <= brute * (1 + 1e-10)
    assert minimum == pytest.approx(brute, rel=1e-6)


@given(linear_problems())
def test_gaps_are_ordered_and_add_up(problem):
    best = diablo(problem)
    losses = [float(lora(problem, rho).gap) for rho in range(min(problem.W0.shape) + 1)]
    assert float(best.minimum) == pytest.approx(float(full(problem).minimum + best.gap), rel=1e-12)
    assert 0 <= best.relative_gap <= 1 + 1e-12
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] <= LOSS * losses[0]
    assert lora(problem, 0).update.abs().max() == 0


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
@pytest.mark.parametrize("sizes", [(12, 9, 3), (13, 7, 4)])
def test_relative_gaps_do_not_see_the_scale(scale, sizes):
    plain = linear_problem(BlockLayout(*sizes), 20, 6, seeded(5))
    scaled = LinearProblem(plain.X * scale, plain.W0, plain.T * scale, plain.layout)
    for solve in (diablo, lambda p: lora(p, 2)):
        assert solve(scaled).relative_gap == pytest.approx(float(solve(plain).relative_gap), rel=1e-9)
        assert solve(scaled).minimum == pytest.approx(float(solve(plain).minimum) * scale**2, rel=1e-9)
        torch.testing.assert_close(solve(scaled).update, solve(plain).update, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_only_the_inputs_scaled(scale):
    plain = linear_problem(BlockLayout(12, 9, 3), 20, 6, seeded(5))
    plain = dataclasses.replace(plain, W0=torch.zeros_like(plain.W0))
    scaled = dataclasses.replace(plain, X=plain.X * scale)
    assert diablo(scaled).minimum == pytest.approx(float(diablo(plain).minimum), rel=1e-9)
    dW = diablo(scaled).update * scale
    torch.testing.assert_close(dW, diablo(plain).update, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("b", "m1", "m2", "n", "rank", "zero"),
    [
        (40, 24, 18, 4, 6, True),
        (40, 24, 18, 4, 5, True),
        (40, 24, 18, 4, 7, False),
        (4, 24, 18, 4, 4, True),
        (30, 11, 8, 1, 11, True),
        (30, 12, 10, 12, 1, True),
        (30, 12, 10, 12, 2, False),
        (30, 20, 3, 5, 4, True),
        (30, 20, 3, 5, 5, False),
        (30, 12, 9, 3, 0, True),
        (40, 23, 17, 4, 6, False),
    ],
)
def test_boundary_cases(b, m1, m2, n, rank, zero):
    relative = diablo(linear_problem(BlockLayout(m1, m2, n), b, rank, seeded(9))).relative_gap
    assert relative <= tolerance("gap").value if zero else relative > 1e-3


def test_duplicated_columns_cost_rank():
    problem = linear_problem(BlockLayout(12, 9, 3), 20, 4, seeded(2))
    X = problem.X.clone()
    X[:, 1] = X[:, 0]
    doubled = dataclasses.replace(problem, X=X)
    assert diablo(problem).relative_gap <= tolerance("gap").value
    assert diablo(doubled).relative_gap > 1e-3
    assert_attained(doubled, diablo(doubled), masked_least_squares(doubled))


@pytest.mark.parametrize(("weak", "gap_zero"), [(1e-6, True), (1e-11, True), (1e-13, False), (0.0, False)])
def test_near_deficient_groups_are_decided_by_the_cutoff(weak, gap_zero):
    generator = seeded(4)
    Z, _ = torch.linalg.qr(gaussian(20, 2, generator))
    X = torch.cat([Z @ torch.diag(torch.tensor([1.0, weak], dtype=torch.float64)), Z], dim=1)
    problem = LinearProblem(X, torch.zeros(4, 4).double(), gaussian(20, 4, generator), BlockLayout(4, 4, 2))
    relative = diablo(problem).relative_gap
    assert (relative < 1e-12) if gap_zero else (relative > 1e-3)


def test_float32_problems_are_solved_to_float32():
    layout = BlockLayout(12, 9, 3)
    problem = linear_problem(layout, 30, 4, seeded(3), arithmetic=Arithmetic(torch.float32))
    optimum = diablo(problem)
    assert optimum.relative_gap <= tolerance("gap", torch.float32).value
    wide = LinearProblem(problem.X.double(), problem.W0.double(), problem.T.double(), layout)
    excess = loss(wide, optimum.update.numpy()) - full(problem).minimum
    captured = 0.5 * float(wide.R.square().sum()) - full(problem).minimum
    assert abs(excess) / captured <= tolerance("loss", torch.float32).value


def test_a_given_space_moves_the_rank_decision():
    problem = linear_problem(BlockLayout(8, 6, 2), 20, 8, seeded(0))
    assert reduce_problem(problem, rtol=0.5).space.rank < 8
    assert full(problem, rtol=0.5).minimum > full(problem).minimum * 1.01


@pytest.mark.parametrize(
    ("sizes", "rank"), [((64, 64, 1), 32), ((64, 64, 32), 1), ((64, 64, 64), 0), ((24, 18, 4), 2), ((2, 9, 9), 0)]
)
def test_budget_rank_is_the_largest_that_fits(sizes, rank):
    layout = BlockLayout(*sizes)
    assert optima.lora_rank_at_budget(layout) == rank
    per_rank = sizes[0] + sizes[1]
    assert rank * per_rank <= layout.num_parameters < (rank + 1) * per_rank


def test_a_negative_rank_is_named():
    with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
        lora(linear_problem(BlockLayout(4, 4, 2), 5, 2, seeded(0)), -1)


@pytest.mark.parametrize("sizes", [(12, 9, 3), (13, 7, 4), (9, 13, 4), (4, 4, 4)])
def test_the_worst_case_target_lies_in_col_x_and_is_lost_wholly(sizes):
    layout, generator = BlockLayout(*sizes), seeded(1)
    X = low_rank_inputs(20, sizes[0], min(sizes[0], layout.block_rows + 1), generator)
    W0 = gaussian(sizes[0], sizes[1], generator)
    problem = LinearProblem(X, W0, optima.worst_case_target(X, W0, layout, column_space(X)), layout)
    assert full(problem).minimum <= LOSS * float(problem.R.square().sum())
    assert diablo(problem).relative_gap == pytest.approx(1.0, abs=1e-9)


def test_the_worst_case_target_is_no_worse_than_nothing_at_rank_zero():
    X, W0 = torch.zeros(5, 4).double(), torch.ones(4, 3).double()
    assert not optima.worst_case_target(X, W0, BlockLayout(4, 3, 2), column_space(X)).any()
