import dataclasses

import pytest
import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import convexity_checks, parametrisations
from diablo_theory.theory.convexity_checks import block_of_parameter


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_verdict_passes(assert_passes, seed):
    assert_passes("L1", seed)


def test_parameters_are_numbered_block_by_block():
    assert block_of_parameter(BlockLayout(5, 3, 2)).tolist() == [0] * 6 + [1] * 2


def test_a_convex_lora_is_noticed(monkeypatch, failing):
    """Freeze A: LoRA's controls must then fail, since both the midpoint and the saddle are gone."""
    original = parametrisations.lora

    def frozen(problem, start):
        method, size = original(problem, start), start.A.numel()
        ones = torch.ones(size, dtype=torch.float64)
        return dataclasses.replace(method, output=lambda theta: method.output(torch.cat([ones, theta[size:]])))

    monkeypatch.setattr(parametrisations, "lora", frozen)
    assert len(failing("L1", "control", trials=3)) == 6


@pytest.mark.parametrize(
    "bend",
    [
        lambda theta: theta + theta.square(),
        lambda theta: theta + theta.roll(1),  # linear and convex, but a parameter reaches the next block
    ],
)
def test_a_bent_or_coupled_diablo_is_noticed(monkeypatch, failing, bend):
    original = parametrisations.diablo

    def bent(problem):
        method = original(problem)
        return dataclasses.replace(method, output=lambda theta: method.output(bend(theta)))

    monkeypatch.setattr(parametrisations, "diablo", bent)
    assert len(failing("L1", "claim", trials=3)) >= 3


def test_wrong_block_numbers_are_noticed(monkeypatch, failing):
    monkeypatch.setattr(
        convexity_checks, "block_of_parameter", lambda layout: torch.arange(layout.num_parameters) // layout.block_cols
    )
    assert not failing("L1", "claim", trials=3).empty
