import dataclasses

import pytest
import torch

from diablo_theory.theory import optima, parametrisations, stationarity


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["L4", "L6"])
def test_every_verdict_passes(assert_passes, name, seed):
    assert_passes(name, seed)


def blind_to_ranks(problem, layout, **_):
    return dataclasses.replace(optima.full_optimum(problem), num_parameters=layout.num_parameters)


@pytest.mark.parametrize("name", ["L4", "L6"])
def test_a_diablo_that_is_full_fine_tuning_is_noticed(monkeypatch, failing, name):
    monkeypatch.setattr(optima, "diablo_optimum", blind_to_ranks)
    assert not failing(name, "claim", trials=3).empty


@pytest.mark.parametrize("name", ["L4", "L6"])
def test_a_projector_one_rank_short_is_noticed(monkeypatch, failing, name):
    original = optima.truncated_svd

    def short(group, cutoff):
        svd = original(group, cutoff)
        return dataclasses.replace(svd, U=svd.U[:, :-1], sigma=svd.sigma[:-1], Vh=svd.Vh[:-1])

    monkeypatch.setattr(optima, "truncated_svd", short)
    assert not failing(name, "claim", trials=3).empty


def test_a_premise_that_always_holds_is_noticed(monkeypatch, failing):
    original = stationarity.rank_premise
    monkeypatch.setattr(
        stationarity, "rank_premise", lambda X, layout: dataclasses.replace(original(X, layout), holds=True)
    )
    assert not failing("L4", "control", trials=3).empty


@pytest.mark.parametrize("off", [-1, 1])
def test_an_off_by_one_rank_in_lora_is_noticed(monkeypatch, failing, off):
    original = optima.lora_optimum
    monkeypatch.setattr(optima, "lora_optimum", lambda p, rho: original(p, max(rho + off, 0)))
    assert not failing("L4", trials=3).empty


def test_a_wrong_parameter_count_is_noticed(monkeypatch, failing):
    original = optima.lora_rank_at_budget
    monkeypatch.setattr(optima, "lora_rank_at_budget", lambda layout: original(layout) + 1)
    for name in ("L4", "L6"):
        assert not failing(name, "claim", trials=3).empty, name


@pytest.mark.parametrize("method", ["diablo_optimum", "frozen_lora_optimum"])
def test_a_wrong_gap_with_a_right_minimiser_is_noticed(monkeypatch, failing, method):
    original, wrong = getattr(optima, method), torch.tensor(0.5).double()
    monkeypatch.setattr(optima, method, lambda *args: dataclasses.replace(original(*args), relative_gap=wrong))
    assert not failing("L6", "claim", trials=3).empty


def test_a_frozen_optimum_outside_the_frozen_directions_is_noticed(monkeypatch, failing):
    """Full fine-tuning's update in its place fits, but not through A; the update is looked at through A."""
    original = optima.frozen_lora_optimum

    def escaped(problem, A):
        full = optima.full_optimum(problem)
        return dataclasses.replace(original(problem, A), minimiser=full.update, relative_gap=full.relative_gap)

    monkeypatch.setattr(optima, "frozen_lora_optimum", escaped)
    failed = failing("L6", "claim", trials=3)
    assert set(failed.statement) == {
        "LoRA with a frozen A of rank X reaches a generic target",
        "LoRA with a frozen A of rank X reaches X itself",
        "at m2 r parameters LoRA with a frozen A loses nothing (control: rank X = r + 1)",
    }


def test_a_transposed_minimiser_is_noticed(monkeypatch, failing):
    original = optima.frozen_lora_optimum

    def transposed(problem, A):
        optimum = original(problem, A)
        return dataclasses.replace(optimum, minimiser=optimum.update.flip(1))

    monkeypatch.setattr(optima, "frozen_lora_optimum", transposed)
    assert not failing("L6", "claim", trials=3).empty


def test_a_frozen_lora_that_is_not_linear_is_noticed(monkeypatch, failing):
    original = parametrisations.frozen_lora

    def bent(problem, A):
        method = original(problem, A)
        return dataclasses.replace(method, output=lambda theta: method.output(theta * theta.abs()))

    monkeypatch.setattr(parametrisations, "frozen_lora", bent)
    assert not failing("L6", "claim", trials=3).empty
