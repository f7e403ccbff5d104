import dataclasses

import dense_oracles as oracles
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Case, cases, singles

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory import optima
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.column_space import column_space
from diablo_theory.theory.problems import LinearProblem, linear_problem, low_rank_inputs
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance

LOSS = tolerance("loss").value
GAP = tolerance("gap").value
EPS = torch.finfo(torch.float64).eps
RANKS = st.integers(0, 4)


def full(problem, rtol=None):
    return optima.full_optimum(reduce_problem(problem, rtol))


def diablo(problem):
    return optima.diablo_optimum(reduce_problem(problem), problem.layout)


def lora(problem, rank):
    return optima.lora_optimum(reduce_problem(problem), rank)


def frozen(problem, A):
    return optima.frozen_lora_optimum(reduce_problem(problem), A)


def tangent(problem, A, B):
    return optima.lora_tangent_optimum(reduce_problem(problem), A, B)


def factors(case, rank):
    """LoRA's A and B, of order one and of full rank."""
    return case.draw(case.m1, rank), case.draw(rank, case.m2, number=1)


def assert_close(found, expected, bound):
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def assert_attained(problem, optimum, minimum):
    """The minimum is the oracle's, and the minimiser reaches it."""
    scale = 0.5 * float(problem.R.double().square().sum())
    bound = tolerance("loss", problem.X.dtype).value * scale
    for value in (float(optimum.minimum), oracles.loss(problem, optimum.update.numpy())):
        assert abs(value - minimum) <= bound, f"{value!r} against {minimum!r}, scale {scale!r}"


@given(cases(single=None))
def test_full_equals_least_squares(case):
    problem = case.problem()
    optimum = full(problem)
    assert_attained(problem, optimum, oracles.full(problem))
    assert (optimum.gap, optimum.relative_gap) == (0.0, 0.0)
    assert optimum.num_parameters == problem.W0.numel()


@given(cases(single=None))
def test_diablo_equals_masked_least_squares(case):
    problem = case.problem()
    optimum = diablo(problem)
    assert_attained(problem, optimum, oracles.masked(problem))
    trained = oracles.trained_entries(problem.layout)
    assert not optimum.update.numpy()[~trained].any()
    assert optimum.num_parameters == trained.sum()


@given(cases(), RANKS)
def test_lora_equals_eckart_young_through_qr(case, rank):
    problem = case.problem()
    optimum = lora(problem, rank)
    assert_attained(problem, optimum, oracles.eckart_young(problem, rank))
    sigma = np.linalg.svd(optimum.update.numpy(), compute_uv=False)
    assert np.all(sigma[rank:] <= 1e-9 * sigma[0])
    assert optimum.num_parameters == rank * sum(problem.W0.shape)


@pytest.mark.parametrize(("rank", "seed"), [(1, 0), (2, 1), (3, 2)])
def test_lora_equals_brute_force(rank, seed):
    problem = linear_problem(BlockLayout(7, 6, 2), 12, 5, seeded(seed))
    brute = oracles.alternating(problem, rank)
    minimum = lora(problem, rank).minimum
    assert minimum <= brute * (1 + 1e-10)
    assert minimum == pytest.approx(brute, rel=1e-6)


@given(cases(), RANKS)
def test_frozen_lora_equals_least_squares_in_b(case, rank):
    problem, (A, _) = case.problem(), factors(case, rank)
    optimum = frozen(problem, A)
    assert_attained(problem, optimum, oracles.frozen(problem, A.numpy()))
    Q = scipy.linalg.orth(A.numpy()) if rank else np.zeros((case.m1, 0))
    dW = optimum.update.numpy()
    assert np.linalg.norm(dW - Q @ (Q.T @ dW)) <= 1e-12 * np.linalg.norm(dW)  # dW = A B for some B
    assert optimum.num_parameters == rank * case.m2


@given(cases(largest=6), st.integers(0, 2))
def test_the_tangent_equals_least_squares_in_both_directions(case, rank):
    problem, (A, B) = case.problem(), factors(case, rank)
    optimum = tangent(problem, A, B)
    assert_attained(problem, optimum, oracles.tangent(problem, A.numpy(), B.numpy()))
    beside_a = scipy.linalg.null_space(A.numpy().T) if rank else np.eye(case.m1)
    beside_b = scipy.linalg.null_space(B.numpy()) if rank else np.eye(case.m2)
    dW = optimum.update.numpy()
    assert np.linalg.norm(beside_a.T @ dW @ beside_b) <= 1e-12 * np.linalg.norm(dW)  # dW = A dB + dA B
    assert optimum.num_parameters == rank * (case.m1 + case.m2)


@given(cases(), RANKS)
def test_a_tangent_without_b_is_a_frozen_a(case, rank):
    problem, (A, B) = case.problem(), factors(case, rank)
    at_start, alone = tangent(problem, A, torch.zeros_like(B)), frozen(problem, A)
    assert torch.equal(at_start.gap, alone.gap)
    assert torch.equal(at_start.update, alone.update)


@given(cases(), st.integers(1, 4))
def test_a_generic_frozen_a_is_exact_from_the_rank_of_x_on(case, rank):
    """L6."""
    problem, (A, _) = case.problem(), factors(case, rank)
    assume(case.rank <= rank)
    assert frozen(problem, A).relative_gap <= GAP


def closed_forms(case):
    """Every closed form, as a function of a reduced problem alone."""
    A, B = factors(case, 2)
    return {
        "full": optima.full_optimum,
        "diablo": lambda q: optima.diablo_optimum(q, case.layout),
        "lora": lambda q: optima.lora_optimum(q, 2),
        "lora-frozen-a": lambda q: optima.frozen_lora_optimum(q, A),
        "lora-tangent": lambda q: optima.lora_tangent_optimum(q, A, B),
    }


@given(cases(batched=True, powers=(0,)))
def test_a_batch_equals_a_loop(case):
    """To a few eps; fits, which go through a pseudo-inverse, to cond(X) eps."""
    problem = case.problem()
    reduced = reduce_problem(problem)
    batched = {name: solve(reduced) for name, solve in closed_forms(case).items()}
    by_rank = optima.lora_relative_gaps(reduced)
    for index, single in singles(problem):
        alone_reduced, square = reduce_problem(single), float(single.R.square().sum())
        for name, solve in closed_forms(case).items():
            alone, among = solve(alone_reduced), batched[name]
            assert (among.method, among.num_parameters) == (name, alone.num_parameters)
            for field, scale in (("minimum", square), ("gap", square), ("relative_gap", 1.0)):
                assert_close(getattr(among, field)[index], getattr(alone, field), 64 * EPS * scale)
            assert_close(single.X @ among.update[index], single.X @ alone.update, LOSS * square**0.5)
        assert_close(by_rank[index], optima.lora_relative_gaps(alone_reduced), 64 * EPS)


@pytest.mark.parametrize("rtol", [1e-12, 1e-6, 1e-2, 0.1])
@pytest.mark.parametrize("condition", [1.0, 1e5])
def test_a_frozen_factor_that_can_be_inverted_reaches_all_that_x_does(rtol, condition):
    """L6 at N = 1: only col A matters, so neither its own conditioning nor the cutoff of X may cost a direction."""
    X, A = low_rank_inputs(40, 12, 12, seeded(0), 1e3), low_rank_inputs(12, 12, 12, seeded(1), condition)
    problem = LinearProblem(X, torch.zeros(12, 5).double(), gaussian(40, 5, seeded(2)), BlockLayout(12, 5, 1))
    assert float(optima.frozen_lora_optimum(reduce_problem(problem, rtol), A).relative_gap) < 1e-16


def test_factors_come_in_batches_too():
    case = Case(9, 7, 5, 3, rank=4)
    reduced = reduce_problem(case.problem())
    A, B = torch.stack([case.draw(7, 2, j) for j in range(3)]), torch.stack([case.draw(2, 5, j) for j in range(3)])
    for solve, several in ((optima.frozen_lora_optimum, (A,)), (optima.lora_tangent_optimum, (A, B))):
        among = solve(reduced, *several)
        assert (among.gap.shape, among.update.shape) == ((3,), (3, 7, 5))
        for j in range(3):
            alone = solve(reduced, *(factor[j] for factor in several))
            assert_close(among.gap[j], alone.gap, 64 * EPS * float(alone.minimum))
            assert_close(among.update[j], alone.update, LOSS * float(alone.update.norm()))


@given(cases(single=None))
def test_a_minimiser_is_only_computed_when_asked_for(case):
    reduced, (A, B) = reduce_problem(case.problem()), factors(case, 2)
    for solve, arguments in (
        (optima.full_optimum, ()),
        (optima.diablo_optimum, (case.layout,)),
        (optima.lora_optimum, (2,)),
        (optima.frozen_lora_optimum, (A,)),
        (optima.lora_tangent_optimum, (A, B)),
    ):
        one, other = (solve(reduced, *arguments, minimiser=asked) for asked in (True, False))
        assert_close(one.gap, other.gap, 64 * EPS * float(one.minimum))
        with pytest.raises(ValueError, match=f"this {one.method} optimum was computed with minimiser=False"):
            _ = other.update


@given(cases())
def test_lora_relative_gaps_are_those_of_every_rank(case):
    reduced = reduce_problem(case.problem())
    gaps = optima.lora_relative_gaps(reduced)
    assert len(gaps) == min(case.rows, case.m1, case.m2) + 1
    assert float(gaps[0]) == pytest.approx(float(reduced.captured > 0), abs=64 * EPS)
    assert gaps[-1] == 0
    for rank, gap in enumerate(gaps):
        assert_close(gap, optima.lora_optimum(reduced, rank).relative_gap, 64 * EPS)


@pytest.mark.parametrize(
    ("b", "m1", "m2", "n", "rank", "zero"),
    [
        (40, 24, 18, 4, 6, True),
        (40, 24, 18, 4, 5, True),
        (40, 24, 18, 4, 7, False),
        (4, 24, 18, 4, 4, True),
        (1, 24, 18, 24, 1, True),
        (30, 11, 8, 1, 11, True),
        (30, 12, 10, 12, 1, True),
        (30, 12, 10, 12, 2, False),
        (30, 3, 10, 10, 1, False),
        (30, 20, 3, 5, 4, True),
        (30, 20, 3, 5, 5, False),
        (30, 12, 9, 3, 0, True),
        (40, 23, 17, 4, 6, False),
    ],
)
def test_boundary_cases(b, m1, m2, n, rank, zero):
    """Rank exactly d1, one less and more; b < d1; one row; N = 1, N = m1, N > m1; m2 < N; rank 0; a thin tail."""
    relative = diablo(linear_problem(BlockLayout(m1, m2, n), b, rank, seeded(9))).relative_gap
    assert relative <= GAP if zero else relative > 1e-3


@pytest.mark.parametrize("solve", closed_forms(Case(0, 6, 4, 3)).values(), ids=closed_forms(Case(0, 6, 4, 3)))
def test_without_tokens_there_is_nothing_to_fit(solve):
    optimum = solve(reduce_problem(linear_problem(BlockLayout(6, 4, 3), 0, 0, seeded(0))))
    assert (optimum.minimum, optimum.gap, optimum.relative_gap) == (0.0, 0.0, 0.0)
    assert torch.equal(optimum.update, torch.zeros(6, 4).double())


def test_duplicated_columns_cost_rank():
    problem = linear_problem(BlockLayout(12, 9, 3), 20, 4, seeded(2))
    X = problem.X.clone()
    X[:, 1] = X[:, 0]
    doubled = dataclasses.replace(problem, X=X)
    assert diablo(problem).relative_gap <= GAP
    assert diablo(doubled).relative_gap > 1e-3
    assert_attained(doubled, diablo(doubled), oracles.masked(doubled))


def test_constant_columns_have_rank_one():
    layout, T = BlockLayout(6, 4, 3), gaussian(10, 4, seeded(0))
    problem = LinearProblem(torch.full((10, 6), 0.1).double(), torch.zeros(6, 4).double(), T, layout)
    assert diablo(problem).relative_gap <= GAP
    means = T - T.mean(0)
    assert float(full(problem).minimum) == pytest.approx(float(0.5 * means.square().sum()), rel=1e-13)


@pytest.mark.parametrize(("weak", "gap_zero"), [(1e-6, True), (1e-11, True), (1e-13, False), (0.0, False)])
def test_near_deficient_groups_are_decided_by_the_cutoff(weak, gap_zero):
    generator = seeded(4)
    Z, _ = torch.linalg.qr(gaussian(20, 2, generator))
    X = torch.cat([Z @ torch.diag(torch.tensor([1.0, weak], dtype=torch.float64)), Z], dim=1)
    problem = LinearProblem(X, torch.zeros(4, 4).double(), gaussian(20, 4, generator), BlockLayout(4, 4, 2))
    relative = diablo(problem).relative_gap
    assert (relative < 1e-12) if gap_zero else (relative > 1e-3)


def test_nothing_is_missed_where_there_is_nothing_to_capture():
    """A residual orthogonal to col X: what is captured of it is rounding, and no share of that means anything."""
    case = Case(20, 6, 9, 3, rank=6)
    Q, _ = torch.linalg.qr(case.problem().X)
    R = case.draw(20, 9) - Q @ (Q.T @ case.draw(20, 9))
    problem = dataclasses.replace(case.problem(), T=R, W0=torch.zeros(6, 9).double())
    assert reduce_problem(problem).captured > 0
    assert [solve(reduce_problem(problem)).relative_gap for solve in closed_forms(case).values()] == [0.0] * 5
    assert not optima.lora_relative_gaps(reduce_problem(problem)).any()
    little = dataclasses.replace(problem, T=R + 1e-9 * Q[:, :1])
    assert diablo(little).relative_gap > 1e-3


def test_a_given_rtol_moves_the_rank_decision():
    problem = linear_problem(BlockLayout(8, 6, 2), 20, 8, seeded(0))
    assert reduce_problem(problem, rtol=0.5).space.rank < 8
    assert full(problem, rtol=0.5).minimum > full(problem).minimum * 1.01


@pytest.mark.parametrize(
    ("sizes", "rank", "frozen_rank"),
    [
        ((64, 64, 1), 32, 64),
        ((64, 64, 32), 1, 2),
        ((64, 64, 64), 0, 1),
        ((23, 17, 4), 2, 5),
        ((24, 16, 4), 2, 6),
        ((2, 9, 9), 0, 0),
    ],
)
def test_budget_ranks_are_the_largest_that_fit(sizes, rank, frozen_rank):
    layout = BlockLayout(*sizes)
    assert (optima.lora_rank_at_budget(layout), optima.frozen_rank_at_budget(layout)) == (rank, frozen_rank)
    for found, per_rank in ((rank, sizes[0] + sizes[1]), (frozen_rank, sizes[1])):
        assert found * per_rank <= layout.num_parameters < (found + 1) * per_rank


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


def one_problem():
    return reduce_problem(Case(9, 6, 4, 2, rank=5).problem())


def two_problems():
    return reduce_problem(Case(9, 6, 4, 2, rank=5, batch_x=(2,), batch_t=(2,)).problem())


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        (torch.zeros(5, 2).double(), torch.zeros(2, 4).double(), "A must have 6 rows, got 5"),
        (torch.zeros(6, 2).double(), torch.zeros(3, 4).double(), r"B must have shape \(2, 4\), got \(3, 4\)"),
        (torch.zeros(6, 2).double(), torch.zeros(2, 5).double(), r"B must have shape \(2, 4\), got \(2, 5\)"),
        (
            torch.zeros(6, 2).long(),
            torch.zeros(2, 4).double(),
            "A must be a float32 or float64 matrix, got torch.int64",
        ),
        (
            torch.zeros(6, 2).double(),
            torch.zeros(2, 4).half(),
            "B must be a float32 or float64 matrix, got torch.float16",
        ),
        (torch.zeros(6, 2, device="meta"), torch.zeros(2, 4), "A must be on the device of the inputs, cpu, got meta"),
        (torch.zeros(6, 2), torch.zeros(2, 4, device="meta"), "B must be on the device of the inputs, cpu, got meta"),
        (
            torch.zeros(3, 6, 2).double(),
            torch.zeros(2, 4).double(),
            r"the batch dimensions of problem \(2,\), A \(3,\) and B \(\) must broadcast",
        ),
    ],
)
def test_factors_that_do_not_fit_are_named(A, B, message):
    with pytest.raises(ValueError, match=message):
        optima.lora_tangent_optimum(two_problems(), A, B)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.zeros(5, 2).double(), "A must have 6 rows, got 5"),
        (torch.zeros(6).double(), "A must be a float32 or float64 matrix, got torch.float64 with 1 dimensions"),
        (torch.zeros(3, 6, 2), r"the batch dimensions of problem \(2,\) and A \(3,\) must broadcast"),
    ],
)
def test_a_frozen_factor_that_does_not_fit_is_named(A, message):
    with pytest.raises(ValueError, match=message):
        optima.frozen_lora_optimum(two_problems(), A)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_non_finite_factors_are_named(bad):
    A, B = torch.ones(6, 2).double(), torch.ones(2, 4).double()
    with pytest.raises(NonFiniteError, match="A holds a NaN or an infinity"):
        optima.frozen_lora_optimum(one_problem(), A * bad)
    with pytest.raises(NonFiniteError, match="B holds a NaN or an infinity"):
        optima.lora_tangent_optimum(one_problem(), A, B * bad)


def test_layouts_of_another_size_are_named():
    with pytest.raises(ValueError, match="layout must be of a 6 x 4 matrix, got 3 x 4"):
        optima.diablo_optimum(one_problem(), BlockLayout(3, 4, 2))
    X = Case(9, 6, 4, rank=5).problem().X
    with pytest.raises(ValueError, match="layout must be of a 6 x 4 matrix, got 3 x 4"):
        optima.worst_case_target(X, torch.zeros(6, 4).double(), BlockLayout(3, 4, 2), column_space(X))


def test_a_space_of_another_input_is_named():
    X, W0 = Case(9, 6, 4, rank=5).problem().X, torch.zeros(6, 4).double()
    without_basis = dataclasses.replace(column_space(X), basis=None)
    for space in (column_space(X[:, :5]), column_space(X[:5]), without_basis):
        with pytest.raises(ValueError, match=r"space must be column_space\(X\), with its basis, of this one X"):
            optima.worst_case_target(X, W0, BlockLayout(6, 4, 2), space)


def test_lora_ranks_that_are_none_are_named():
    with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
        optima.lora_optimum(one_problem(), -1)
    assert optima.lora_optimum(one_problem(), 100).gap == 0


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(("rank", "kind"), [(1.5, "float"), (True, "bool"), ("1", "str")])
def test_lora_ranks_are_integers(rank, kind):
    with pytest.raises(TypeError, match=f"rank must be an integer, got {rank!r} of type {kind}"):
        optima.lora_optimum(one_problem(), rank)
    assert optima.lora_optimum(one_problem(), np.int64(2)).num_parameters == 20
