"""Certificates of stationarity: when a vanishing gradient of the blocks forces the full gradient to vanish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import require_layout, require_like
from diablo_theory.theory.column_space import (
    ColumnSpace,
    column_space,
    times_power,
    truncated_svd,
    unit_scale,
    written_groups,
)


@dataclass(frozen=True)
class RankPremise:
    """Whether ``rank X_i = rank X`` for every i that holds outputs: the premise of L2 and S1.

    Args:
        rank: rank X.
        block_ranks: rank X_i, one for each group with outputs.
        holds: Whether all of them equal rank X.
        margin: ``min_i log10(sigma_r(X_i) / cutoff)`` with r = rank X, in decades: positive where the premise holds,
            negative where it fails; singular values under the noise (see :class:`ColumnSpace`), and missing ones,
            count as the noise. Where X has rank 0 the premise holds with the widest margin, log10(cutoff / noise).
    """

    rank: int
    block_ranks: tuple[int, ...]
    holds: bool
    margin: float


@dataclass(frozen=True)
class Certificate:
    """The two sides of S3 for one layer: ``grad_full <= amplification * grad_blocks + leak``.

    Args:
        grad_full: ``||X^T g_Y||_F``.
        grad_blocks: ``||grad D||_F``, over the blocks.
        amplification: ``max_i ||C_i||_2`` with ``C_i = X_i^+ X``.
        leak: ``(sum_i ||(X - X_i C_i)^T g_{Y_i}||_F^2)^{1/2}``, where ``X - X_i C_i = (I - P_{X_i}) X``; where the
            premise holds, zero up to rounding and to what lies below the rank decision's cutoff.
        tightness: ``grad_full`` over the bound, at most 1 up to rounding; 1 where both are zero. Free of units.
        leak_share: ``leak`` over ``grad_full``, 0 where both are zero. Free of units.
    """

    grad_full: float
    grad_blocks: float
    amplification: float
    leak: float
    tightness: float
    leak_share: float

    @property
    def bound(self) -> float:
        """The right-hand side of S3."""
        return self.amplification * self.grad_blocks + self.leak


def rank_premise(X: Float[Tensor, "b m1"], layout: BlockLayout, space: ColumnSpace | None = None) -> RankPremise:
    """Decide ``rank X_i = rank X`` for every i that holds outputs, with one cutoff for all.

    Args:
        X: Inputs, shape (b, m1).
        layout: The blocks.
        space: ``column_space(X)``, if it is at hand.

    Returns:
        The premise with its ranks and margin.

    Raises:
        ValueError: If X is not one matrix with the layout's number of columns.

    Source: arXiv 2506.03230v2, the rank condition of its sufficiency theorem; theory.md, L2 and S1.
    """
    _require_one(X, layout)
    return premise_of(space or column_space(X), layout)


def premise_of(space: ColumnSpace, layout: BlockLayout) -> RankPremise:
    """The same from the coordinates of one X, which may come from sums over tokens alone."""
    _require_one(space.coordinates, layout)
    spectra = [_spectrum(space.group(layout, i)) for i in written_groups(layout)]
    cutoff, noise, r = float(space.cutoff), float(space.noise), int(space.rank)
    ranks = tuple(int((sigma > cutoff).sum()) for sigma in spectra)
    if r == 0:
        return RankPremise(0, ranks, True, float(space.decision.margin))
    weakest = min(float(sigma[r - 1]) if len(sigma) >= r else 0.0 for sigma in spectra)
    return RankPremise(r, ranks, all(rank == r for rank in ranks), math.log10(max(weakest, noise) / cutoff))


def _spectrum(group: Tensor) -> Tensor:
    return torch.linalg.svdvals(group) if group.numel() else group.new_zeros(0)


def certificate(X: Float[Tensor, "b m1"], g: Float[Tensor, "b m2"], layout: BlockLayout) -> Certificate:
    """Both sides of S3 for one layer, at any point of any network.

    Args:
        X: The layer's inputs over the whole training set, shape (b, m1), float32 or float64.
        g: The loss's gradient at the layer's output Y, shape (b, m2), the dtype of X.
        layout: The blocks.

    Returns:
        The certificate, in the units of X times g.

    Raises:
        ValueError: If a shape does not fit the layout.
        NonFiniteError: If X or g holds a NaN or an infinity.

    Source: theory.md, S3.
    """
    _require_one(X, layout)
    require_like("g", g, (X.shape[0], layout.out_features), X)
    if g.ndim != 2:
        raise ValueError(f"g must be one matrix, got shape {tuple(g.shape)}")
    space = column_space(X)
    scaled, exponent = unit_scale(g)
    gradient = unit_scale(X)[0].mT @ scaled
    return certificate_of(space, gradient, space.exponent + exponent, layout)


def certificate_of(
    space: ColumnSpace, gradient: Float[Tensor, "m1 m2"], exponent: Int[Tensor, ""], layout: BlockLayout
) -> Certificate:
    """The same from the coordinates of X and from ``X^T g_Y``, which may come from sums over tokens alone.

    ``X^T g_{Y_i} = C_i^T grad D_i + (X - X_i C_i)^T g_{Y_i}`` is true of any C_i, so the bound holds of the whole
    gradient however the rank was decided, and however far C_i is rounded: both only move weight between amplification
    and leak.

    Args:
        space: Of one X.
        gradient: ``2^-exponent X^T g_Y``, or its negative, shape (m1, m2), float64.
        exponent: The power of two that was taken out of it.
        layout: The blocks.

    Returns:
        The certificate, in the units of X times g.

    Raises:
        ValueError: If the layout is not of the gradient's size, or the space is a batch or of another size.

    Source: theory.md, S3 and "At scale, from sums alone".
    """
    require_layout(layout, *gradient.shape)
    _require_one(space.coordinates, layout)
    blocks = leak = amplification = gradient.new_zeros(())
    for i in written_groups(layout):
        cols = layout.cols(i)
        own = gradient[layout.rows(i), cols]
        C_i = truncated_svd(space.group(layout, i), space.cutoff).pinv_times(space.coordinates)
        if C_i.numel():
            amplification = torch.maximum(amplification, torch.linalg.matrix_norm(C_i, 2))
        blocks = blocks + own.square().sum()
        leak = leak + (gradient[:, cols] - C_i.mT @ own).square().sum()
    full, blocks, leak = torch.linalg.matrix_norm(gradient), blocks.sqrt(), leak.sqrt()
    bound = amplification * blocks + leak
    return Certificate(
        grad_full=float(times_power(full, exponent)),
        grad_blocks=float(times_power(blocks, exponent)),
        amplification=float(amplification),
        leak=float(times_power(leak, exponent)),
        tightness=float(full / bound) if bound > 0 else 1.0,
        leak_share=float(leak / full) if full > 0 else 0.0,
    )


def _require_one(X: Tensor, layout: BlockLayout) -> None:
    if X.ndim != 2:
        raise ValueError(f"X must be one matrix, got shape {tuple(X.shape)}")
    if X.shape[-1] != layout.in_features:
        raise ValueError(f"X must have {layout.in_features} columns, got {X.shape[-1]}")
