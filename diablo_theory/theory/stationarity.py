"""Certificates of stationarity: when a vanishing gradient of the blocks forces the full gradient to vanish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.column_space import (
    ColumnSpace,
    column_space,
    decide_rank,
    group_svd,
    times_power,
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
            negative where it fails; singular values under eps ||X||_2, and missing ones, count as eps ||X||_2. Where
            X has rank 0 the premise holds with the widest margin, log10(cutoff / (eps ||X||_2)).
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
        leak: ``(sum_i ||((I - P_{X_i}) X)^T g_{Y_i}||_F^2)^{1/2}``; zero up to rounding where the premise holds.
    """

    grad_full: float
    grad_blocks: float
    amplification: float
    leak: float

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
        ValueError: If X does not have the layout's number of columns.

    Source: arXiv 2506.03230v2, the rank condition of its sufficiency theorem; theory.md, L2 and S1.
    """
    _check_columns(X, layout)
    space = space or column_space(X)
    spectra = [_spectrum(space.group(layout, i)) for i in written_groups(layout)]
    ranks = tuple(decide_rank(sigma, space.cutoff, space.noise).rank for sigma in spectra)
    r = space.rank
    if r == 0:
        return RankPremise(0, ranks, True, space.decision.margin)
    weakest = min(float(sigma[r - 1]) if len(sigma) >= r else 0.0 for sigma in spectra)
    margin = math.log10(max(weakest, space.noise) / space.cutoff)
    return RankPremise(r, ranks, all(rank == r for rank in ranks), margin)


def _spectrum(group: Tensor) -> Tensor:
    return torch.linalg.svdvals(group) if group.numel() else group.new_zeros(0)


def amplifiers(X: Float[Tensor, "b m1"], layout: BlockLayout) -> list[Float[Tensor, "d m1"]]:
    """``C_i = X_i^+ X`` for every group with outputs: ``X = X_i C_i`` where rank X_i = rank X.

    Args:
        X: Inputs, shape (b, m1), any scale.
        layout: The blocks.

    Returns:
        One matrix a group, shape (rows of block i, m1), float64.

    Raises:
        ValueError: If X does not have the layout's number of columns.

    Source: theory.md, S1 and S3.
    """
    _check_columns(X, layout)
    scaled, cutoff = unit_scale(X)[0], column_space(X).cutoff
    matrices = []
    for i in written_groups(layout):
        U, sigma, Vh = group_svd(scaled[:, layout.rows(i)], cutoff)
        matrices.append(Vh.T @ ((U.T @ scaled) / sigma[:, None]))
    return matrices


def certificate(X: Float[Tensor, "b m1"], g: Float[Tensor, "b m2"], layout: BlockLayout) -> Certificate:
    """Both sides of S3 for one layer, at any point of any network.

    The truncated pseudo-inverse satisfies ``X_i^{+T} X_i^T = P_{X_i}`` for whatever P_{X_i} keeps, so the bound holds
    however the rank was decided; the decision only moves weight between amplification and leak.

    Args:
        X: The layer's inputs over the whole training set, shape (b, m1).
        g: The loss's gradient at the layer's output Y, shape (b, m2).
        layout: The blocks.

    Returns:
        The certificate, in the units of X times g.

    Raises:
        ValueError: If a shape does not fit the layout.

    Source: theory.md, S3.
    """
    _check_columns(X, layout)
    if g.shape[1] != layout.out_features:
        raise ValueError(f"g must have {layout.out_features} columns, got {g.shape[1]}")
    (scaled, x_exponent), (g, g_exponent) = unit_scale(X), unit_scale(g)
    cutoff, exponent = column_space(X).cutoff, x_exponent + g_exponent
    blocks, leak, amplification = 0.0, 0.0, 0.0
    for i in written_groups(layout):
        X_i, g_i = scaled[:, layout.rows(i)], g[:, layout.cols(i)]
        U, sigma, _ = group_svd(X_i, cutoff)
        if len(sigma):
            amplification = max(amplification, float(torch.linalg.matrix_norm((U.T @ scaled) / sigma[:, None], 2)))
        blocks += float((X_i.T @ g_i).square().sum())
        leak += float((scaled.T @ (g_i - U @ (U.T @ g_i))).square().sum())
    return Certificate(
        grad_full=times_power(float(torch.linalg.matrix_norm(scaled.T @ g)), exponent),
        grad_blocks=times_power(math.sqrt(blocks), exponent),
        amplification=amplification,
        leak=times_power(math.sqrt(leak), exponent),
    )


def _check_columns(X: Tensor, layout: BlockLayout) -> None:
    if X.shape[1] != layout.in_features:
        raise ValueError(f"X must have {layout.in_features} columns, got {X.shape[1]}")
