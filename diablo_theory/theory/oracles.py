"""Independent answers for the checks: least squares by LAPACK in float64 on the CPU, from the given tensors alone."""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.theory.arithmetic import wide
from diablo_theory.theory.column_space import written_groups
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.tolerances import tolerance


def widened(problem: LinearProblem) -> LinearProblem:
    """The same problem in float64 on the CPU, its tensors as they were given."""
    return dataclasses.replace(
        problem,
        X=wide(problem.X),
        W0=wide(problem.W0),
        T=wide(problem.T),
        truth=None if problem.truth is None else wide(problem.truth),
    )


def projection(X: Float[Tensor, "b m1"], R: Float[Tensor, "b c"], cutoff: float | None = None) -> Float[Tensor, "b c"]:
    """``P_X R`` by LAPACK's least squares (gelsd).

    Not gelsy: in torch 2.13 two calls on the same numbers differ in the last digits.

    Args:
        X: Shape (b, m1), float32 or float64; either size may be zero.
        R: Shape (b, c).
        cutoff: Singular values at or below it count as zero; by default the "rank" tolerance of X's dtype times the
            largest one.

    Returns:
        Shape (b, c), float64, on the CPU.
    """
    X, R, relative = wide(X), wide(R), tolerance("rank", X.dtype).value
    largest = float(torch.linalg.matrix_norm(X, 2)) if X.numel() else 0.0
    if largest == 0:
        return torch.zeros_like(R)
    rcond = relative if cutoff is None else min(cutoff / largest, 1.0)
    solution: Tensor = torch.linalg.lstsq(X, R, rcond=rcond, driver="gelsd").solution
    return X @ solution


def blockwise_projection(problem: LinearProblem) -> Float[Tensor, "b m2"]:
    """DiaBlo's best fit ``(P_{X_1} R_1 .. P_{X_N} R_N)``: masked least squares, one for each group of outputs.

    Returns:
        Shape (b, m2), float64, on the CPU; zero for outputs that no block writes.
    """
    X, fit = problem.X, torch.zeros_like(wide(problem.R))
    cutoff = tolerance("rank", X.dtype).value * float(torch.linalg.matrix_norm(wide(X), 2))
    for i in written_groups(problem.layout):
        rows, cols = problem.layout.rows(i), problem.layout.cols(i)
        fit[:, cols] = projection(X[:, rows], problem.R[:, cols], cutoff)
    return fit


def relative_excess(problem: LinearProblem, fitted: Float[Tensor, "b m2"]) -> float:
    """What a fit loses against full fine-tuning: ``||F - P_X R||^2 / ||P_X R||^2``.

    Where nothing is captured by full fine-tuning it is ``||F||^2 / ||R||^2``, and 0 where F and R are both zero.

    Args:
        problem: The linear problem.
        fitted: F, such as X dW, shape (b, m2).

    Returns:
        From 0 up, free of scale.
    """
    best = projection(problem.X, problem.R)
    total = float(best.square().sum()) or float(wide(problem.R).square().sum())
    lost = float((wide(fitted) - best).square().sum())
    return lost / total if total > 0 else (math.inf if lost else 0.0)


def dense_fit(problem: LinearProblem, dW: Float[Tensor, "m1 m2"]) -> Float[Tensor, "b m2"]:
    """X dW as one dense product, shape (b, m2), float64."""
    return wide(problem.X) @ wide(dW)


def block_fit(problem: LinearProblem, dW: Float[Tensor, "m1 m2"]) -> Float[Tensor, "b m2"]:
    """X dW through the block product that the adapter itself uses, shape (b, m2), float64.

    Entries of dW outside the blocks would not take part: infinity where there are any.
    """
    update, layout = wide(dW), problem.layout
    blocks, tail = layout.gather(update)
    fit: Tensor = ops.block_product(wide(problem.X), blocks, tail, layout)
    return fit if torch.equal(layout.scatter(blocks, tail), update) else torch.full_like(fit, math.inf)


def relative_tails(problem: LinearProblem) -> list[float]:
    """``sum_{j>rho} sigma_j(P_X R)^2 / ||P_X R||^2`` for rho = 0, 1, .., from the projection's own SVD."""
    squares = torch.linalg.svdvals(projection(problem.X, problem.R)).square()
    tails = squares.flip(0).cumsum(0).flip(0) / squares.sum()
    return [*tails.tolist(), 0.0]
