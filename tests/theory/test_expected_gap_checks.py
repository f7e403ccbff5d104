import dataclasses

import pytest
import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import expected_gap_checks, optima
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.expected_gap_checks import degrees_of_freedom
from diablo_theory.theory.problems import LinearProblem, low_rank_inputs
from diablo_theory.theory.reduction import reduce_problem


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_verdict_passes(assert_passes, seed):
    assert_passes("L7", seed)


@pytest.mark.parametrize(
    ("sizes", "rank", "freedom"),
    [
        ((24, 18, 4), 7, 18),  # m2 (r - d1)
        ((24, 18, 4), 6, 0),
        ((23, 17, 4), 8, 15 * 2 + 2 * 3),  # the last group has 5 rows and 2 columns
        ((4, 12, 12), 2, 12 * 2 - 4),  # eight groups of outputs have no inputs at all
        ((10, 4, 1), 10, 0),
    ],
)
def test_degrees_of_freedom_by_hand(sizes, rank, freedom):
    assert degrees_of_freedom(BlockLayout(*sizes), rank) == freedom


def test_the_mean_gap_has_the_closed_form():
    layout, s, draws = BlockLayout(11, 7, 3), 0.4, 4000
    X = low_rank_inputs(15, 11, 6, seeded(0))
    R = s * torch.randn(draws, 15, 7, generator=seeded(1), dtype=torch.float64)
    problem = LinearProblem(X, torch.zeros(11, 7).double(), R, layout)
    gaps = optima.diablo_optimum(reduce_problem(problem), layout, minimiser=False).gap
    expected = 0.5 * s**2 * (3 * 2 + 3 * 2 + 1 * 3)  # groups of 4, 4 and 3 rows; 3, 3 and 1 columns
    assert float(gaps.mean()) == pytest.approx(expected, abs=6 * float(gaps.std()) / draws**0.5)
    assert float(gaps.std()) == pytest.approx(0.5 * s**2 * (2 * 15) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda layout, rank: layout.out_features * (rank - layout.block_rows) + 1,
        lambda layout, rank: layout.out_features * (rank + 1 - layout.block_rows),
        lambda layout, rank: layout.in_features * (rank - layout.block_rows),
    ],
)
def test_wrong_degrees_of_freedom_are_noticed(monkeypatch, failing, wrong):
    monkeypatch.setattr(expected_gap_checks, "degrees_of_freedom", wrong)
    assert not failing("L7", "claim", trials=4).empty


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_closed_form_off_by_a_factor_is_noticed(monkeypatch, failing, factor):
    original = optima.diablo_optimum

    def broken(problem, layout, **kwargs):
        optimum = original(problem, layout, **kwargs)
        return dataclasses.replace(optimum, gap=factor * optimum.gap)

    monkeypatch.setattr(optima, "diablo_optimum", broken)
    assert len(failing("L7", "claim", trials=3)) == 3


def test_a_projector_one_rank_short_is_noticed(monkeypatch, failing):
    original = optima.truncated_svd

    def short(group, cutoff):
        svd = original(group, cutoff)
        return dataclasses.replace(svd, U=svd.U[..., :-1], sigma=svd.sigma[..., :-1], Vh=svd.Vh[..., :-1, :])

    monkeypatch.setattr(optima, "truncated_svd", short)
    assert len(failing("L7", "claim", trials=3)) == 3


def test_wrong_variance_is_noticed(monkeypatch, failing):
    original = expected_gap_checks._surprise
    monkeypatch.setattr(
        expected_gap_checks,
        "_surprise",
        lambda sample, freedom: original(dataclasses.replace(sample, T=1.1 * sample.T), freedom),
    )
    assert len(failing("L7", "claim", trials=3)) == 3
