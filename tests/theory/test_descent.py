import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import descent, optima
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.networks import network_problem
from diablo_theory.theory.problems import linear_problem
from diablo_theory.theory.reduction import reduce_problem


def test_gradient_descent_starts_at_zero_and_steps_along_the_dense_gradient():
    problem = linear_problem(BlockLayout(7, 5, 3), 12, 3, seeded(0))
    iterates = descent.gradient_descent(problem, 0.01, 2)
    assert not iterates[0].any()
    layout = problem.layout
    masked = layout.scatter(*layout.gather(problem.X.T @ problem.R))
    torch.testing.assert_close(iterates[1], 0.01 * masked, rtol=1e-13, atol=1e-13)


def test_gradient_descent_finds_the_minimum_norm_solution_where_there_are_many():
    problem = linear_problem(BlockLayout(12, 6, 3), 12, 2, seeded(6))
    step = 1 / float(torch.linalg.matrix_norm(problem.X, 2)) ** 2
    last = descent.gradient_descent(problem, step, 400)[-1]
    torch.testing.assert_close(
        last, optima.diablo_optimum(reduce_problem(problem), problem.layout).update, rtol=1e-8, atol=1e-8
    )


def test_minimise_blocks_lowers_the_loss_to_a_stationary_point():
    problem = network_problem((9, 8, 4), (2, 2), 3, seeded(0), repeats=2)
    before = descent.layer_gradients(problem, problem.zero_updates())
    after = descent.layer_gradients(problem, descent.minimise_blocks(problem, 300, 1e-10))
    for first, last in zip(before, after, strict=True):
        assert last.blocks[0].norm() < 1e-6 * first.blocks[0].norm()
        assert last.g.norm() > 1e-3
