import dataclasses

import pytest
import torch

from diablo_theory.theory import certificate_checks, gradients, stationarity, stationary_points
from diablo_theory.theory.arithmetic import Arithmetic, seeded
from diablo_theory.theory.checks import run_checks
from diablo_theory.theory.measures import bound_excess
from diablo_theory.theory.network_instances import mlp_problem
from diablo_theory.theory.networks import Truth


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_verdict_passes_in_float32(seed):
    table = run_checks(["S3"], trials=1, seed=seed, arithmetic=Arithmetic(torch.float32))
    assert table.passed.all(), table[~table.passed].to_string()
    assert (table.tolerance > 1e-5).all()


def test_neither_premise_holds_anywhere():
    for make in certificate_checks._NETWORKS:
        assert make(seeded(0)).truth == Truth(inputs=False, gradients=False)


@pytest.mark.parametrize("seed", range(3, 9))
def test_no_control_passes_by_chance_in_float32(seed):
    table = run_checks(["S3"], trials=5, seed=seed, arithmetic=Arithmetic(torch.float32))
    assert table.passed.all(), table[~table.passed]


@pytest.mark.parametrize("leak", [False, True])
def test_the_excess_is_what_the_certificate_s_numbers_say(leak):
    problem = mlp_problem((9, 7, 5), (3, 2), 24, seeded(0))
    for layer in gradients.layer_gradients(problem, problem.random_updates(seeded(1))):
        certificate = stationarity.certificate(layer.X, layer.g, layer.layout)
        bound = certificate.bound if leak else certificate.amplification * certificate.grad_blocks
        scale = (1 + certificate.amplification) * float(layer.X.norm() * layer.g.norm())
        assert bound_excess(layer, leak=leak) == pytest.approx((certificate.grad_full - bound) / scale, abs=1e-12)


def altered(monkeypatch, **factors):
    """Multiply fields of every certificate."""
    original = stationarity.certificate

    def wrong(X, g, layout):
        found = original(X, g, layout)
        return dataclasses.replace(found, **{name: factor * getattr(found, name) for name, factor in factors.items()})

    monkeypatch.setattr(stationarity, "certificate", wrong)


def test_a_dropped_leak_is_noticed(monkeypatch, failing):
    altered(monkeypatch, leak=0.0)
    failed = failing("S3", "claim").statement
    assert failed.str.startswith("grad W within").any()
    assert failed.str.startswith("transposed").any()


def test_a_leak_a_little_too_small_is_noticed(monkeypatch, failing):
    """At a stationary point the bound is the leak, and equal to what it bounds."""
    altered(monkeypatch, leak=0.999)
    assert not failing("S3", "claim").empty


def test_an_amplification_that_is_too_small_is_noticed(monkeypatch, failing):
    altered(monkeypatch, amplification=0.1)
    assert not failing("S3", "claim").empty


@pytest.mark.parametrize("name", ["grad_full", "grad_blocks"])
def test_a_wrong_norm_is_noticed(monkeypatch, failing, name):
    altered(monkeypatch, **{name: 1 + 1e-9})
    assert set(failing("S3", "claim").statement) == {
        "the certificate's norms are autograd's (control: from every second sample)"
    }


def test_points_that_are_not_stationary_are_noticed(monkeypatch, failing):
    monkeypatch.setattr(stationary_points, "with_stationary_targets", lambda problem, updates, generator: problem)
    assert not failing("S3", "control").empty


def test_a_transposed_layer_with_the_layout_of_the_layer_is_noticed(monkeypatch):
    def half_turned(layer):
        return dataclasses.replace(layer, X=layer.g, g=layer.X, dense=layer.dense.mT)

    monkeypatch.setattr(gradients.LayerGradients, "transposed", property(half_turned))
    with pytest.raises(ValueError, match=r"must have \d+ columns"):
        run_checks(["S3"], trials=1)


def test_gradients_of_another_point_are_noticed(monkeypatch, failing):
    original = gradients.dense_gradients
    monkeypatch.setattr(
        gradients, "dense_gradients", lambda problem, updates: original(problem, problem.zero_updates())
    )
    assert not failing("S3", "claim").empty
