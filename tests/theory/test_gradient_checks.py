import dataclasses

import pytest
import torch

from diablo_theory import ops
from diablo_theory.theory import gradient_checks, gradients, network_instances, networks, starts
from diablo_theory.theory.arithmetic import Arithmetic, gaussian
from diablo_theory.theory.checks import run_checks


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["G1", "G2"])
def test_every_verdict_passes_in_float32(name, seed):
    table = run_checks([name], trials=1, seed=seed, arithmetic=Arithmetic(torch.float32))
    assert table.passed.all(), table[~table.passed].to_string()
    assert (table.tolerance > 1e-5).all()


def test_every_architecture_is_tried():
    instances = " ".join(run_checks(["G1", "G2"], trials=1).instance)
    for name in ("tanh MLP", "gelu MLP with a head", "relu MLP", "attention block"):
        assert name in instances


def swapped(original):
    return lambda x, blocks, tail, layout: original(x, blocks.flip(0), tail, layout)


def tailless(original):
    return lambda x, blocks, tail, layout: original(x, blocks, None if tail is None else 0 * tail, layout)


def turned(original):
    """Blocks read as if they were stored outputs by inputs."""
    return lambda x, blocks, tail, layout: original(x, blocks.mT.reshape(blocks.shape), tail, layout)


@pytest.mark.parametrize("mutate", [swapped, tailless, turned])
@pytest.mark.parametrize("name", ["G1", "G2"])
def test_a_wrong_block_product_is_noticed(monkeypatch, failing, name, mutate):
    monkeypatch.setattr(ops, "block_product", mutate(ops.block_product))
    assert not failing(name, "claim").empty


def test_a_control_at_the_blocks_own_place_is_noticed(monkeypatch, failing):
    monkeypatch.setattr(gradient_checks, "_shifted", lambda matrix, lo: networks.flat(lo.gather(matrix)))
    for name in ("G1", "G2"):
        assert not failing(name, "control").empty


def test_a_lora_that_starts_elsewhere_is_noticed(monkeypatch, failing):
    def both_random(m1, m2, rank, generator):
        return starts.Start("random", gaussian(m1, rank, generator), gaussian(rank, m2, generator))

    monkeypatch.setattr(starts, "usual_start", both_random)
    failed = failing("G2", "claim")
    assert set(failed.statement.str.extract(r"(grad [AB])")[0]) == {"grad A", "grad B"}
    assert not failed.premise_holds.any()


def test_a_lora_without_its_scaling_is_noticed(monkeypatch, failing):
    original = gradients.lora_gradients
    monkeypatch.setattr(gradients, "lora_gradients", lambda problem, factors, scale: original(problem, factors, 1.0))
    failed = failing("G2", "claim")
    assert not failed.empty
    assert failed.statement.str.contains("grad B").all()


def test_a_pissa_that_starts_at_zero_is_noticed(monkeypatch, failing):
    original = starts.pissa_start

    def without_b(weight, rank):
        start = original(weight, rank)
        return dataclasses.replace(start, B=0 * start.B)

    monkeypatch.setattr(starts, "pissa_start", without_b)
    failed = failing("G2", "control")
    assert set(failed.statement.str.extract(r"(grad [AB])")[0]) == {"grad A", "grad B"}


def test_blocks_that_get_no_gradient_are_noticed(monkeypatch, failing):
    original = gradients.layer_gradients

    def deaf(problem, updates):
        return [
            dataclasses.replace(layer, blocks=tuple(None if part is None else 0 * part for part in layer.blocks))
            for layer in original(problem, updates)
        ]

    monkeypatch.setattr(gradients, "layer_gradients", deaf)
    assert failing("G2", "claim").statement.str.contains("is not zero").any()


def test_a_control_with_matched_groups_is_noticed(monkeypatch, failing):
    def matched(generator, arithmetic):
        return network_instances.mlp_problem((12, 9), (3,), 8, generator, arithmetic=arithmetic)

    monkeypatch.setattr(gradient_checks, "_unmatched", matched)
    (statement,) = failing("G2", "control").statement
    assert "is not zero" in statement
