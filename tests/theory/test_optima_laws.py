"""What the closed forms must do whatever the numbers: their order, their symmetries, their vanishing gradients."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from dense_oracles import numbers, trained_entries
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Case, cases

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima
from diablo_theory.theory.column_space import times_power, written_groups
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.stationarity import rank_premise
from diablo_theory.theory.tolerances import tolerance

LOSS = tolerance("loss").value
SEEDS = st.integers(0, 999)


def residual_problem(X, R, layout):
    """The problem with W0 = 0, so that X and R can be changed one at a time."""
    return LinearProblem(X, torch.zeros(layout.in_features, layout.out_features).to(X.dtype), R, layout)


def orthogonal(case, size, number=0):
    return torch.linalg.qr(case.draw(size, size, number))[0]


def solved(problem, A, B):
    """The five optima of one problem."""
    reduced = reduce_problem(problem)
    return {
        "full": optima.full_optimum(reduced),
        "diablo": optima.diablo_optimum(reduced, problem.layout),
        "lora": optima.lora_optimum(reduced, A.shape[-1]),
        "frozen": optima.frozen_lora_optimum(reduced, A),
        "tangent": optima.lora_tangent_optimum(reduced, A, B),
    }


def factors(case, rank=2):
    return case.draw(case.m1, rank, number=7), case.draw(rank, case.m2, number=8)


def rounding(problem):
    """How far a loss may be off."""
    return LOSS * 0.5 * float(problem.R.double().square().sum())


def assert_same_gaps(found, expected, bound):
    for name, one in expected.items():
        for field in ("minimum", "gap"):
            values = float(getattr(found[name], field)), float(getattr(one, field))
            assert abs(values[0] - values[1]) <= bound, (name, field, values, bound)


def thinnest(layout):
    """Inputs of the smallest group that has outputs."""
    groups = [layout.rows(i) for i in written_groups(layout)]
    return min(group.stop - group.start for group in groups)


@given(cases(single=None))
def test_gaps_are_never_negative_and_add_up(case):
    problem = case.problem()
    found = solved(problem, *factors(case))
    for optimum in found.values():
        assert optimum.gap >= 0
        assert 0 <= optimum.relative_gap <= 1 + 1e-12
        assert float(optimum.minimum) == pytest.approx(float(found["full"].minimum + optimum.gap), rel=1e-12)


@given(cases(single=None))
def test_sufficiency(case):
    """L2: equal ranks, no gap, for every target."""
    problem = dataclasses.replace(case, rank=min(case.rank, thinnest(case.layout))).problem()
    assert rank_premise(problem.X, case.layout).holds
    gap = optima.diablo_optimum(reduce_problem(problem), case.layout).relative_gap
    assert gap <= tolerance("gap", problem.X.dtype).value


@given(cases(targets=("generic",), single=None))
def test_without_the_premise_a_generic_target_has_a_gap(case):
    """L3, the control of the test above."""
    assume(case.rank > thinnest(case.layout))
    problem = case.problem()
    assert not rank_premise(problem.X, case.layout).holds
    assert optima.diablo_optimum(reduce_problem(problem), case.layout).relative_gap > 1e-6


@given(cases(even=True), st.integers(1, 3), st.integers(1, 3))
def test_refining_the_blocks_cannot_help(case, k, j):
    """N dividing a multiple of it evenly: every fine block lies inside a coarse one."""
    fine = BlockLayout(case.m1 * k, case.m2 * k, case.num_blocks * k)
    coarse = BlockLayout(fine.in_features, fine.out_features, case.num_blocks)
    assert not (trained_entries(fine) & ~trained_entries(coarse)).any()
    rank = min(case.rank + j, case.rows, fine.in_features)
    wide = dataclasses.replace(case, m1=fine.in_features, m2=fine.out_features, rank=rank)
    reduced = reduce_problem(wide.problem())
    few, many = (optima.diablo_optimum(reduced, layout).gap for layout in (coarse, fine))
    assert few <= many + LOSS * reduced.loss_of(reduced.captured)


@given(cases())
def test_a_higher_rank_cannot_hurt(case):
    reduced = reduce_problem(case.problem())
    gaps = [float(optima.lora_optimum(reduced, rank).gap) for rank in range(min(case.m1, case.m2) + 1)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] <= LOSS * gaps[0]
    assert not optima.lora_optimum(reduced, 0).update.any()


@given(cases(), st.integers(0, 3), st.integers(1, 3))
def test_more_columns_of_a_frozen_factor_cannot_hurt(case, rank, more):
    problem, (A, _) = case.problem(), factors(case, rank + more)
    few, many = (optima.frozen_lora_optimum(reduce_problem(problem), A[:, :r]).gap for r in (rank, rank + more))
    assert many <= few + rounding(problem)


@given(cases(), st.integers(0, 3))
def test_sets_within_sets(case, rank):
    """Updates A dB are of rank rho and tangents at (A, B); tangents, A dB + dA B, are of rank 2 rho."""
    problem, (A, B) = case.problem(), factors(case, rank)
    reduced = reduce_problem(problem)
    frozen = optima.frozen_lora_optimum(reduced, A).gap
    tangent = optima.lora_tangent_optimum(reduced, A, B).gap
    for smaller, larger in (
        (optima.lora_optimum(reduced, 2 * rank).gap, tangent),
        (tangent, frozen),
        (optima.lora_optimum(reduced, rank).gap, frozen),
    ):
        assert smaller <= larger + rounding(problem)


@given(cases(powers=(0,)))
def test_rotating_the_tokens_changes_nothing(case):
    problem, Q = case.problem(), orthogonal(case, case.rows)
    rotated = residual_problem(Q @ problem.X, Q @ problem.R, case.layout)
    before, after = (solved(p, *factors(case)) for p in (problem, rotated))
    assert_same_gaps(after, before, rounding(problem))
    for name, one in before.items():
        fit = problem.X @ (after[name].update - one.update)
        if name != "lora":  # its minimiser is not unique where two singular values meet
            assert fit.norm() <= LOSS * problem.R.norm()


@given(cases(powers=(0,)), st.integers(-400, 400), st.integers(-400, 400))
def test_powers_of_two_go_through_exactly(case, of_x, of_r):
    problem = case.problem()
    plain = residual_problem(problem.X, problem.R, case.layout)
    X, R = times_power(problem.X, torch.tensor(of_x)), times_power(problem.R, torch.tensor(of_r))
    before, after = (solved(p, *factors(case)) for p in (plain, residual_problem(X, R, case.layout)))
    for name, one in before.items():
        assert after[name].relative_gap == one.relative_gap
        assert after[name].gap == math.ldexp(float(one.gap), 2 * of_r)
        assert torch.equal(after[name].update, times_power(one.update, torch.tensor(of_r - of_x)))


@given(cases(powers=(0,)), st.floats(-140, 140), st.floats(-140, 140))
def test_any_scale_goes_through(case, of_x, of_r):
    problem = case.problem()
    plain = residual_problem(problem.X, problem.R, case.layout)
    scaled = residual_problem(problem.X * 10**of_x, problem.R * 10**of_r, case.layout)
    before, after = (solved(p, *factors(case)) for p in (plain, scaled))
    for name, one in before.items():
        assert abs(float(after[name].minimum / 10**of_r / 10**of_r - one.minimum)) <= rounding(plain)
        if name != "lora":
            fit = problem.X @ (after[name].update * 10**of_x / 10**of_r - one.update)
            assert fit.norm() <= LOSS * plain.R.norm()


@given(cases(even=True, powers=(0,)), st.randoms(use_true_random=False))
def test_blocks_may_be_permuted_together(case, random):
    problem, layout, order = case.problem(), case.layout, list(range(case.num_blocks))
    random.shuffle(order)
    rows = torch.cat([torch.arange(case.m1)[layout.rows(i)] for i in order])
    cols = torch.cat([torch.arange(case.m2)[layout.cols(i)] for i in order])
    A, B = factors(case)
    before = solved(residual_problem(problem.X, problem.R, layout), A, B)
    after = solved(residual_problem(problem.X[:, rows], problem.R[:, cols], layout), A[rows], B[:, cols])
    assert_same_gaps(after, before, rounding(problem))
    fit = problem.X[:, rows] @ (after["diablo"].update - before["diablo"].update[rows][:, cols])
    assert fit.norm() <= LOSS * problem.R.norm()


@given(cases(powers=(0,)))
def test_inputs_and_outputs_may_be_mixed_within_a_block(case):
    problem, layout = case.problem(), case.layout
    inputs, outputs = torch.zeros(case.m1, case.m1).double(), torch.zeros(case.m2, case.m2).double()
    for i in range(layout.count):
        for mixing, part in ((inputs, layout.rows(i)), (outputs, layout.cols(i))):
            mixing[part, part] = orthogonal(case, part.stop - part.start, number=i)
    A, B = factors(case)
    before = solved(residual_problem(problem.X, problem.R, layout), A, B)
    after = solved(residual_problem(problem.X @ inputs, problem.R @ outputs, layout), inputs.T @ A, B @ outputs)
    assert_same_gaps(after, before, rounding(problem))
    for name in ("full", "diablo", "frozen", "tangent"):
        fit = problem.X @ (inputs @ after[name].update - before[name].update @ outputs)
        assert fit.norm() <= LOSS * problem.R.norm()


def test_mixing_across_blocks_does_change_diablo():
    """The control of the two tests above."""
    case = Case(20, 6, 6, 3, rank=6)
    problem, A, B = case.problem(), *factors(case)
    before = solved(residual_problem(problem.X, problem.R, case.layout), A, B)
    Q = orthogonal(case, 6)
    for X, R in ((problem.X @ Q, problem.R), (problem.X[:, [2, 1, 0, 3, 4, 5]], problem.R)):
        after = solved(residual_problem(X, R, case.layout), A, B)
        assert abs(after["diablo"].gap - before["diablo"].gap) > 1e-3 * before["diablo"].gap
        assert float(after["lora"].gap) == pytest.approx(float(before["lora"].gap), rel=1e-9)


@given(cases(), st.integers(0, 3), st.integers(-300, 300))
def test_only_the_column_space_of_a_and_the_row_space_of_b_matter(case, rank, power):
    problem, (A, B) = case.problem(), factors(case, rank)
    Q, scale = orthogonal(case, rank, number=3), 2.0**power
    before, after = solved(problem, A, B), solved(problem, A @ Q * scale, Q.T @ B * scale)
    assert_same_gaps(after, before, rounding(problem))


@given(cases(single=None))
def test_minimisers_are_the_smallest(case):
    """Among all minimisers: nothing in the null space of X, or of X_i."""
    problem = case.problem()
    X, _, cutoff = numbers(problem)
    found = solved(problem, *factors(case))
    groups = [(slice(None), slice(None), found["full"].update.numpy())]
    for i in range(case.layout.count):
        rows, cols = case.layout.rows(i), case.layout.cols(i)
        groups.append((rows, cols, found["diablo"].update.numpy()[rows, cols]))
    for rows, _, D in groups:
        _, sigma, Vh = scipy.linalg.svd(X[:, rows])
        null = Vh[np.sum(sigma > cutoff) :]
        bound = tolerance("loss", problem.X.dtype).value
        assert np.linalg.norm(null @ D) <= bound * np.linalg.norm(D)


def gradient_norm(problem, update, *parameters):
    """Of the loss at ``update(*parameters)``, by autograd."""
    leaves = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    problem.loss(update(*leaves)).backward()
    return math.hypot(*(float(leaf.grad.norm()) for leaf in leaves))


@given(cases(powers=(0,)), st.integers(0, 3))
def test_the_gradient_vanishes_at_every_minimiser(case, rank):
    """And the full gradient does not, unless the gap does: X^T (X dW - R) is at least sigma_r of what is missed."""
    problem, (A, B) = case.problem(), factors(case, rank)
    found, layout = solved(problem, A, B), case.layout
    U, sigma, Vh = torch.linalg.svd(found["lora"].update)
    one = U[:, :rank] @ torch.diag(sigma[:rank].sqrt()) if rank <= len(sigma) else torch.zeros(case.m1, 0).double()
    other = torch.diag(sigma[:rank].sqrt()) @ Vh[:rank] if rank <= len(sigma) else torch.zeros(0, case.m2).double()
    dB = torch.linalg.pinv(A) @ found["frozen"].update
    bound = LOSS * float(problem.X.norm() * problem.R.norm())
    sets = {
        "full": (lambda dW: dW, found["full"].update),
        "diablo": (lambda *parts: layout.scatter(*parts), *filter_none(layout.gather(found["diablo"].update))),
        "lora": (lambda a, b: a @ b, one, other),
        "frozen": (lambda b: A @ b, dB),
        "tangent": (
            lambda b, a: found["tangent"].update + A @ b + a @ B,
            torch.zeros_like(B),
            torch.zeros_like(A),
        ),
    }
    for name, (update, *parameters) in sets.items():
        size = 1 + max(float(factor.norm()) for factor in (A, B, one, other))
        assert gradient_norm(problem, update, *parameters) <= bound * size, name
        if found[name].gap > 1e-3 * problem.R.square().sum():
            assert gradient_norm(problem, lambda dW: dW, found[name].update) > bound * size, name


def filter_none(parts):
    return [part for part in parts if part is not None]


def test_the_loss_has_the_gradient_that_it_says():
    case = Case(5, 4, 3, 2, rank=3)
    assert torch.autograd.gradcheck(case.problem().loss, case.draw(4, 3).requires_grad_())


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e300, 1e306])
def test_at_the_ends_of_float64(scale):
    """Given subnormal or nearly infinite numbers, the answer is that of the same numbers at order one."""
    case = Case(20, 13, 7, 4, rank=6, seed=5)
    X, R = case.problem().X * scale, case.problem().R * scale
    exponent = torch.tensor(-int(math.log2(scale)))
    lifted = residual_problem(times_power(X, exponent), times_power(R, exponent), case.layout)
    before, after = (solved(p, *factors(case)) for p in (lifted, residual_problem(X, R, case.layout)))
    for name, one in before.items():
        assert after[name].relative_gap == one.relative_gap
        assert torch.equal(after[name].update, one.update)
        assert float(after[name].minimum) == (0.0 if scale < 1 else math.inf)


def test_an_update_that_float64_cannot_hold_is_infinite_and_the_share_is_right():
    case = Case(20, 6, 4, 2, rank=6)
    plain = residual_problem(case.problem().X, case.problem().R, case.layout)
    apart = residual_problem(plain.X * 2.0**-900, plain.R * 2.0**900, case.layout)
    before, after = (solved(p, *factors(case))["diablo"] for p in (plain, apart))
    assert after.relative_gap == before.relative_gap
    trained = torch.from_numpy(trained_entries(case.layout))
    assert torch.isinf(after.update[trained]).all()
    assert not after.update[~trained].any()


def test_tensors_that_require_gradients_are_read_as_numbers():
    case = Case(9, 6, 4, 2, rank=5)
    problem, (A, B) = case.problem(), factors(case)
    traced = LinearProblem(
        *(part.clone().requires_grad_() for part in (problem.X, problem.W0, problem.T)), case.layout
    )
    before = solved(problem, A, B)
    for name, one in solved(traced, A.clone().requires_grad_(), B.clone().requires_grad_()).items():
        assert not one.minimum.requires_grad
        assert not one.update.requires_grad
        assert torch.equal(one.update, before[name].update)


def test_strides_do_not_matter():
    case = Case(9, 6, 4, 2, rank=5)
    problem, (A, B) = case.problem(), factors(case)

    def strided(matrix):
        wide = torch.full((2 * matrix.shape[1], 3 * matrix.shape[0]), math.nan).double()
        wide[::2, ::3] = matrix.mT
        return wide[::2, ::3].mT

    spread = LinearProblem(*map(strided, (problem.X, problem.W0, problem.T)), case.layout)
    before, after = solved(problem, A, B), solved(spread, strided(A), strided(B))
    assert_same_gaps(after, before, rounding(problem))
    shared = LinearProblem(problem.X[:1].expand(9, 6), problem.W0, problem.T, case.layout)
    copied = dataclasses.replace(shared, X=shared.X.contiguous())
    assert_same_gaps(solved(shared, A, B), solved(copied, A, B), rounding(problem))


def test_float32_factors_serve_float64_problems():
    case = Case(9, 6, 4, 2, rank=5)
    problem, (A, B) = case.problem(), [factor.float() for factor in factors(case)]
    assert_same_gaps(solved(problem, A, B), solved(problem, A.double(), B.double()), rounding(problem))
