import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.problems import LinearProblem, linear_problem, low_rank_inputs

LAYOUT = BlockLayout(7, 5, 3)


@given(st.integers(1, 15), st.integers(1, 15), st.data())
def test_inputs_have_exactly_the_rank_asked_for(rows, cols, data):
    rank = data.draw(st.integers(0, min(rows, cols)))
    X = low_rank_inputs(rows, cols, rank, seeded(7))
    assert X.shape == (rows, cols)
    assert np.linalg.matrix_rank(X.numpy(), rtol=1e-10) == rank


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_out_of_range_is_named(rank):
    with pytest.raises(ValueError, match=rf"rank must be from 0 to min\(rows, cols\) = 5, got {rank}"):
        low_rank_inputs(5, 8, rank, seeded(0))


def test_a_seed_fixes_a_problem_and_another_changes_it():
    first, again, other = (linear_problem(LAYOUT, 9, 4, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.X, again.X)
    assert torch.equal(first.T, again.T)
    assert not torch.equal(first.X, other.X)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("dtype", [torch.float64])
def test_residual_is_target_minus_the_frozen_output(scale, dtype):
    problem = linear_problem(LAYOUT, 9, 4, seeded(3), arithmetic=Arithmetic(dtype), scale=scale)
    expected = problem.T.numpy() - problem.X.numpy() @ problem.W0.numpy()
    np.testing.assert_allclose(problem.R.numpy(), expected, rtol=1e-12, atol=1e-14 * scale)


def linear_parts():
    problem = linear_problem(LAYOUT, 9, 4, seeded(0))
    return {"X": problem.X, "W0": problem.W0, "T": problem.T, "layout": LAYOUT}


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("X", torch.zeros(9, 6).double(), r"X must have shape \(9, 7\), got \(9, 6\)"),
        ("W0", torch.zeros(5, 7).double(), r"W0 must have shape \(7, 5\), got \(5, 7\)"),
        ("T", torch.zeros(8, 5).double(), r"T must have shape \(9, 5\), got \(8, 5\)"),
        ("W0", torch.zeros(7, 5), r"W0 must have the dtype of the inputs, torch.float64, got torch.float32"),
        ("X", torch.zeros(9), "X must be a float32 or float64 matrix, got torch.float32 with 1 dimensions"),
        ("X", torch.zeros(9, 7).half(), "X must be a float32 or float64 matrix, got torch.float16"),
    ],
)
def test_linear_arguments_that_do_not_fit_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        LinearProblem(**{**linear_parts(), name: value})


@pytest.mark.parametrize("name", ["X", "W0", "T"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_tensors_are_named(name, bad):
    parts = linear_parts()
    parts[name] = parts[name].clone()
    parts[name][0, 0] = bad
    with pytest.raises(NonFiniteError, match=f"{name} holds a NaN or an infinity"):
        LinearProblem(**parts)


def test_a_residual_that_overflows_is_named():
    parts = linear_parts()
    with pytest.raises(NonFiniteError, match="R = T - X W0 overflows"):
        LinearProblem(**{**parts, "X": parts["X"] * 1e200, "W0": parts["W0"] * 1e200})
