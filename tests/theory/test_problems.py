import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, seeded
from diablo_theory.theory.networks import NetworkProblem, dense_forward, forward, network_problem
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


def test_network_forward_equals_the_dense_one_at_a_generic_point():
    problem = network_problem((9, 11, 6, 4), (2, 4, 3), 8, seeded(0))
    updates = problem.random_updates(seeded(1))
    dense = [
        w + layout.scatter(*update)
        for w, layout, update in zip(problem.weights, problem.layouts, updates, strict=True)
    ]
    trace = forward(problem, updates)
    torch.testing.assert_close(trace[-1][1], dense_forward(problem, dense), rtol=1e-12, atol=1e-12)
    for (_, before), (after, _) in itertools.pairwise(trace):
        assert torch.equal(after, torch.tanh(before))
    plain = forward(problem, problem.zero_updates())[-1][1]
    torch.testing.assert_close(plain, dense_forward(problem, problem.weights), rtol=0, atol=0)


def test_network_loss_is_half_the_mean_square():
    problem = network_problem((4, 3), (2,), 6, seeded(0))
    output = gaussian(6, 3, seeded(1))
    by_hand = sum(float((o - t) ** 2) for o, t in zip(output.flatten(), problem.targets.flatten(), strict=True)) / 12
    assert float(problem.loss(output)) == pytest.approx(by_hand, rel=1e-14)


def test_repeated_inputs_keep_the_rank_and_change_the_targets():
    problem = network_problem((9, 11, 4), (2, 2), 3, seeded(0), repeats=2)
    assert problem.inputs.shape == (6, 9)
    assert torch.equal(problem.inputs[:3], problem.inputs[3:])
    assert not torch.equal(problem.targets[:3], problem.targets[3:])
    for X, _ in forward(problem, problem.random_updates(seeded(1))):
        assert torch.linalg.matrix_rank(X) == 3


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ()}, "weights and layouts must be as many, at least one, got 0 and 2"),
        ({"inputs": torch.zeros(6, 8).double()}, r"inputs must have shape \(6, 9\), got \(6, 8\)"),
        ({"targets": torch.zeros(6, 3).double()}, r"targets must have shape \(6, 4\), got \(6, 3\)"),
        (
            {"layouts": (BlockLayout(9, 11, 2), BlockLayout(10, 4, 2))},
            r"layouts\[1\] must have 11 in_features, got 10",
        ),
        (
            {"weights": (torch.zeros(9, 11).double(), torch.zeros(4, 11).double())},
            r"weights\[1\] must have shape \(11, 4\), got \(4, 11\)",
        ),
    ],
)
def test_network_arguments_that_do_not_fit_are_named(change, message):
    problem = network_problem((9, 11, 4), (2, 2), 6, seeded(0))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(problem, **change)


def test_non_finite_network_weights_are_named():
    problem = network_problem((9, 4), (2,), 6, seeded(0))
    with pytest.raises(NonFiniteError, match=r"weights\[0\] holds a NaN"):
        NetworkProblem(problem.inputs, problem.targets, (problem.weights[0] * math.nan,), problem.layouts)
