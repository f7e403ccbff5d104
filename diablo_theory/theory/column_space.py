"""Column spaces of an input and of its column groups: scaled SVDs with one explicit rank decision for all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.tolerances import tolerance


@dataclass(frozen=True)
class RankDecision:
    """A numerical rank and how clear the decision was.

    Args:
        rank: Singular values above the cutoff.
        margin: Decades (log10) between the cutoff and the nearest singular value on either side; values below
            eps of the scale are rounding noise and count as eps. At least 0; near 0 the rank is a coin's toss.
    """

    rank: int
    margin: float


@dataclass(frozen=True)
class ColumnSpace:
    """``X = 2^exponent U Y`` up to the cutoff: an orthonormal basis of col X, and coordinates in it.

    Projections onto any ``col X_i`` are taken among the coordinates, so ``col X_i`` lies in ``col X`` by construction
    and gaps are never negative.

    Args:
        basis: U, shape (b, r), float64, orthonormal columns.
        coordinates: Y, shape (r, m1), float64, of order one whatever the scale of X.
        exponent: The power of two that was taken out of X, exactly.
        decision: The rank r with its margin.
        cutoff: Singular values of Y, and of its column groups, at or below this count as zero.
        noise: The level below which they are rounding noise: eps of the largest one.
    """

    basis: Float[Tensor, "b r"]
    coordinates: Float[Tensor, "r m1"]
    exponent: int
    decision: RankDecision
    cutoff: float
    noise: float

    @property
    def rank(self) -> int:
        """r, the rank of X."""
        return self.decision.rank

    def group(self, layout: BlockLayout, i: int) -> Float[Tensor, "r d1"]:
        """Coordinates of ``X_i``, shape (r, rows of block i)."""
        return self.coordinates[:, layout.rows(i)]


def unit_scale(matrix: Float[Tensor, "n m"]) -> tuple[Float[Tensor, "n m"], int]:
    """Take the power of two out of a matrix, exactly, so that squares of its entries neither overflow nor vanish.

    Args:
        matrix: Shape (n, m), finite, any scale.

    Returns:
        The float64 matrix with its largest magnitude in [1, 2) (or all zeros), and the exponent taken out.
    """
    wide = matrix.double()
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    if largest == 0.0:
        return wide, 0
    exponent = math.frexp(largest)[1] - 1
    half = exponent // 2
    return wide / math.ldexp(1.0, half) / math.ldexp(1.0, exponent - half), exponent


def times_power(value: float, exponent: int) -> float:
    """``value 2^exponent``; infinity, not an error, where float64 cannot hold it."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def tensor_times_power(matrix: Float[Tensor, "n m"], exponent: int) -> Float[Tensor, "n m"]:
    """The same for a matrix, shape (n, m), in two steps so that the power itself never overflows."""
    half = exponent // 2
    return matrix * times_power(1.0, half) * times_power(1.0, exponent - half)


def decide_rank(singular_values: Float[Tensor, " k"], cutoff: float, noise: float) -> RankDecision:
    """Count the singular values above a cutoff and measure how clear that is.

    Args:
        singular_values: Shape (k,), descending, float64.
        cutoff: Values at or below it count as zero; at least ``noise``.
        noise: Values below it are taken as it: rounding has no smaller ones.

    Returns:
        The rank with its margin in decades; a zero matrix has the widest margin there is, log10(cutoff / noise).
    """
    rank = int((singular_values > cutoff).sum())
    if cutoff == 0.0:
        return RankDecision(0, math.log10(4096))
    above = [math.log10(float(value) / cutoff) for value in singular_values[:rank][-1:]]
    below = [math.log10(cutoff / max(float(value), noise)) for value in singular_values[rank:][:1]]
    return RankDecision(rank, min(above + below, default=math.log10(cutoff / noise)))


def column_space(X: Float[Tensor, "b m1"], rtol: float | None = None) -> ColumnSpace:
    """Basis and coordinates of col X from one SVD, invariant to the scale of X.

    Args:
        X: Inputs, shape (b, m1), float32 or float64; the work is done in float64.
        rtol: Singular values at or below ``rtol`` times the largest count as zero, in X and, at the same absolute
            level, in every column group, so that no group outranks X. By default the "rank" tolerance of X's dtype.

    Returns:
        The space, with the rank decision and its margin.

    Raises:
        NonFiniteError: If X holds a NaN or an infinity.
        ValueError: If rtol is not between the dtype's eps and 1.
    """
    if not bool(torch.isfinite(X).all()):
        raise NonFiniteError("X holds a NaN or an infinity; remove such rows before analysing it")
    eps = torch.finfo(X.dtype).eps
    relative = tolerance("rank", X.dtype).value if rtol is None else rtol
    if not eps <= relative < 1:
        raise ValueError(f"rtol must be at least eps = {eps:.3g} of {X.dtype} and below 1, got {relative}")
    scaled, exponent = unit_scale(X)
    if X.shape[0] == 0:
        scaled = scaled.new_zeros(1, X.shape[1])
    U, sigma, Vh = torch.linalg.svd(scaled, full_matrices=False)
    largest = float(sigma[0])
    cutoff, noise = relative * largest, eps * largest
    decision = decide_rank(sigma, cutoff, noise)
    r = decision.rank
    return ColumnSpace(U[: X.shape[0], :r], sigma[:r, None] * Vh[:r], exponent, decision, cutoff, noise)


def group_svd(
    group: Float[Tensor, "n d1"], cutoff: float
) -> tuple[Float[Tensor, "n k"], Float[Tensor, " k"], Float[Tensor, "k d1"]]:
    """The SVD of one column group without the singular values at or below an absolute cutoff.

    Args:
        group: Shape (n, d1), float64; either size may be zero.
        cutoff: Absolute.

    Returns:
        U (n, k), sigma (k,) and V^T (k, d1), with k the group's rank.
    """
    n, d1 = group.shape
    if min(n, d1) == 0:
        return group.new_zeros(n, 0), group.new_zeros(0), group.new_zeros(0, d1)
    U, sigma, Vh = torch.linalg.svd(group, full_matrices=False)
    k = int((sigma > cutoff).sum())
    return U[:, :k], sigma[:k], Vh[:k]


def written_groups(layout: BlockLayout) -> list[int]:
    """Groups that hold outputs: the only ones that a statement about ``R_i`` or ``g_{Y_i}`` is about.

    With ragged sizes a group may have outputs but no inputs (its outputs cannot be trained) or the reverse.
    """
    return [i for i in range(layout.count) if layout.cols(i).stop > layout.cols(i).start]
