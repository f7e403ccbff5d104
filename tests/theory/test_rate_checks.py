import dataclasses

import pytest
import torch

from diablo_theory.theory import curvature, dynamics, optima, parametrisations, rate_checks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_verdict_passes(assert_passes, seed):
    assert_passes("D1", seed, trials=3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda curvatures, step: float((1 - step * curvatures).abs().min()),
        lambda curvatures, step: float((1 - step * curvatures).square().max()),  # of the loss, not of the distance
        lambda curvatures, step: float((1 - step * curvatures.sqrt()).abs().max()),
    ],
)
def test_a_wrong_rate_is_noticed(monkeypatch, failing, wrong):
    monkeypatch.setattr(curvature, "contraction", wrong)
    assert len(failing("D1", "claim", trials=3)) >= 8  # a frozen A of rank 1 has one mode only


@pytest.mark.parametrize("method", ["diablo", "lora-frozen-a"])
def test_the_spectrum_of_all_inputs_is_noticed(monkeypatch, failing, method):
    name = {"diablo": "diablo_curvatures", "lora-frozen-a": "frozen_curvatures"}[method]
    monkeypatch.setattr(curvature, name, lambda problem, *_: curvature.full_curvatures(problem))
    failed = failing("D1", "claim", trials=3)
    assert len(failed[failed.statement.str.startswith(f"{method}: gradient descent at the predicted rate")]) == 3


def test_a_mode_too_many_is_noticed(monkeypatch, failing):
    """One of LoRA's zero eigenvalues among the others predicts that nothing converges."""
    original = curvature.lora_curvatures
    monkeypatch.setattr(curvature, "lora_curvatures", lambda *args: original(*args[:2], args[2] + 1))
    assert len(failing("D1", "claim", trials=3)) == 3


def test_transposed_designs_are_noticed(monkeypatch, failing):
    original = curvature.diablo_curvatures

    def swapped(problem):
        flipped = problem.X.flip(1)
        return original(type(problem)(flipped, problem.W0, problem.T, problem.layout))

    monkeypatch.setattr(curvature, "diablo_curvatures", swapped)
    assert not failing("D1", "claim", trials=3).empty


def test_a_descent_with_another_step_is_noticed(monkeypatch, failing):
    original = dynamics.descend

    def slower(method, optimiser, step, iterations, **kwargs):
        return original(method, optimiser, 0.9 * step, iterations, **kwargs)

    monkeypatch.setattr(dynamics, "descend", slower)
    failed = failing("D1", "claim", trials=3)
    assert failed.statement.str.contains("predicted rate").sum() == 9


@pytest.mark.parametrize("which", ["closed form", "LAPACK"])
def test_a_limit_that_is_not_the_smallest_solution_is_noticed(monkeypatch, failing, which):
    """Off by 1e-9 in one answer: what descent reaches is held to both."""
    if which == "closed form":
        original = optima.diablo_optimum

        def off(problem, layout):
            optimum = original(problem, layout)
            return dataclasses.replace(optimum, minimiser=optimum.update * (1 + 1e-9))

        monkeypatch.setattr(optima, "diablo_optimum", off)
    else:
        solutions = rate_checks._smallest_solutions
        monkeypatch.setattr(rate_checks, "_smallest_solutions", lambda *args: solutions(*args) * (1 + 1e-9))
    failed = failing("D1", "claim", trials=3)
    assert len(failed) == 3
    assert failed.statement.str.contains("reaches X_i").all()


def test_a_start_that_descent_brings_back_is_noticed(monkeypatch, failing):
    """A start in the row spaces called one beside them: the control's claim would hold."""
    original = dynamics.descend

    def projected(method, optimiser, step, iterations, *, start):
        return original(method, optimiser, step, iterations, start=0 * start if iterations > 60 else start)

    monkeypatch.setattr(dynamics, "descend", projected)
    failed = failing("D1", "control", trials=3)
    assert len(failed) == 2
    assert failed.statement.str.contains("from beside the row spaces").all()


def test_a_point_that_is_no_minimum_is_noticed(monkeypatch, failing):
    original = parametrisations.best_factors
    monkeypatch.setattr(parametrisations, "best_factors", lambda *args: 1.001 * original(*args))
    failed = failing("D1", "claim", trials=3)
    assert len(failed) == 3
    assert failed.statement.str.startswith("lora:").all()


def test_a_dropped_block_is_noticed(monkeypatch, failing):
    original = parametrisations.diablo

    def broken(problem):
        method = original(problem)
        mask = torch.ones(method.size).double()
        mask[: problem.layout.block_rows * problem.layout.block_cols] = 0
        return type(method)("diablo", "zero", method.start, lambda t: method.output(mask * t), method.residual)

    monkeypatch.setattr(parametrisations, "diablo", broken)
    assert not failing("D1", "claim", trials=3).empty
