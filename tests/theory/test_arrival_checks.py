import dataclasses

import pytest

from diablo_theory.theory import dynamics, optima, parametrisations


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_verdict_passes(assert_passes, seed):
    assert_passes("D2", seed, trials=3)


def test_minima_off_by_one_rank_are_noticed(monkeypatch, failing):
    original = optima.lora_optimum
    monkeypatch.setattr(optima, "lora_optimum", lambda p, rho, minimiser=True: original(p, rho + 1, minimiser))
    failed = failing("D2", "claim", trials=1)
    assert len(failed) == 3  # LoRA from its two starts, and from PiSSA's
    assert failed.statement.str.contains("LoRA from PiSSA|lora from", regex=True).all()


@pytest.mark.parametrize(
    ("name", "wrong"), [("diablo_optimum", {"diablo"}), ("frozen_lora_optimum", {"lora-frozen-a"})]
)
def test_wrong_minima_of_the_linear_methods_are_noticed(monkeypatch, failing, name, wrong):
    original = getattr(optima, name)

    def higher(problem, *args, **kwargs):
        optimum = original(problem, *args, **kwargs)
        return dataclasses.replace(optimum, minimum=optimum.minimum + 1e-4 * problem.loss_of(problem.captured))

    monkeypatch.setattr(optima, name, higher)
    failed = failing("D2", "claim", trials=1)
    assert {statement.split()[5] for statement in failed.statement} == wrong


def test_an_optimiser_that_stops_short_is_noticed(monkeypatch, failing):
    original = dynamics.descend

    def short(method, optimiser, step, iterations, **kwargs):
        return original(method, optimiser, step, 20, **kwargs)

    monkeypatch.setattr(dynamics, "descend", short)
    assert len(failing("D2", "claim", trials=1)) >= 5


def test_a_principal_start_that_keeps_the_whole_weight_is_noticed(monkeypatch, failing):
    """Without taking A_0 B_0 out of W0 the set is LoRA's own."""
    original = parametrisations.lora

    def plain(problem, start):
        method, offset = original(problem, start), problem.X @ start.A @ start.B
        return dataclasses.replace(method, output=lambda theta: method.output(theta) + offset)

    monkeypatch.setattr(parametrisations, "lora", plain)
    failed = failing("D2", trials=1)
    assert set(failed.role) == {"claim", "control"}
    assert failed.statement.str.contains("PiSSA").all()


def test_a_saddle_that_is_left_is_noticed(monkeypatch, failing):
    original = dynamics.descend

    def nudged(method, *args, start=None, **kwargs):
        start = method.start if start is None else start
        return original(method, *args, start=start if start.any() else start + 1e-3, **kwargs)

    monkeypatch.setattr(dynamics, "descend", nudged)
    failed = failing("D2", trials=1)
    assert failed.statement.str.contains("saddle|never moves", regex=True).all()
    assert set(failed.role) == {"claim", "control"}
