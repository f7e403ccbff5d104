from functools import partial

import pytest
import torch

from diablo_theory.theory import stationarity
from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.gradients import layer_gradients
from diablo_theory.theory.network_instances import attention_problem, mlp_problem
from diablo_theory.theory.networks import flat, forward


def test_repeated_inputs_keep_the_rank_and_change_the_targets():
    for problem, rank in (
        (mlp_problem((9, 11, 4), (2, 2), 3, seeded(0), repeats=2), 3),
        (attention_problem(9, 11, 2, 2, 2, seeded(0), repeats=2), 4),
    ):
        half = rank
        assert problem.inputs.shape == (2 * half, 9)
        assert torch.equal(problem.inputs[:half], problem.inputs[half:])
        assert not torch.equal(problem.targets[:half], problem.targets[half:])
        for X, _ in forward(problem, problem.random_updates(seeded(1))).trace:
            assert torch.linalg.matrix_rank(X) == rank


# samples up to d1 and one more, ragged tails, N = 1, repeats; heads up to d2 and one more; relu; attention
@pytest.mark.parametrize(
    ("make", "inputs", "gradients"),
    [
        (partial(mlp_problem, (12, 18, 9), (2, 3), 6), True, False),
        (partial(mlp_problem, (12, 18, 9), (2, 3), 7), False, False),
        (partial(mlp_problem, (13, 18, 9), (2, 3), 7), False, False),
        (partial(mlp_problem, (13, 18, 9), (2, 3), 6), True, False),
        (partial(mlp_problem, (7, 8, 5), (1, 1), 30), True, True),
        (partial(mlp_problem, (12, 18, 9), (2, 3), 3), True, True),
        (partial(mlp_problem, (12, 18, 9), (2, 3), 3, repeats=2), True, False),
        (partial(mlp_problem, (6, 8, 9), (2, 2), 20, head_width=4), False, True),
        (partial(mlp_problem, (6, 8, 9), (2, 2), 20, head_width=5), False, False),
        (partial(mlp_problem, (6, 8, 10), (2, 2), 20, head_width=5), False, True),
        (partial(mlp_problem, (12, 40, 8), (2, 2), 3, activation="relu"), True, True),
        (partial(mlp_problem, (6, 8, 10), (2, 2), 20, activation="relu", head_width=2), False, True),
        (partial(attention_problem, 12, 18, 2, 2, 2), True, True),
        (partial(attention_problem, 12, 18, 2, 2, 2, repeats=2), True, False),
        (partial(attention_problem, 12, 18, 3, 5, 1), False, False),
    ],
)
def test_the_truth_attached_is_what_the_ranks_say(make, inputs, gradients):
    for seed in range(3):
        problem = make(seeded(seed))
        assert problem.truth is not None
        assert (problem.truth.inputs, problem.truth.gradients) == (inputs, gradients)
        layers = layer_gradients(problem, problem.random_updates(seeded(seed + 10)))
        premises = [stationarity.rank_premise(layer.X, layer.layout).holds for layer in layers]
        dual = layers[-1].transposed
        assert all(premises) is inputs
        assert stationarity.rank_premise(dual.X, dual.layout).holds is gradients


@pytest.mark.parametrize(
    "make",
    [
        partial(mlp_problem, (4, 5, 3), (2, 3), 3),
        partial(mlp_problem, (3, 4, 5), (2, 2), 3, activation="gelu", head_width=2),
        partial(attention_problem, 3, 4, 2, 2, 2),
    ],
)
def test_float32_problems_are_the_rounded_float64_ones(make):
    problem, rounded = make(seeded(0)), make(seeded(0), arithmetic=Arithmetic(torch.float32))
    pairs = [
        (problem.inputs, rounded.inputs),
        (problem.targets, rounded.targets),
        *zip(problem.weights, rounded.weights, strict=True),
        *zip(problem.random_updates(seeded(1)), rounded.random_updates(seeded(1)), strict=True),
    ]
    for wide, narrow in pairs:
        wide, narrow = (flat(value) if isinstance(value, tuple) else value for value in (wide, narrow))
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, wide.float(), rtol=1e-6, atol=1e-7)
    assert forward(rounded, rounded.zero_updates()).output.dtype == torch.float32
    assert rounded.truth == problem.truth
