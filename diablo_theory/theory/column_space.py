"""Column spaces of an input and of its column groups: scaled SVDs with one explicit rank decision for all.

Everything takes leading batch dimensions, as torch.linalg does. Matrices of one batch may differ in rank, so nothing
is cut to its rank: what is below the cutoff is set to zero instead.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import require_matrix
from diablo_theory.theory.tolerances import tolerance


@dataclass(frozen=True)
class RankDecision:
    """Numerical ranks and how clear the decisions were.

    Args:
        rank: Singular values above the cutoff, shape (...).
        margin: Decades (log10) between the cutoff and the nearest singular value on either side; values below the
            noise (eps of the largest, or its root where sums of squares were decomposed) count as the noise. At least
            0; near 0 the rank is a coin's toss.
    """

    rank: Int[Tensor, "*batch"]
    margin: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class ColumnSpace:
    """``X = 2^exponent U Y`` up to the cutoff: an orthonormal basis of col X, and coordinates in it.

    Projections onto any ``col X_i`` are taken among the coordinates, so ``col X_i`` lies in ``col X`` by construction
    and gaps are never negative.

    Args:
        coordinates: Y, shape (..., k, m1), float64, of order one whatever the scale of X; its rows past the rank are
            zero.
        exponent: The power of two that was taken out of X, exactly, shape (...).
        decision: The rank with its margin.
        cutoff: Singular values of Y, and of its column groups, at or below this count as zero, shape (...).
        noise: The level below which they are rounding noise, shape (...).
        basis: U, shape (..., b, k), float64; orthonormal columns, zero past the rank. None where only sums over the
            rows of X are known.
    """

    coordinates: Float[Tensor, "*batch k m1"]
    exponent: Int[Tensor, "*batch"]
    decision: RankDecision
    cutoff: Float[Tensor, "*batch"]
    noise: Float[Tensor, "*batch"]
    basis: Float[Tensor, "*batch b k"] | None = None

    @property
    def rank(self) -> Int[Tensor, "*batch"]:
        """The rank of X, shape (...)."""
        return self.decision.rank

    def cut(self) -> ColumnSpace:
        """The same space of one X without the rows, and basis columns, past its rank: smaller, and as exact."""
        r = int(self.rank)
        basis = None if self.basis is None else self.basis[:, :r]
        return dataclasses.replace(self, coordinates=self.coordinates[:r], basis=basis)

    def group(self, layout: BlockLayout, i: int) -> Float[Tensor, "*batch k d1"]:
        """Coordinates of ``X_i``, shape (..., k, rows of block i)."""
        return self.coordinates[..., layout.rows(i)]


@dataclass(frozen=True)
class TruncatedSVD:
    """An SVD in which singular values at or below a cutoff are zero, and so are their left vectors.

    Args:
        U: Shape (..., n, k).
        sigma: Shape (..., k), descending.
        Vh: Shape (..., k, m).
    """

    U: Float[Tensor, "*batch n k"]
    sigma: Float[Tensor, "*batch k"]
    Vh: Float[Tensor, "*batch k m"]

    def outside(self, rhs: Float[Tensor, "... n c"]) -> Float[Tensor, "... n c"]:
        """What of ``rhs`` the column space does not hold."""
        return rhs - self.U @ (self.U.mT @ rhs)

    def pinv_times(self, rhs: Float[Tensor, "... n c"]) -> Float[Tensor, "... m c"]:
        """The pseudo-inverse times ``rhs``: the smallest least-squares solution."""
        inverse = torch.where(self.sigma > 0, 1 / self.sigma, 0.0)
        return self.Vh.mT @ (inverse[..., None] * (self.U.mT @ rhs))


def truncated_svd(matrix: Float[Tensor, "*batch n m"], cutoff: Float[Tensor, "*batch"]) -> TruncatedSVD:
    """The SVD without the singular values at or below an absolute cutoff.

    Args:
        matrix: Shape (..., n, m), float64; either size may be zero.
        cutoff: Absolute, shape (...).

    Returns:
        Its factors, with k = min(n, m).
    """
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = sigma > cutoff[..., None]
    return TruncatedSVD(U * kept[..., None, :], sigma * kept, Vh)


def times_power(value: Float[Tensor, "*shape"], exponent: Int[Tensor, ...]) -> Float[Tensor, "*shape"]:
    """``value 2^exponent``, exact where float64 can hold it, infinity or zero where it cannot.

    Args:
        value: Any shape.
        exponent: Broadcasts against it; from -3000 to 3000.
    """
    parts: tuple[Tensor, ...] = (exponent,)
    if exponent.numel() and int(exponent.abs().max()) > 1022:  # 2^exponent itself may not be a float64
        parts = (exponent // 3, (exponent + 1) // 3, (exponent + 2) // 3)
    for part in parts:
        value = value * ((part + 1023) << 52).view(torch.float64)  # the bits of 2^part
    return value


def unit_scale(matrix: Float[Tensor, "*batch n m"]) -> tuple[Float[Tensor, "*batch n m"], Int[Tensor, "*batch"]]:
    """Take the power of two out of a matrix, exactly, so that squares of its entries neither overflow nor vanish.

    Closed forms are values: no gradient flows back through them, and here is where it stops.

    Args:
        matrix: Shape (..., n, m), finite, any scale.

    Returns:
        The float64 matrix with its largest magnitude in [1, 2) (or all zeros), and the exponent taken out,
        shape (...).
    """
    matrix = matrix.detach()
    largest = largest_magnitude(matrix).double()
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent.long() - 1, 0)
    return times_power(matrix.double(), -exponent[..., None, None]), exponent


def largest_magnitude(matrix: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch"]:
    """The largest absolute entry, shape (...), 0 of an empty matrix; NaN where an entry is NaN."""
    if 0 in matrix.shape[-2:]:
        return matrix.new_zeros(matrix.shape[:-2])
    largest: Tensor = torch.linalg.vector_norm(matrix, math.inf, (-2, -1))
    return largest


def decide_rank(
    sigma: Float[Tensor, "*batch k"], cutoff: Float[Tensor, "*batch"], noise: Float[Tensor, "*batch"], widest: float
) -> RankDecision:
    """Count the singular values above a cutoff and measure how clear that is.

    Args:
        sigma: Singular values, shape (..., k), float64.
        cutoff: Values at or below it count as zero; at least ``noise``.
        noise: Values below it are taken as it: rounding has no smaller ones.
        widest: The margin where there is nothing to decide: of a zero or an empty matrix.

    Returns:
        The ranks with their margins in decades.
    """
    rank = (sigma > cutoff[..., None]).sum(-1)
    if sigma.shape[-1] == 0:
        return RankDecision(rank, torch.full_like(cutoff, widest))
    decades = torch.log10(torch.maximum(sigma, noise[..., None]) / cutoff[..., None]).abs().amin(-1)
    return RankDecision(rank, torch.where(cutoff > 0, decades, widest))


def column_space(X: Float[Tensor, "*batch b m1"], rtol: float | None = None) -> ColumnSpace:
    """Basis and coordinates of col X from one SVD, invariant to the scale of X.

    Args:
        X: Inputs, shape (..., b, m1), float32 or float64; the work is done in float64.
        rtol: Singular values at or below ``rtol`` times the largest count as zero, in X and, at the same absolute
            level, in every column group, so that no group outranks X. By default the "rank" tolerance of X's dtype.

    Returns:
        The space, with the rank decision and its margin.

    Raises:
        NonFiniteError: If X holds a NaN or an infinity.
        ValueError: If X is not a float32 or float64 matrix, or rtol is not between the dtype's eps and 1.
    """
    require_matrix("X", X)
    eps = torch.finfo(X.dtype).eps
    relative = tolerance("rank", X.dtype).value if rtol is None else rtol
    if not eps <= relative < 1:
        raise ValueError(f"rtol must be at least eps = {eps:.3g} of {X.dtype} and below 1, got {relative}")
    scaled, exponent = unit_scale(X)
    U, sigma, Vh = torch.linalg.svd(scaled, full_matrices=False)
    largest = sigma.amax(-1) if sigma.shape[-1] else sigma.sum(-1)
    cutoff, noise = relative * largest, eps * largest
    kept = sigma > cutoff[..., None]
    return ColumnSpace(
        coordinates=(sigma * kept)[..., None] * Vh,
        exponent=exponent,
        decision=decide_rank(sigma, cutoff, noise, math.log10(relative / eps)),
        cutoff=cutoff,
        noise=noise,
        basis=U * kept[..., None, :],
    )


def written_groups(layout: BlockLayout) -> list[int]:
    """Groups that hold outputs: the only ones that a statement about ``R_i`` or ``g_{Y_i}`` is about.

    With ragged sizes a group may have outputs but no inputs (its outputs cannot be trained) or the reverse.
    """
    return [i for i in range(layout.count) if layout.cols(i).stop > layout.cols(i).start]
