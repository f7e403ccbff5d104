import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.architectures import MLP
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.network_instances import attention_problem, mlp_problem
from diablo_theory.theory.networks import NetworkProblem, dense_forward, forward

SMALL = {
    "tanh": partial(mlp_problem, (4, 5, 3), (2, 3), 3),
    "gelu and head": partial(mlp_problem, (3, 4, 5), (2, 2), 3, activation="gelu", head_width=2),
    "attention": partial(attention_problem, 3, 4, 2, 2, 2),
}


def dense_weights(problem, updates):
    adapted = [
        w + lo.scatter(*update) for w, lo, update in zip(problem.weights, problem.layouts, updates, strict=False)
    ]
    return [*adapted, *problem.weights[len(adapted) :]]


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_forward_equals_the_dense_one_at_a_generic_point(make):
    problem = make(seeded(0))
    updates = problem.random_updates(seeded(1))
    dense = dense_weights(problem, updates)
    passed = forward(problem, updates)
    torch.testing.assert_close(passed.output, dense_forward(problem, dense), rtol=1e-12, atol=1e-12)
    assert len(passed.trace) == problem.architecture.layers
    assert torch.equal(passed.trace[0][0], problem.inputs)
    for (X, Y), weight in zip(passed.trace, dense, strict=True):
        torch.testing.assert_close(Y, X @ weight, rtol=1e-12, atol=1e-12)
    plain = forward(problem, problem.zero_updates()).output
    torch.testing.assert_close(plain, dense_forward(problem, problem.weights), rtol=0, atol=0)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.data())
def test_forward_equals_the_dense_one_for_ragged_shapes(sizes, data):
    blocks = [data.draw(st.integers(1, max(pair))) for pair in itertools.pairwise(sizes)]
    problem = mlp_problem(sizes, blocks, 4, seeded(2), activation="relu", head_width=data.draw(st.integers(1, 4)))
    updates = problem.random_updates(seeded(3))
    dense = dense_forward(problem, dense_weights(problem, updates))
    torch.testing.assert_close(forward(problem, updates).output, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_gradients_at_the_blocks_are_the_numerical_ones(make):
    problem = make(seeded(0))
    updates = problem.random_updates(seeded(1))
    leaves = [part.requires_grad_() for update in updates for part in update if part is not None]

    def loss(*parts):
        rest = iter(parts)
        point = [(next(rest), None if tail is None else next(rest)) for _, tail in updates]
        return problem.loss(forward(problem, point).output)

    assert any(tail is not None for _, tail in updates)
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("make", "group"), [(SMALL["tanh"], 1), (SMALL["gelu and head"], 1), (SMALL["attention"], 2)])
def test_samples_do_not_see_each_other(make, group):
    """Permuted samples, for attention whole sequences, have the permuted output."""
    problem = make(seeded(0))
    samples = problem.inputs.unflatten(0, (-1, group))
    order = torch.randperm(len(samples), generator=seeded(4))
    moved = dataclasses.replace(problem, inputs=samples[order].flatten(0, 1))
    updates = problem.random_updates(seeded(1))
    expected = forward(problem, updates).output.unflatten(0, (-1, group))[order].flatten(0, 1)
    torch.testing.assert_close(forward(moved, updates).output, expected, rtol=1e-12, atol=1e-12)


def test_loss_is_half_the_mean_square():
    problem = mlp_problem((4, 3), (2,), 6, seeded(0))
    output = gaussian(6, 3, seeded(1))
    by_hand = sum(float((o - t) ** 2) for o, t in zip(output.flatten(), problem.targets.flatten(), strict=True)) / 12
    assert float(problem.loss(output)) == pytest.approx(by_hand, rel=1e-14)


def test_a_description_lists_the_adapted_layers():
    problem = SMALL["gelu and head"](seeded(0))
    assert problem.description == "gelu MLP with a head, b=3, 3x4/2 4x5/2"


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ()}, "weights must be 2, one a layer, and layouts from 1 to as many, got 0 and 2"),
        ({"layouts": ()}, "weights must be 2, one a layer, and layouts from 1 to as many, got 2 and 0"),
        ({"architecture": MLP(3)}, "weights must be 3, one a layer, and layouts from 1 to as many, got 2 and 2"),
        ({"inputs": torch.zeros(6, 8).double()}, r"weights\[0\] must have shape \(8, 11\), got \(9, 11\)"),
        ({"inputs": torch.zeros(6, 9)}, r"weights\[0\] must have the dtype of the inputs, torch.float32"),
        ({"targets": torch.zeros(6, 3).double()}, r"targets must have shape \(6, 4\), got \(6, 3\)"),
        (
            {"layouts": (BlockLayout(9, 11, 2), BlockLayout(10, 4, 2))},
            r"weights\[1\] must have shape \(10, 4\), got \(11, 4\)",
        ),
        (
            {"weights": (torch.zeros(9, 11).double(), torch.zeros(4, 11).double())},
            r"weights\[1\] must have shape \(11, 4\), got \(4, 11\)",
        ),
        (
            {
                "layouts": (BlockLayout(9, 11, 2),),
                "weights": (torch.zeros(9, 11).double(), torch.zeros(7, 4).double()),
            },
            r"weights\[1\] must have shape \(11, 4\), got \(7, 4\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    problem = mlp_problem((9, 11, 4), (2, 2), 6, seeded(0))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(problem, **change)


def test_non_finite_weights_are_named():
    problem = mlp_problem((9, 4), (2,), 6, seeded(0))
    with pytest.raises(NonFiniteError, match=r"weights\[0\] holds a NaN"):
        NetworkProblem(
            problem.inputs, problem.targets, (problem.weights[0] * math.nan,), problem.layouts, problem.architecture
        )
