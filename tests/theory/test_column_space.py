import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, seeded
from diablo_theory.theory.column_space import (
    column_space,
    decide_rank,
    times_power,
    truncated_svd,
    unit_scale,
    written_groups,
)
from diablo_theory.theory.problems import low_rank_inputs


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_basis_times_coordinates_is_the_input(rows, cols, data):
    rank = data.draw(st.integers(0, min(rows, cols)))
    X = low_rank_inputs(rows, cols, rank, seeded(rows * 100 + cols))
    space = column_space(X)
    assert space.rank == rank == np.linalg.matrix_rank(X.numpy(), rtol=1e-10)
    back = times_power(space.basis @ space.coordinates, space.exponent)
    torch.testing.assert_close(back, X, rtol=1e-11, atol=1e-11)
    inside = torch.diag((torch.arange(min(rows, cols)) < rank).double())
    torch.testing.assert_close(space.basis.T @ space.basis, inside, rtol=0, atol=1e-13)


@pytest.mark.parametrize("power", [-1000, -500, 0, 500, 1000])
def test_scaling_by_a_power_of_two_changes_the_exponent_only(power):
    X = low_rank_inputs(9, 7, 4, seeded(0))
    plain, scaled = column_space(X), column_space(times_power(X, torch.tensor(power)))
    assert scaled.exponent - plain.exponent == power
    assert torch.equal(scaled.basis, plain.basis)
    assert torch.equal(scaled.coordinates, plain.coordinates)
    assert scaled.decision == plain.decision


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e-150, 1.0, 3.0, 1e150, 1.7e308])
def test_unit_scale_is_exact_at_every_magnitude(value):
    scaled, exponent = unit_scale(torch.tensor([[value, -value / 2]], dtype=torch.float64))
    assert 1 <= float(scaled[0, 0]) < 2
    assert math.ldexp(float(scaled[0, 0]), int(exponent)) == value


def test_unit_scale_leaves_zeros_and_empty_matrices():
    assert unit_scale(torch.zeros(2, 2))[1] == 0
    assert unit_scale(torch.zeros(0, 2))[0].shape == (0, 2)


def test_powers_that_float64_cannot_hold_saturate():
    values = torch.tensor([-1.5, 1.5, 0.0], dtype=torch.float64)
    assert times_power(values, torch.tensor([2000, -2000, 2000])).tolist() == [-math.inf, 0.0, 0.0]


@pytest.mark.parametrize(
    ("sigma", "rank", "margin"),
    [
        ([1.0, 1e-3], 2, 7.0),
        ([1.0, 1e-9, 1e-11], 2, 1.0),
        ([1.0, 1e-9, 1e-10], 2, 0.0),
        ([1.0, 1e-14], 1, 4.0),
        ([1.0, 0.0], 1, 6.0),
    ],
)
def test_rank_margin_is_the_decades_to_the_nearest_singular_value(sigma, rank, margin):
    decision = decide_rank(*(torch.tensor(v, dtype=torch.float64) for v in (sigma, 1e-10, 1e-16)), widest=6.0)
    assert decision.rank == rank
    assert float(decision.margin) == pytest.approx(margin, abs=1e-9)


def test_rtol_moves_the_decision():
    X = torch.diag(torch.tensor([1.0, 1e-6, 1e-9], dtype=torch.float64))
    assert [column_space(X, rtol).rank for rtol in (None, 1e-7, 1e-5)] == [3, 2, 1]


def test_float32_inputs_are_judged_by_float32_rounding():
    X = low_rank_inputs(30, 20, 5, seeded(1))
    assert column_space(X.float()).rank == 5
    assert column_space(X.float().double()).rank > 5


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_groups_never_outrank_the_whole(rows, cols, data):
    layout = BlockLayout(cols, 5, data.draw(st.integers(1, max(cols, 5))))
    X = gaussian(rows, cols, seeded(rows + 20 * cols)) * 10.0 ** torch.linspace(0, -16, cols, dtype=torch.float64)
    space = column_space(X)
    for i in range(layout.count):
        group = space.group(layout, i)
        svd = truncated_svd(group, space.cutoff)
        assert int((svd.sigma > 0).sum()) <= space.rank
        assert torch.all((svd.sigma == 0) | (svd.sigma > space.cutoff))
        assert (
            float((svd.U @ (svd.sigma[:, None] * svd.Vh) - group).abs().max() if group.numel() else 0)
            <= 2 * space.cutoff
        )


def test_written_groups_leave_out_those_without_outputs():
    assert written_groups(BlockLayout(20, 3, 5)) == [0, 1, 2]
    assert written_groups(BlockLayout(2, 5, 5)) == [0, 1, 2, 3, 4]


def test_no_rows_means_rank_zero():
    assert column_space(torch.zeros(0, 3)).rank == 0
    assert column_space(torch.zeros(0, 3)).basis.shape == (0, 0)


@pytest.mark.parametrize("arithmetic", [Arithmetic(), Arithmetic(torch.float32)])
def test_a_sweep_across_the_cutoff_flips_the_decision_once(arithmetic):
    """A second singular value from well below the cutoff to well above: the margin is its distance, near 0 between."""
    eps = torch.finfo(arithmetic.dtype).eps
    Z, _ = torch.linalg.qr(gaussian(20, 2, seeded(4)))
    decades = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    decisions = [
        column_space(arithmetic.place(Z * torch.tensor([1.0, 4096 * eps * 10**decade]))).decision for decade in decades
    ]
    ranks = [int(decision.rank) for decision in decisions]
    assert ranks == sorted(ranks)
    assert set(ranks) == {1, 2}
    for decade, decision in zip(decades, decisions, strict=True):
        assert float(decision.margin) == pytest.approx(abs(float(decade)), abs=0.01)


@given(st.integers(1, 8), st.integers(1, 8), st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_a_batch_of_different_ranks_and_scales_equals_a_loop(rows, cols, ranks):
    singles = [low_rank_inputs(rows, cols, min(rank, rows, cols), seeded(j)) * 1e40**j for j, rank in enumerate(ranks)]
    batch = column_space(torch.stack(singles))
    for j, X in enumerate(singles):
        alone = column_space(X)
        assert (batch.rank[j], batch.exponent[j]) == (alone.rank, alone.exponent)
        assert float(batch.decision.margin[j]) == pytest.approx(float(alone.decision.margin), abs=1e-6)
        back = times_power(batch.basis[j] @ batch.coordinates[j], batch.exponent[j])
        torch.testing.assert_close(back, X, rtol=0, atol=1e-12 * float(X.norm()))


def test_each_matrix_of_a_batch_is_scaled_by_its_own():
    batch = torch.tensor([5e-324, 1e-310, 1.0, 1.7e308, 0.0], dtype=torch.float64)[:, None, None].expand(5, 2, 3)
    scaled, exponent = unit_scale(batch)
    assert ((scaled.abs() >= 1) & (scaled.abs() < 2))[:4].all()
    assert not scaled[4].any()
    assert [math.ldexp(float(s), int(e)) for s, e in zip(scaled[:, 0, 0], exponent, strict=True)] == batch[
        :, 0, 0
    ].tolist()


def test_subnormal_inputs_are_taken_at_their_word():
    """At 1e-320 an entry has 11 bits left: rounded, a rank of 1 becomes the full one, which is what was given."""
    generator = seeded(0)
    exact = torch.randint(-9, 10, (6, 1), generator=generator) @ torch.randint(-9, 10, (1, 4), generator=generator)
    assert column_space(exact.double() * 5e-324).rank == 1
    assert column_space(low_rank_inputs(6, 4, 1, generator) * 1e-320).rank == 4
    assert column_space(low_rank_inputs(6, 4, 1, generator) * 1e-300).rank == 1


def test_no_gradient_flows_back():
    X = low_rank_inputs(6, 4, 2, seeded(0)).requires_grad_()
    space = column_space(X)
    assert not any(part.requires_grad for part in (space.basis, space.coordinates, space.cutoff, space.noise))


def test_no_problems_make_an_empty_batch():
    space = column_space(torch.zeros(0, 3, 2))
    assert (space.rank.shape, space.coordinates.shape) == ((0,), (0, 2, 2))


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.ones(3), "X must be a float32 or float64 matrix, got torch.float32 with 1 dimensions"),
        (torch.ones(3, 3).long(), "X must be a float32 or float64 matrix, got torch.int64"),
        (torch.ones(3, 3).half(), "X must be a float32 or float64 matrix, got torch.float16"),
        (torch.ones(3, 3).bfloat16(), "X must be a float32 or float64 matrix, got torch.bfloat16"),
        (torch.ones(3, 3).cdouble(), "X must be a float32 or float64 matrix, got torch.complex128"),
        (torch.ones(3, 3, device="meta"), "X must be dense and hold numbers, got torch.strided on meta"),
    ],
)
def test_what_is_no_matrix_is_named(X, message):
    with pytest.raises(ValueError, match=message):
        column_space(X, rtol=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_inputs_are_refused(value):
    with pytest.raises(NonFiniteError, match="X holds a NaN or an infinity"):
        column_space(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("rtol", [0.0, 1.0, -1e-3, 1e-17, math.nan, math.inf])
def test_rtol_out_of_range_is_named(rtol):
    with pytest.raises(ValueError, match=r"rtol must be at least eps = 2\.22e-16 of torch\.float64 and below 1"):
        column_space(torch.eye(2).double(), rtol)
