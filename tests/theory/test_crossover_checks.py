import dataclasses

import pytest

from diablo_theory.theory import optima, problems


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_verdict_passes(assert_passes, seed):
    assert_passes("L5", seed)


@pytest.mark.parametrize("off", [-1, 1])
def test_an_off_by_one_rank_in_lora_is_noticed(monkeypatch, failing, off):
    original = optima.lora_optimum
    monkeypatch.setattr(optima, "lora_optimum", lambda p, rho: original(p, rho + off))
    wrong = failing("L5", "claim", trials=3)
    assert wrong.empty if off == 1 else len(wrong) == 9  # a rank too many is no worse ..
    if off == 1:
        monkeypatch.setattr(optima, "lora_optimum", lambda p, rho: original(p, p.target.shape[-1]))
        assert len(failing("L5", "control", trials=3)) == 9  # .. but at full rank it wins where it should not


def test_a_target_of_one_rank_more_is_noticed(monkeypatch, failing):
    original = problems.update_of_kind

    def higher(kind, layout, generator, rank=1):
        return original(kind, layout, generator, rank + 1 if kind == "low-rank" else rank)

    monkeypatch.setattr(problems, "update_of_kind", higher)
    assert len(failing("L5", "claim", trials=3)) == 9


def test_a_diablo_without_gap_is_noticed(monkeypatch, failing):
    monkeypatch.setattr(optima, "diablo_optimum", lambda problem, layout: optima.full_optimum(problem))
    failed = failing("L5", trials=3)
    assert len(failed[failed.role == "claim"]) == 9


def test_a_diablo_that_drops_a_block_is_noticed(monkeypatch, failing):
    original = optima.diablo_optimum

    def broken(problem, layout):
        optimum = original(problem, layout)
        dW = optimum.update.clone()
        dW[layout.rows(0), layout.cols(0)] = 0
        return dataclasses.replace(optimum, minimiser=dW, relative_gap=optimum.relative_gap + 0.1)

    monkeypatch.setattr(optima, "diablo_optimum", broken)
    assert not failing("L5", "control", trials=3).empty
