import dataclasses
from functools import partial

import pytest
import torch

from diablo_theory import ops
from diablo_theory.theory import (
    gradients,
    network_descent,
    network_instances,
    networks,
    stationarity,
    stationarity_checks,
    stationary_points,
)
from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.checks import run_checks


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["S1", "S2"])
def test_every_verdict_passes_in_float32(name, seed):
    table = run_checks([name], trials=1, seed=seed, arithmetic=Arithmetic(torch.float32))
    assert table.passed.all(), table[~table.passed].to_string()
    assert (table.tolerance > 1e-5).all()


def test_the_premises_hold_and_fail_by_construction():
    for make in stationarity_checks._FEW_SAMPLES:
        assert make(seeded(0)).truth.inputs
    assert not stationarity_checks._MANY_SAMPLES(seeded(0)).truth.inputs
    for make in (stationarity_checks._NARROW_HEAD, *stationarity_checks._NARROW_HEAD_MADE):
        assert make(seeded(0)).truth == networks.Truth(inputs=False, gradients=True)
    assert stationarity_checks._WIDE_HEAD_MADE(seeded(0)).truth == networks.Truth(inputs=False, gradients=False)


def test_s1_s_premise_fails_in_the_very_layer_that_s2_is_about():
    for make in (stationarity_checks._NARROW_HEAD, *stationarity_checks._NARROW_HEAD_MADE):
        problem = make(seeded(0))
        last = gradients.layer_gradients(problem, problem.random_updates(seeded(1)))[-1]
        assert not stationarity.rank_premise(last.X, last.layout).holds


def test_every_architecture_is_tried():
    instances = " ".join(make(seeded(0)).description for make in stationarity_checks._FEW_SAMPLES)
    for name in ("tanh MLP", "gelu MLP", "relu MLP", "attention block"):
        assert name in instances


@pytest.fixture
def fewer(monkeypatch):
    """Two networks of S1 in the place of five: mutations show in any."""
    monkeypatch.setattr(stationarity_checks, "_FEW_SAMPLES", stationarity_checks._FEW_SAMPLES[:2])


@pytest.mark.usefixtures("fewer")
def test_a_product_that_swaps_two_blocks_is_noticed(monkeypatch, failing):
    original = ops.block_product
    monkeypatch.setattr(ops, "block_product", lambda x, blocks, tail, lo: original(x, blocks.flip(0), tail, lo))
    for name in ("S1", "S2"):
        assert not failing(name, "claim").empty


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("name", ["S1", "S2"])
def test_an_amplification_that_is_too_small_is_noticed(monkeypatch, failing, name):
    original = stationarity.certificate

    def small(X, g, layout):
        found = original(X, g, layout)
        return dataclasses.replace(found, amplification=0.1 * found.amplification)

    monkeypatch.setattr(stationarity, "certificate", small)
    assert failing(name, "claim").statement.str.contains("amplification").any()


@pytest.mark.parametrize("name", ["S1", "S2"])
def test_blocks_that_are_not_trained_are_noticed(monkeypatch, failing, name):
    monkeypatch.setattr(network_descent, "minimise_blocks", lambda problem, **_: problem.zero_updates())
    assert failing(name, "claim").statement.str.contains("vanishes").any()


def test_points_that_are_not_stationary_are_noticed(monkeypatch, failing):
    monkeypatch.setattr(stationary_points, "with_stationary_targets", lambda problem, updates, generator: problem)
    assert failing("S2", "claim").statement.str.contains("vanishes").any()


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("name", ["S1", "S2"])
def test_a_premise_that_always_holds_is_noticed(monkeypatch, failing, name):
    original = stationarity.rank_premise
    monkeypatch.setattr(
        stationarity, "rank_premise", lambda X, layout: dataclasses.replace(original(X, layout), holds=True)
    )
    assert not failing(name, "control").empty


def test_an_s2_that_looks_at_the_inputs_is_noticed(monkeypatch, failing):
    monkeypatch.setattr(gradients.LayerGradients, "transposed", property(lambda layer: layer))
    assert not failing("S2", "claim").premise_holds.any()


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize(("name", "control"), [("S1", "_MANY_SAMPLES"), ("S2", "_WIDE_HEAD_MADE")])
def test_a_control_within_the_premise_is_noticed(monkeypatch, failing, name, control):
    within = {
        "S1": partial(network_instances.mlp_problem, (9, 7, 5), (3, 2), 2, repeats=2),
        "S2": partial(network_instances.mlp_problem, (9, 7, 9), (3, 2), 30, head_width=4),
    }
    monkeypatch.setattr(stationarity_checks, control, within[name])
    assert len(failing(name, "control")) == 2
