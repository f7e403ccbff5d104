import dataclasses
import math

import pytest
import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import gradients, measures, network_instances, parametrisations
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import linear_problem


def method_of(output, size=3):
    return Parametrisation("test", "zero", torch.zeros(size).double(), output, torch.ones(2, 1).double())


@pytest.mark.parametrize(
    ("output", "linear"),
    [
        (lambda theta: theta[:2, None], True),
        (lambda theta: theta[:2, None] + 1, False),  # affine: the midpoint alone would not tell
        (lambda theta: theta[:2, None] ** 3, False),
        (lambda theta: theta[:2, None].abs(), False),
    ],
)
def test_a_map_is_linear_or_not(output, linear):
    premise = measures.linearity(method_of(output), *gaussian(2, 3, seeded(0)), torch.float64)
    assert premise.holds is linear
    assert (premise.margin > 0) is linear


def test_a_midpoint_by_hand():
    """Loss 1/2 (theta - 1)^2 twice: 1 at 0 and at 2, 0 half way."""
    method = method_of(lambda theta: theta[:1].expand(2)[:, None], 1)
    zero, two = torch.zeros(1).double(), torch.full((1,), 2.0).double()
    assert measures.midpoint_excess(method, zero, two) == -1
    diablo = parametrisations.diablo(linear_problem(BlockLayout(6, 4, 2), 9, 3, seeded(0)))
    assert measures.midpoint_excess(diablo, *gaussian(2, diablo.size, seeded(1))) < 0


def test_the_margin_of_a_rank_by_hand():
    sigma, cutoff = torch.tensor([1.0, 1e-3, 1e-6]).double(), 4096 * 2**-52
    assert measures.rank_margin(sigma, 2, torch.float64) == pytest.approx(-3 - math.log10(cutoff))
    assert measures.rank_margin(sigma, 4, torch.float64) == pytest.approx(-math.log10(4096))
    assert measures.rank_margin(sigma, 3, torch.float32) < 0 < measures.rank_margin(sigma, 2, torch.float32)


def test_every_layer_must_meet_the_premise():
    problem = network_instances.mlp_problem((12, 18, 9), (2, 3), 4, seeded(0))
    first, second = gradients.layer_gradients(problem, problem.zero_updates())
    both = measures.rank_premise_of_layers([first, second])
    assert both.holds
    assert both.margin > 0
    alike = dataclasses.replace(
        first, X=first.X * (torch.arange(12) != 0)
    )  # one feature, and a direction of X_1, less
    alike.X[:, 1:6] = first.X[:, 6:7]
    for layers in ([alike, second], [second, alike]):
        premise = measures.rank_premise_of_layers(layers)
        assert not premise.holds
        assert premise.margin < 0
