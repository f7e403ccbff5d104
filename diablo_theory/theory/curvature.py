"""Curvature of the linear problem in each method's parameters, and the rate of gradient descent that follows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.theory.column_space import ColumnSpace, column_space, times_power, truncated_svd, written_groups
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import LinearProblem


def derivatives(
    method: Parametrisation, theta: Float[Tensor, " p"]
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p p"]]:
    """The loss's gradient, shape (p,), and Hessian, shape (p, p), by autograd row by row."""
    leaf = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(method.loss(leaf), leaf, create_graph=True)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient]
    return gradient.detach(), torch.stack(rows)


def full_curvatures(problem: LinearProblem) -> Float[Tensor, " n"]:
    """Nonzero eigenvalues of the loss's Hessian in all of dW: ``sigma_j(X)^2``, each m2 times, descending."""
    space = column_space(problem.X)
    return _descending([_squares(space, space.coordinates, 1.0, problem.W0.shape[-1])])


def diablo_curvatures(problem: LinearProblem) -> Float[Tensor, " n"]:
    """Nonzero eigenvalues of the loss's Hessian in D: ``sigma_j(X_i)^2``, each as often as block i has columns.

    Args:
        problem: The linear problem.

    Returns:
        Descending, float64, in the unit of X squared.

    Source: theory.md, L1: the Hessian is block-diagonal, ``X_i^T X_i`` for each output.
    """
    space, layout, parts = column_space(problem.X), problem.layout, []
    for i in written_groups(layout):
        cols = layout.cols(i)
        parts.append(_squares(space, space.group(layout, i), 1.0, cols.stop - cols.start))
    return _descending(parts)


def frozen_curvatures(problem: LinearProblem, A: Float[Tensor, "m1 rho"]) -> Float[Tensor, " n"]:
    """Nonzero eigenvalues of the loss's Hessian in B with A frozen: ``sigma_j(X A)^2``, each m2 times, descending."""
    space = column_space(problem.X)
    norm = float(torch.linalg.matrix_norm(A, 2))
    return _descending([_squares(space, space.coordinates @ A.to(problem.X.device), norm, problem.W0.shape[-1])])


def lora_curvatures(method: Parametrisation, minimum: Float[Tensor, " p"], count: int) -> Float[Tensor, " n"]:
    """Nonzero eigenvalues of the loss's Hessian in (A, B) at a minimum of LoRA.

    They are as many as the rank-rho matrices among the outputs have dimensions, ``rho (rank X + m2 - rho)`` where
    P_X R has rank rho or more. The others vanish: changes (A G, G^-1 B) that leave the product alone, and changes of
    A that X does not see.

    Args:
        method: LoRA on one problem.
        minimum: Its parameters there, shape (p,).
        count: How many are not zero.

    Returns:
        Descending, shape (count,).
    """
    eigenvalues: Tensor = torch.linalg.eigvalsh(derivatives(method, minimum)[1])
    return eigenvalues.flip(0)[:count]


def contraction(curvatures: Float[Tensor, " n"], step: float) -> float:
    """``max_j |1 - step lambda_j|``: the factor by which gradient descent shrinks its slowest mode in each step.

    Exact on a quadratic loss; for LoRA the limit near a minimum. Above 1 it is the factor of divergence.

    Args:
        curvatures: The Hessian's nonzero eigenvalues, at least one.
        step: The step size.

    Source: theory.md, L1; the classical rate of gradient descent.
    """
    return float((1 - step * curvatures).abs().max())


def _squares(space: ColumnSpace, design: Tensor, norm: float, times: int) -> Tensor:
    sigma = truncated_svd(design, space.cutoff * norm).sigma
    squares: Tensor = times_power(sigma[sigma > 0].square(), 2 * space.exponent)
    return squares.repeat(times)


def _descending(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).sort(descending=True).values
