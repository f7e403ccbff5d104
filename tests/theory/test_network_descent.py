import pytest
import torch

from diablo_theory.theory import network_descent
from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.gradients import layer_gradients
from diablo_theory.theory.network_instances import mlp_problem
from diablo_theory.theory.networks import flat, forward


@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_minimise_blocks_lowers_the_gradient_and_not_the_loss_to_zero(activation, dtype, share):
    problem = mlp_problem(
        (9, 16, 4), (2, 2), 3, seeded(0), repeats=2, activation=activation, arithmetic=Arithmetic(dtype)
    )
    before = layer_gradients(problem, problem.zero_updates())
    updates = network_descent.minimise_blocks(problem, 300, 1e-10)
    assert [flat(update).dtype for update in updates] == [dtype] * 2
    for first, last in zip(before, layer_gradients(problem, updates), strict=True):
        assert last.blocks[0].norm() < share * first.blocks[0].norm()
        assert last.g.norm() > 1e-3


def test_minimise_blocks_trains_the_tail_too_and_stops_when_told():
    problem = mlp_problem((9, 8, 5), (2, 2), 20, seeded(0))
    start = float(problem.loss(forward(problem, problem.zero_updates()).output))
    losses = [
        float(problem.loss(forward(problem, network_descent.minimise_blocks(problem, steps, 0.0)).output))
        for steps in (1, 20)
    ]
    assert start > losses[0] > losses[1]
    trained = network_descent.minimise_blocks(problem, 20, 0.0)
    assert all(tail is not None and bool(tail.any()) for _, tail in trained)
    untouched = network_descent.minimise_blocks(problem, 20, 1e3)
    assert not any(flat(update).any() for update in untouched)
