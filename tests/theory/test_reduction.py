import dataclasses
import math

import dense_oracles as oracles
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases, singles

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.column_space import times_power
from diablo_theory.theory.optima import diablo_optimum, full_optimum, lora_optimum
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.statistics import LayerStatistics
from diablo_theory.theory.tolerances import tolerance

LOSS = tolerance("loss").value


@given(cases(powers=(0,)))
def test_coordinates_have_the_sums_over_tokens(case):
    """``X^T X = 4^e Y^T Y`` and ``X^T R = 2^(e + f) Y^T M``: all that closed forms depend on."""
    problem = case.problem()
    reduced, (X, R) = reduce_problem(problem), (problem.X, problem.R)
    Y, M, e = reduced.space.coordinates, reduced.target, reduced.space.exponent
    scale = 1e-12 * float(X.norm())
    torch.testing.assert_close(times_power(Y.mT @ Y, 2 * e), X.mT @ X, rtol=0, atol=scale * float(X.norm()))
    cross = times_power(Y.mT @ M, e + reduced.exponent)
    torch.testing.assert_close(cross, X.mT @ R, rtol=0, atol=scale * float(R.norm()))


@given(cases(single=None))
def test_what_is_captured_and_what_is_not_add_up(case):
    problem = case.problem()
    reduced, square = reduce_problem(problem), oracles.half_square(problem.R.double().numpy())
    bound = tolerance("loss", problem.X.dtype).value * square
    outside = oracles.full(problem)
    assert abs(float(reduced.loss_of(reduced.outside)) - outside) <= bound
    assert abs(float(reduced.loss_of(reduced.captured)) - (square - outside)) <= bound


@given(cases(powers=(0,)))
def test_updates_come_back_in_the_units_of_weights(case):
    problem = case.problem()
    reduced = reduce_problem(problem)
    Y, M = reduced.space.coordinates, reduced.target
    update = reduced.update_of(torch.from_numpy(np.linalg.pinv(Y.numpy(), rcond=1e-11)) @ M)
    assert abs(oracles.loss(problem, update.numpy()) - oracles.full(problem)) <= LOSS * float(problem.R.square().sum())


@given(cases(batched=True))
def test_a_batch_is_reduced_as_its_problems_are(case):
    problem = case.problem()
    reduced = reduce_problem(problem)
    assert reduced.outside.shape == reduced.exponent.shape == torch.broadcast_shapes(case.batch_x, case.batch_t)
    for index, single in singles(problem):
        alone = reduce_problem(single)
        assert reduced.exponent[index] == alone.exponent
        for field in ("captured", "outside"):
            among, one = getattr(reduced, field)[index], getattr(alone, field)
            assert abs(float(among - one)) <= 64 * 2.0**-52 * float(alone.captured + alone.outside)


def test_an_input_that_targets_share_is_decomposed_once(monkeypatch):
    decomposed, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda X, **options: decomposed.append(X.shape) or svd(X, **options))
    reduced = reduce_problem(Case(9, 6, 4, 2, rank=3, batch_t=(5,)).problem())
    assert decomposed == [(9, 6)]
    assert reduced.space.rank.shape == ()
    assert reduced.target.shape == (5, 6, 4)


def test_tokens_that_say_nothing_change_nothing():
    problem = Case(9, 6, 4, 2, rank=3).problem()
    longer = LinearProblem(
        torch.cat([problem.X, torch.zeros(5, 6)]),
        problem.W0,
        torch.cat([problem.T, torch.zeros(5, 4)]),
        problem.layout,
    )
    before, after = reduce_problem(problem), reduce_problem(longer)
    assert float(after.captured) == pytest.approx(float(before.captured), rel=1e-13)
    assert float(after.outside) == pytest.approx(float(before.outside), rel=1e-13)


@pytest.mark.parametrize("power", [-1000, -500, 500, 1000])
def test_scales_are_taken_out_exactly(power):
    problem = dataclasses.replace(Case(9, 6, 4, 2, rank=3).problem(), W0=torch.zeros(6, 4).double())
    plain = reduce_problem(problem)
    scaled = reduce_problem(dataclasses.replace(problem, T=times_power(problem.T, torch.tensor(power))))
    assert torch.equal(scaled.target, plain.target)
    assert scaled.exponent - plain.exponent == power
    one = torch.tensor(1.0, dtype=torch.float64)
    exponent = 2 * int(scaled.exponent) - 1
    assert float(scaled.loss_of(one)) == (math.ldexp(1.0, exponent) if exponent < 1024 else math.inf)


@pytest.mark.parametrize("rtol", [0.0, 1.0, math.nan, -1.0, math.inf])
def test_an_rtol_out_of_range_is_named(rtol):
    problem = Case(9, 6, 4, 2, rank=3).problem()
    with pytest.raises(ValueError, match=rf"rtol must be at least eps = 2\.22e-16 .* and below 1, got {rtol}"):
        reduce_problem(problem, rtol)


def test_shares_are_of_what_is_captured():
    reduced = reduce_problem(Case(9, 6, 4, 2, rank=3).problem())
    assert reduced.share(reduced.captured) == 1.0
    assert reduced.share(reduced.captured / 4) == 0.25
    nothing = reduce_problem(
        LinearProblem(*(torch.zeros(size) for size in ((9, 6), (6, 4), (9, 4))), BlockLayout(6, 4, 2))
    )
    assert nothing.share(nothing.captured) == 0.0


@given(cases(powers=(0, -100, 100)), st.integers(1, 4), st.sampled_from([8.0, 2.0**40]))
def test_sums_over_tokens_reduce_to_the_same_problem(case, batches, step):
    """Batch by batch, of scales apart, near and far: what is captured, and what is not, are those of all tokens."""
    case = dataclasses.replace(case, condition=1.0)
    problem, layout, square = case.problem(), case.layout, case.problem().R.square().sum()
    scales = [step**j for j in range(batches)]
    X = torch.cat([problem.X * scale for scale in scales])
    R = torch.cat([problem.R / scale for scale in scales])
    whole = LinearProblem(X, torch.zeros(case.m1, case.m2).double(), R, layout)
    parts = zip(X.split(case.rows), R.split(case.rows), strict=True)
    direct, streamed = reduce_problem(whole), LayerStatistics.of(parts).reduce()
    assert streamed.space.rank == direct.space.rank
    assert float(streamed.loss_of(streamed.outside)) == pytest.approx(
        float(direct.loss_of(direct.outside)), abs=1e-9 * float(square)
    )
    for solve in (lambda q: full_optimum(q), lambda q: diablo_optimum(q, layout), lambda q: lora_optimum(q, 1)):
        found, expected = solve(streamed), solve(direct)
        assert abs(float(found.gap - expected.gap)) <= 1e-9 * float(square)
        error = (problem.X @ (found.update - expected.update)).norm()
        assert error <= 1e-9 * float(problem.R.norm())
