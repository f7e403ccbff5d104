import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import cases

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.column_space import column_space
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


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": torch.zeros(9, 7).long()}, "X must be a float32 or float64 matrix, got torch.int64"),
        ({"X": torch.zeros(9, 7).bfloat16()}, "X must be a float32 or float64 matrix, got torch.bfloat16"),
        ({"X": torch.zeros(9, 7).cdouble()}, "X must be a float32 or float64 matrix, got torch.complex128"),
        ({"X": torch.zeros(9, 7).double().to_sparse()}, "X must be dense and hold numbers"),
        ({"X": torch.zeros(9, 7, device="meta")}, "X must be dense and hold numbers, got torch.strided on meta"),
        ({"T": torch.zeros(9, 5).long()}, "T must have the dtype of the inputs, torch.float64, got torch.int64"),
        ({"T": torch.zeros(5).double()}, r"T must have shape \(9, 5\), got \(5,\)"),
        (
            {"W0": torch.zeros(7, 5, device="meta").double()},
            "W0 must be on the device of the inputs, cpu, got meta",
        ),
        ({"truth": torch.zeros(5, 7).double()}, r"truth must have shape \(7, 5\), got \(5, 7\)"),
        ({"truth": torch.zeros(7, 5)}, "truth must have the dtype of the inputs, torch.float64, got torch.float32"),
        ({"layout": BlockLayout(5, 7, 2)}, r"X must have shape \(9, 5\), got \(9, 7\)"),
        (
            {"X": torch.zeros(2, 9, 7).double(), "T": torch.zeros(3, 9, 5).double()},
            r"the batch dimensions of X \(2,\), W0 \(\) and T \(3,\) must broadcast",
        ),
    ],
)
def test_what_no_problem_can_be_made_of_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        LinearProblem(**{**linear_parts(), **change})


def test_one_bad_entry_of_a_batch_is_enough():
    X = linear_parts()["X"].expand(3, 9, 7).clone()
    X[1, 8, 6] = math.nan
    with pytest.raises(NonFiniteError, match="X holds a NaN or an infinity"):
        LinearProblem(**{**linear_parts(), "X": X})


@given(cases(batched=True, single=None))
def test_batches_broadcast(case):
    problem = case.problem()
    one, updates = case.one(), torch.stack([case.draw(case.m1, case.m2, j) for j in range(3)]).to(problem.X.dtype)
    batch = torch.broadcast_shapes(case.batch_x, case.batch_t)
    assert problem.R.shape == (*batch, *one.T.shape)
    assert problem.loss(torch.zeros_like(problem.W0)).shape == batch
    for update, loss in zip(updates, one.loss(updates), strict=True):
        by_hand = 0.5 * (one.X @ (one.W0 + update) - one.T).double().square().sum()
        assert float(loss) == pytest.approx(float(by_hand), rel=1e-4 if case.single else 1e-11)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("dW", "message"),
    [
        (torch.zeros(7, 1).double(), r"dW must have shape \(7, 5\), got \(7, 1\)"),
        (torch.zeros(5).double(), r"dW must have shape \(7, 5\), got \(5,\)"),
        (torch.zeros(7, 5).long(), "dW must be a float32 or float64 matrix, got torch.int64"),
        (torch.zeros(7, 5).half(), "dW must be a float32 or float64 matrix, got torch.float16"),
    ],
)
def test_updates_that_do_not_fit_are_named(dW, message):
    with pytest.raises(ValueError, match=message):
        LinearProblem(**linear_parts()).loss(dW)


@given(cases())
def test_targets_are_of_the_kind_asked_for(case):
    problem, layout = case.one(), case.layout
    if case.target == "generic":
        assert problem.truth is None
        return
    truth = problem.truth
    assert truth is not None
    unexplained = (problem.R - problem.X @ truth).norm()
    signal, size = (problem.X @ truth).norm(), problem.T.norm() + problem.X.norm()
    if case.target == "noise":
        assert not truth.any()
    else:
        assert float(unexplained) == pytest.approx(case.noise * float(signal), rel=1e-9, abs=1e-12 * float(size))
    if case.target == "low-rank":
        assert torch.linalg.matrix_rank(truth, rtol=1e-10) == 1
    if case.target == "block-aligned":
        assert torch.equal(layout.scatter(*layout.gather(truth)), truth)
    if case.target == "sparse":
        assert torch.count_nonzero(truth) == layout.num_parameters


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1.0, 3.0, 1e3, 1e6]), st.data())
def test_inputs_have_the_condition_asked_for(rows, cols, condition, data):
    rank = data.draw(st.integers(2, max(2, min(rows, cols))))
    assume(rank <= min(rows, cols))
    X = low_rank_inputs(rows, cols, rank, seeded(rows + 20 * cols), condition)
    sigma = torch.linalg.svdvals(X)
    assert float(sigma[0] / sigma[rank - 1]) == pytest.approx(condition, rel=1e-8)
    assert float(X.square().mean()) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": -0.1}, "noise must be at least 0 and finite, got -0.1"),
        ({"noise": math.nan}, "noise must be at least 0 and finite, got nan"),
        ({"noise": 0.1}, "noise must be 0 for target 'generic', which has no signal, got 0.1"),
        ({"condition": 0.5}, "condition must be at least 1 and finite, got 0.5"),
        ({"condition": 1e13}, r"condition must be at most 1\.1e\+11 for torch.float64, else the rank is not 4 in"),
        (
            {"condition": 1e6, "arithmetic": Arithmetic(torch.float32)},
            r"condition must be at most 205 for torch.float32, else the rank is not 4 in that precision, got 1000000",
        ),
        ({"condition": math.inf}, "condition must be at least 1 and finite, got inf"),
        ({"scale": 0.0}, r"scale must lie from 1e-292 to 3\.99e\+292 for torch\.float64, got 0\.0"),
        ({"scale": -1.0}, "scale must lie from .*, got -1.0"),
        ({"scale": math.nan}, "scale must lie from .*, got nan"),
        (
            {"scale": 1e-40, "arithmetic": Arithmetic(torch.float32)},
            r"scale must lie from 9\.86e-32 to 4\.06e\+31 for torch\.float32, got 1e-40",
        ),
        ({"target": "low-rank", "target_rank": 6}, r"target_rank must be from 0 to min\(m1, m2\) = 5, got 6"),
        ({"target": "lowrank"}, r"unknown target 'lowrank'\. Did you mean 'low-rank'\?"),
    ],
)
def test_values_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_problem(LAYOUT, 9, 4, seeded(0), **change)


@pytest.mark.parametrize("arithmetic", [Arithmetic(), Arithmetic(torch.float32)])
def test_the_smallest_and_the_largest_scale_keep_the_rank(arithmetic):
    numbers = torch.finfo(arithmetic.dtype)
    for scale in (numbers.tiny / numbers.eps, numbers.max * numbers.eps):
        problem = linear_problem(LAYOUT, 9, 4, seeded(0), scale=scale, arithmetic=arithmetic)
        assert column_space(problem.X).rank == 4


def test_a_residual_that_overflows_is_named():
    parts = linear_parts()
    with pytest.raises(NonFiniteError, match="R = T - X W0 overflows"):
        LinearProblem(**{**parts, "X": parts["X"] * 1e200, "W0": parts["W0"] * 1e200})
