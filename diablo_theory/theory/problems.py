"""Seeded linear least-squares problems of a chosen rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError
from diablo_theory.theory.arithmetic import gaussian, require_like, require_matrix


@dataclass(frozen=True)
class LinearProblem:
    """``min over dW in S of 1/2 ||X (W0 + dW) - T||_F^2``.

    Args:
        X: Inputs, shape (b, m1), float32 or float64, finite.
        W0: The frozen weight, shape (m1, m2), the dtype of X.
        T: The target, shape (b, m2), the dtype of X.
        layout: The blocks that DiaBlo trains, for an m1 x m2 matrix.

    Raises:
        ValueError: If a shape or a dtype does not fit.
        NonFiniteError: If X, W0, T or the residual T - X W0 holds a NaN or an infinity.

    Source: arXiv 2506.03230v2, section 3; its linear problem in the notation Y = X W.
    """

    X: Float[Tensor, "b m1"]
    W0: Float[Tensor, "m1 m2"]
    T: Float[Tensor, "b m2"]
    layout: BlockLayout

    def __post_init__(self) -> None:
        require_matrix("X", self.X)
        b, m1, m2 = self.X.shape[0], self.layout.in_features, self.layout.out_features
        for name, value, shape in (
            ("X", self.X, (b, m1)),
            ("W0", self.W0, (m1, m2)),
            ("T", self.T, (b, m2)),
        ):
            require_like(name, value, shape, self.X)
        if not bool(torch.isfinite(self.R).all()):
            raise NonFiniteError("R = T - X W0 overflows; scale X or W0 down")

    @property
    def R(self) -> Float[Tensor, "b m2"]:  # noqa: N802 - the paper's letter
        """The residual T - X W0 that the update is to explain."""
        return self.T - self.X @ self.W0


def low_rank_inputs(rows: int, cols: int, rank: int, generator: torch.Generator) -> Float[Tensor, "rows cols"]:
    """``X = Z V`` of an exact rank: Z with orthonormal columns (the Q of a Gaussian matrix), V Gaussian.

    Gaussian Z would only multiply the conditioning: every statement is about col X and the row geometry, which is V's.

    Args:
        rows: b, at least 1.
        cols: m1, at least 1.
        rank: From 0 to min(rows, cols).
        generator: Where the draws come from.

    Returns:
        Shape (rows, cols), float64, entries of order one.

    Raises:
        ValueError: If the rank is out of range.
    """
    if not 0 <= rank <= min(rows, cols):
        raise ValueError(f"rank must be from 0 to min(rows, cols) = {min(rows, cols)}, got {rank}")
    Z, _ = torch.linalg.qr(gaussian(rows, rank, generator)) if rank else (torch.zeros(rows, 0).double(), None)
    X: Tensor = Z @ gaussian(rank, cols, generator)
    return X * math.sqrt(rows / max(rank, 1))


def linear_problem(
    layout: BlockLayout,
    rows: int,
    rank: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> LinearProblem:
    """A generic problem: X of an exact rank, W0 and T with independent normal entries.

    Args:
        layout: The blocks.
        rows: b, at least 1.
        rank: Rank of X.
        generator: Where the draws come from.
        dtype: float32 or float64.
        scale: Multiplies X and T (W0 stays of order one).

    Returns:
        The problem; every shape that a layout allows, ragged ones too.
    """
    X = low_rank_inputs(rows, layout.in_features, rank, generator) * scale
    W0 = gaussian(layout.in_features, layout.out_features, generator) / layout.in_features**0.5
    T = gaussian(rows, layout.out_features, generator) * scale
    return LinearProblem(X.to(dtype), W0.to(dtype), T.to(dtype), layout)
