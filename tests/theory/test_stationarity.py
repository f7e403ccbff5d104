import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.column_space import column_space
from diablo_theory.theory.problems import low_rank_inputs
from diablo_theory.theory.stationarity import certificate, certificate_of, premise_of, rank_premise


@st.composite
def layers(draw):
    m1, m2, b = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 16))
    layout = BlockLayout(m1, m2, draw(st.integers(1, max(m1, m2))))
    generator = seeded(draw(st.integers(0, 10**6)))
    X = low_rank_inputs(b, m1, draw(st.integers(0, min(b, m1))), generator)
    return X, gaussian(b, m2, generator), layout


def oracle(X, g, layout):
    """S3 by numpy's pinv, block by block."""
    X, g = X.numpy(), g.numpy()
    blocks, leak, amplification = 0.0, 0.0, 0.0
    for i in range(layout.count):
        X_i, g_i = X[:, layout.rows(i)], g[:, layout.cols(i)]
        if g_i.shape[1] == 0:
            continue
        pinv = np.linalg.pinv(X_i, rcond=1e-11) if X_i.size else np.zeros((0, len(X)))
        if X_i.size:
            amplification = max(amplification, np.linalg.norm(pinv @ X, 2))
        blocks += np.linalg.norm(X_i.T @ g_i) ** 2
        leak += np.linalg.norm((X - X_i @ (pinv @ X)).T @ g_i) ** 2
    return np.linalg.norm(X.T @ g), math.sqrt(blocks), amplification, math.sqrt(leak)


@given(layers())
def test_certificate_equals_the_dense_oracle_and_bounds(layer):
    X, g, layout = layer
    found = certificate(X, g, layout)
    full, blocks, amplification, leak = oracle(X, g, layout)
    scale = float(X.norm() * g.norm()) + 1.0
    assert found.grad_full == pytest.approx(full, rel=1e-10, abs=1e-12 * scale)
    assert found.grad_blocks == pytest.approx(blocks, rel=1e-10, abs=1e-12 * scale)
    assert found.leak == pytest.approx(leak, rel=1e-8, abs=1e-9 * scale)
    assert found.amplification == pytest.approx(amplification, rel=1e-6)
    assert found.grad_full <= found.bound * (1 + 1e-12) + 1e-12 * scale


@given(layers())
def test_premise_counts_ranks_and_its_margin_carries_the_sign(layer):
    X, _, layout = layer
    premise = rank_premise(X, layout)
    ranks = [
        int(np.linalg.matrix_rank(X[:, layout.rows(i)].numpy(), tol=1e-10)) if X[:, layout.rows(i)].numel() else 0
        for i in range(layout.count)
        if layout.cols(i).stop > layout.cols(i).start
    ]
    assert premise.block_ranks == tuple(ranks)
    assert premise.holds == all(rank == premise.rank for rank in ranks)
    assert (premise.margin > 0) == premise.holds


@given(layers())
def test_nothing_leaks_where_the_premise_holds(layer):
    """There X = X_i C_i, so the leak, ||(X - X_i C_i)^T g_i||, is zero for any g."""
    X, g, layout = layer
    if not rank_premise(X, layout).holds:
        X = X[:, :1].expand(-1, layout.in_features) * torch.linspace(1, 2, layout.in_features, dtype=torch.float64)
    assume(rank_premise(X, layout).holds)  # a group without inputs: no input can meet the premise
    assert certificate(X, g, layout).leak <= 1e-8 * float(X.norm() * g.norm())


def test_a_stationary_block_gradient_leaks_only_outside_the_premise():
    generator = seeded(0)
    layout = BlockLayout(12, 9, 3)
    for rank, leaks in ((4, False), (6, True)):
        X, g = low_rank_inputs(20, 12, rank, generator), gaussian(20, 9, generator)
        for i in range(3):
            Q, _ = torch.linalg.qr(X[:, layout.rows(i)])
            g[:, layout.cols(i)] -= Q @ (Q.T @ g[:, layout.cols(i)])
        found = certificate(X, g, layout)
        assert found.grad_blocks < 1e-12
        assert (found.grad_full > 1) is leaks
        assert (found.leak > 1) is leaks


@pytest.mark.parametrize("power", [-400, 400])
def test_the_certificate_scales_exactly(power):
    layout, generator = BlockLayout(13, 7, 4), seeded(3)
    X, g = low_rank_inputs(20, 13, 5, generator), gaussian(20, 7, generator)
    plain = certificate(X, g, layout)
    scaled = certificate(X * 2.0**power, g * 2.0**power, layout)
    assert scaled.amplification == plain.amplification
    for name in ("grad_full", "grad_blocks", "leak"):
        assert getattr(scaled, name) == math.ldexp(getattr(plain, name), 2 * power)


@pytest.mark.parametrize(("weak", "holds"), [(1e-3, True), (1e-11, True), (1e-13, False)])
def test_the_premise_margin_is_in_decades(weak, holds):
    generator = seeded(4)
    Z, _ = torch.linalg.qr(gaussian(20, 2, generator))
    X = torch.cat([Z @ torch.diag(torch.tensor([1.0, weak], dtype=torch.float64)), Z], dim=1)
    premise = rank_premise(X, BlockLayout(4, 4, 2))
    assert premise.holds is holds
    cutoff = 4096 * 2.0**-52 * float(torch.linalg.matrix_norm(X, 2))
    assert premise.margin == pytest.approx(math.log10(weak / cutoff), abs=1e-3)


@pytest.mark.parametrize(("weak", "decade"), [(1e-3, 3), (1e-11, 11), (1e-13, 0)])
def test_what_lies_below_the_cutoff_leaks_and_is_not_amplified(weak, decade):
    generator = seeded(4)
    Z, _ = torch.linalg.qr(gaussian(20, 2, generator))
    X = torch.cat([Z @ torch.diag(torch.tensor([1.0, weak], dtype=torch.float64)), Z], dim=1)
    found = certificate(X, gaussian(20, 4, generator), BlockLayout(4, 4, 2))
    assert math.log10(found.amplification) == pytest.approx(decade, abs=0.2)
    assert (found.leak > 0.1 * found.grad_full) is (decade == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_holds_of_the_part_of_the_gradient_below_the_cutoff(dtype):
    """A feature far larger than the others, as language models have, sets a cutoff above all others in float32."""
    generator, layout = seeded(5), BlockLayout(12, 9, 3)
    X = gaussian(40, 12, generator)
    X[:, 3] = 3e4
    g = gaussian(40, 9, generator)
    X, g = X.to(dtype), (g - g.mean(0)).to(dtype)
    found, whole = certificate(X, g, layout), float((X.double().T @ g.double()).norm())
    assert found.grad_full == pytest.approx(whole, rel=1e-6)
    assert whole <= found.bound
    kept = column_space(X)
    assert (int(kept.rank) == 1) == (dtype == torch.float32)


def test_a_sweep_across_the_cutoff_flips_the_premise_once():
    Z, _ = torch.linalg.qr(gaussian(20, 2, seeded(4)))
    cutoff, decades = 4096 * 2.0**-52 * math.sqrt(2), torch.linspace(-2, 2, 81, dtype=torch.float64)
    premises = [
        rank_premise(torch.cat([Z * torch.tensor([1.0, cutoff * 10**decade]), Z], dim=1), BlockLayout(4, 4, 2))
        for decade in decades
    ]
    held = [premise.holds for premise in premises]
    assert held == sorted(held)
    assert set(held) == {True, False}
    for decade, premise in zip(decades, premises, strict=True):
        assert premise.margin == pytest.approx(float(decade), abs=0.01)
        assert (premise.margin > 0) == premise.holds
        assert premise.block_ranks == (2 if premise.holds else 1, 2)


def test_a_column_repeated_within_a_block_breaks_the_premise():
    X, layout = low_rank_inputs(20, 12, 4, seeded(2)), BlockLayout(12, 9, 3)
    assert rank_premise(X, layout).holds
    X[:, 1] = X[:, 0]
    assert rank_premise(X, layout).block_ranks == (3, 4, 4)


@given(layers())
def test_neither_tokens_nor_rotations_within_blocks_matter(layer):
    X, g, layout = layer
    Q, _ = torch.linalg.qr(gaussian(len(X), len(X), seeded(1)))
    inputs, outputs = torch.zeros(X.shape[1], X.shape[1]).double(), torch.zeros(g.shape[1], g.shape[1]).double()
    for i in range(layout.count):
        for mixing, part in ((inputs, layout.rows(i)), (outputs, layout.cols(i))):
            size = part.stop - part.start
            mixing[part, part] = torch.linalg.qr(gaussian(size, size, seeded(i)))[0]
    plain, mixed = certificate(X, g, layout), certificate(Q @ X @ inputs, Q @ g @ outputs, layout)
    scale = float(X.norm() * g.norm())
    assert mixed.grad_full == pytest.approx(plain.grad_full, abs=1e-11 * scale)
    assert mixed.grad_blocks == pytest.approx(plain.grad_blocks, abs=1e-11 * scale)
    assert mixed.amplification == pytest.approx(plain.amplification, rel=1e-6)
    assert mixed.leak == pytest.approx(plain.leak, rel=1e-7, abs=1e-8 * scale)


def test_without_tokens_every_gradient_is_zero():
    layout = BlockLayout(6, 4, 2)
    found = certificate(torch.zeros(0, 6).double(), torch.zeros(0, 4).double(), layout)
    assert (found.grad_full, found.grad_blocks, found.leak, found.bound) == (0.0, 0.0, 0.0, 0.0)
    assert rank_premise(torch.zeros(0, 6).double(), layout).holds


def test_tensors_that_require_gradients_are_read_as_numbers(recwarn):
    layout, X, g = BlockLayout(6, 4, 2), gaussian(5, 6, seeded(0)), gaussian(5, 4, seeded(1))
    traced = X.clone().requires_grad_(), g.clone().requires_grad_()
    assert certificate(*traced, layout) == certificate(X, g, layout)
    assert rank_premise(traced[0], layout) == rank_premise(X, layout)
    assert not recwarn.list


@pytest.mark.usefixtures("unannotated")
def test_batches_are_refused():
    layout, X = BlockLayout(6, 4, 2), gaussian(5, 6, seeded(0))
    batch = X.expand(3, 5, 6)
    for call in (
        lambda: rank_premise(batch, layout),
        lambda: certificate(batch, torch.zeros(3, 5, 4).double(), layout),
        lambda: premise_of(column_space(batch), layout),
        lambda: certificate_of(column_space(batch), torch.zeros(6, 4).double(), torch.tensor(0), layout),
    ):
        with pytest.raises(ValueError, match=r"X must be one matrix, got shape \(3, 5, 6\)"):
            call()
    with pytest.raises(ValueError, match=r"g must be one matrix, got shape \(3, 5, 4\)"):
        certificate(X, torch.zeros(3, 5, 4).double(), layout)


def test_a_space_of_another_size_is_named():
    layout, X = BlockLayout(6, 4, 2), gaussian(5, 8, seeded(0))
    for call in (
        lambda: premise_of(column_space(X), layout),
        lambda: rank_premise(X[:, :6], layout, column_space(X)),
        lambda: certificate_of(column_space(X), torch.zeros(6, 4).double(), torch.tensor(0), layout),
    ):
        with pytest.raises(ValueError, match="X must have 6 columns, got 8"):
            call()


def test_rank_zero_meets_the_premise():
    premise = rank_premise(torch.zeros(5, 6).double(), BlockLayout(6, 4, 2))
    assert (premise.rank, premise.block_ranks, premise.holds) == (0, (0, 0), True)
    assert premise.margin == pytest.approx(math.log10(4096))


def test_shapes_that_do_not_fit_are_named():
    layout, X = BlockLayout(6, 4, 2), torch.zeros(5, 6).double()
    with pytest.raises(ValueError, match="X must have 6 columns, got 5"):
        rank_premise(X[:, :5], layout)
    with pytest.raises(ValueError, match="X must have 6 columns, got 4"):
        certificate(X[:, :4], torch.zeros(5, 4).double(), layout)
    with pytest.raises(ValueError, match=r"g must have shape \(5, 4\), got \(5, 3\)"):
        certificate(X, torch.zeros(5, 3).double(), layout)
