from functools import partial

import pytest
import torch

from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.gradients import layer_gradients
from diablo_theory.theory.network_instances import attention_problem, mlp_problem
from diablo_theory.theory.networks import flat, forward
from diablo_theory.theory.stationarity import rank_premise
from diablo_theory.theory.stationary_points import output_jacobian, with_stationary_targets

NETWORKS = {
    "tanh, ragged": partial(mlp_problem, (9, 7, 5), (3, 2), 24),
    "relu": partial(mlp_problem, (9, 7, 5), (3, 2), 24, activation="relu"),
    "gelu and head": partial(mlp_problem, (7, 5, 7), (3, 2), 24, activation="gelu", head_width=5),
    "attention": partial(attention_problem, 5, 6, 3, 6, 4),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_jacobian_is_the_difference_quotient(make):
    problem = make(seeded(0))
    updates = problem.random_updates(seeded(1))
    J = output_jacobian(problem, updates)
    assert J.shape == (problem.targets.numel(), sum(flat(update).numel() for update in updates))
    step = problem.random_updates(seeded(2))
    direction = torch.cat([flat(update) for update in step])

    def moved(h):
        return [
            (b + h * db, None if t is None else t + h * dt) for (b, t), (db, dt) in zip(updates, step, strict=True)
        ]

    h = 1e-6
    quotient = (forward(problem, moved(h)).output - forward(problem, moved(-h)).output).flatten() / (2 * h)
    torch.testing.assert_close(J @ direction, quotient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_blocks_are_stationary_and_the_weights_are_not(make, dtype):
    problem = make(seeded(0), arithmetic=Arithmetic(dtype))
    updates = problem.random_updates(seeded(1))
    made = with_stationary_targets(problem, updates, seeded(2))
    assert made.targets.dtype == dtype
    assert float(made.loss(forward(made, updates).output)) > 0.1
    for layer in layer_gradients(made, updates):
        scale = layer.X.norm() * layer.g.norm()
        assert flat(layer.blocks).norm() < 100 * torch.finfo(dtype).eps * scale
        assert layer.dense.norm() > 1e-3 * scale


def test_repeated_inputs_can_be_made_stationary_however_many_the_blocks_are():
    problem = mlp_problem((12, 18, 9), (2, 3), 4, seeded(0), repeats=2)
    updates = problem.random_updates(seeded(1))
    for layer in layer_gradients(with_stationary_targets(problem, updates, seeded(2)), updates):
        assert flat(layer.blocks).norm() < 1e-12 * layer.X.norm() * layer.g.norm()


def test_a_network_that_can_fit_everything_is_named():
    problem = mlp_problem((12, 18, 9), (2, 3), 4, seeded(0))
    with pytest.raises(ValueError, match="more output entries than its blocks can fit, got 36 of each"):
        with_stationary_targets(problem, problem.random_updates(seeded(1)), seeded(2))


@pytest.mark.parametrize(("num_blocks", "vanishes"), [(2, True), (3, False)])
def test_two_layers_that_act_as_one_product_are_stationary_together_for_two_blocks(num_blocks, vanishes):
    """Queries with keys, and values with outputs: their blocks see 2 m^2 / N functions of one m x m gradient."""
    problem = attention_problem(5, 6, num_blocks, 6, 4, seeded(0))
    updates = problem.random_updates(seeded(1))
    *attention, up, down = layer_gradients(with_stationary_targets(problem, updates, seeded(2)), updates)
    for layer in attention:
        assert not rank_premise(layer.X, layer.layout).holds
        assert not rank_premise(layer.transposed.X, layer.transposed.layout).holds
        assert (layer.dense.norm() < 1e-10 * layer.X.norm() * layer.g.norm()) == vanishes
    assert min(up.dense.norm(), down.dense.norm()) > 1e-3
