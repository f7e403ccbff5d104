from diablo_theory.theory import descent
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.networks import network_problem


def test_minimise_blocks_lowers_the_loss_to_a_stationary_point():
    problem = network_problem((9, 8, 4), (2, 2), 3, seeded(0), repeats=2)
    before = descent.layer_gradients(problem, problem.zero_updates())
    after = descent.layer_gradients(problem, descent.minimise_blocks(problem, 300, 1e-10))
    for first, last in zip(before, after, strict=True):
        assert last.blocks[0].norm() < 1e-6 * first.blocks[0].norm()
        assert last.g.norm() > 1e-3
