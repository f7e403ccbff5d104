import dataclasses

import pytest
import torch

from diablo_theory import ops
from diablo_theory.theory import optima, oracles, stationarity


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["L2", "L3"])
def test_every_verdict_passes(assert_passes, name, seed):
    assert_passes(name, seed)


def without_a_block(original):
    """DiaBlo's minimiser with its first block dropped."""

    def broken(problem, layout, **kwargs):
        optimum = original(problem, layout, **kwargs)
        dW = optimum.update.clone()
        dW[layout.rows(0), layout.cols(0)] = 0
        return dataclasses.replace(optimum, minimiser=dW)

    return broken


def blind_to_ranks(original):
    """A closed form that projects on col X in place of col X_i, so that DiaBlo always looks perfect."""

    def broken(problem, layout, **kwargs):
        return dataclasses.replace(optima.full_optimum(problem), num_parameters=layout.num_parameters)

    return broken


def transposed(original):
    """Blocks with rows and columns exchanged where they are square."""

    def broken(problem, layout, **kwargs):
        optimum = original(problem, layout, **kwargs)
        dW = optimum.update.clone()
        for i in range(layout.count):
            block = dW[layout.rows(i), layout.cols(i)]
            side = min(block.shape)
            block[:side, :side] = block[:side, :side].T.clone()
        return dataclasses.replace(optimum, minimiser=dW)

    return broken


@pytest.mark.parametrize("mutate", [without_a_block, blind_to_ranks, transposed])
def test_sufficiency_notices_a_wrong_optimum(monkeypatch, failing, mutate):
    monkeypatch.setattr(optima, "diablo_optimum", mutate(optima.diablo_optimum))
    assert not failing("L2", "claim").empty


def test_necessity_notices_a_gap_that_is_always_zero(monkeypatch, failing):
    monkeypatch.setattr(optima, "diablo_optimum", blind_to_ranks(optima.diablo_optimum))
    assert len(failing("L3", "claim")) == 15


def test_sufficiency_notices_a_wrong_gap_with_a_right_minimiser(monkeypatch, failing):
    original = optima.diablo_optimum
    monkeypatch.setattr(
        optima,
        "diablo_optimum",
        lambda p, lo: dataclasses.replace(original(p, lo), relative_gap=torch.tensor(0.5).double()),
    )
    assert not failing("L2", "claim").empty


def test_sufficiency_notices_a_projector_one_rank_short(monkeypatch, failing):
    original = optima.truncated_svd

    def short(group, cutoff):
        svd = original(group, cutoff)
        return dataclasses.replace(svd, U=svd.U[:, :-1], sigma=svd.sigma[:-1], Vh=svd.Vh[:-1])

    monkeypatch.setattr(optima, "truncated_svd", short)
    assert not failing("L2", "claim").empty


@pytest.mark.parametrize(("name", "role"), [("L2", "control"), ("L3", "claim")])
def test_a_premise_that_always_holds_is_noticed(monkeypatch, failing, name, role):
    original = stationarity.rank_premise
    monkeypatch.setattr(
        stationarity,
        "rank_premise",
        lambda X, layout: dataclasses.replace(original(X, layout), holds=True),
    )
    assert not failing(name, role).empty


def test_necessity_notices_a_target_within_reach(monkeypatch, failing):
    def reachable(X, W0, layout, space):
        return X @ (W0 + layout.scatter(*layout.gather(torch.ones_like(W0))))

    monkeypatch.setattr(optima, "worst_case_target", reachable)
    assert len(failing("L3", "claim")) == 15


def test_necessity_notices_a_fit_over_all_inputs(monkeypatch, failing):
    monkeypatch.setattr(oracles, "blockwise_projection", lambda problem: oracles.projection(problem.X, problem.R))
    assert len(failing("L3", "claim")) == 15


def test_sufficiency_notices_a_product_that_swaps_blocks(monkeypatch, failing):
    original = ops.block_product
    monkeypatch.setattr(ops, "block_product", lambda x, blocks, tail, lo: original(x, blocks.flip(0), tail, lo))
    assert not failing("L2", "claim").empty


def test_an_update_outside_the_blocks_loses_everything(monkeypatch, failing):
    monkeypatch.setattr(
        optima, "diablo_optimum", lambda problem, layout, **_: optima.full_optimum(problem)
    )  # no gap and no loss, but not DiaBlo's
    assert {"L2"} == set(failing("L2", "claim").check)
