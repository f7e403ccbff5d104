"""Closed forms of the linear problem: full fine-tuning, DiaBlo and LoRA, each with its minimum, minimiser and gap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.column_space import (
    ColumnSpace,
    column_space,
    group_svd,
    tensor_times_power,
    times_power,
    unit_scale,
    written_groups,
)
from diablo_theory.theory.problems import LinearProblem


@dataclass(frozen=True)
class Optimum:
    """What a set of updates can reach on a linear problem.

    Args:
        method: "full", "diablo" or "lora".
        minimum: The smallest loss, 1/2 ||X (W0 + dW) - T||_F^2 over the set; its unit is that of T squared, and it is
            infinite or zero where float64 cannot hold that square.
        gap: Its excess over full fine-tuning, at least 0, the same unit.
        relative_gap: The gap as a fraction of 1/2 ||P_X R||_F^2, what full fine-tuning captures; from 0 to 1, and 0
            where there is nothing to capture. Free of any scale.
        minimiser: A dW in the set that attains the minimum, shape (m1, m2), float64.
        num_parameters: Trainable entries.
    """

    method: str
    minimum: float
    gap: float
    relative_gap: float
    minimiser: Float[Tensor, "m1 m2"]
    num_parameters: int


def _optimum(
    method: str, problem: LinearProblem, space: ColumnSpace, missed: Tensor, dW: Tensor, num_parameters: int
) -> Optimum:
    """Put scales back: ``missed`` is what the fit leaves of the coordinates of P_X R, both at unit scale."""
    R, exponent = unit_scale(problem.R)
    captured = space.basis.T @ R
    full = 0.5 * float((R - space.basis @ captured).square().sum())
    gap = 0.5 * float(missed.square().sum())
    total = 0.5 * float(captured.square().sum())
    return Optimum(
        method=method,
        minimum=times_power(full + gap, 2 * exponent),
        gap=times_power(gap, 2 * exponent),
        relative_gap=gap / total if total > 0 else 0.0,
        minimiser=tensor_times_power(dW, exponent - space.exponent),
        num_parameters=num_parameters,
    )


def captured_coordinates(space: ColumnSpace, R: Float[Tensor, "b m2"]) -> Float[Tensor, "r m2"]:
    """Coordinates of P_X R in the basis of col X, with R at unit scale.

    Args:
        space: col X.
        R: Residual, shape (b, m2).

    Returns:
        Shape (r, m2), float64.
    """
    return space.basis.T @ unit_scale(R)[0]


def _pseudo_inverse_times(group: Tensor, rhs: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """``group^+ rhs`` and what of ``rhs`` lies outside col group."""
    U, sigma, Vh = group_svd(group, cutoff)
    inside = U.T @ rhs
    return Vh.T @ (inside / sigma[:, None]), rhs - U @ inside


def full_optimum(problem: LinearProblem, space: ColumnSpace | None = None) -> Optimum:
    """Full fine-tuning: minimum ``1/2 ||(I - P_X) R||^2`` at ``dW = X^+ R``.

    Args:
        problem: The linear problem.
        space: ``column_space(problem.X)``, if it is at hand; pass one with another rtol to move the rank decision.

    Returns:
        The optimum; its gap is 0 by definition.

    Source: theory.md, table "Linear problem", row "all"; ordinary least squares.
    """
    space = space or column_space(problem.X)
    target = captured_coordinates(space, problem.R)
    dW, _ = _pseudo_inverse_times(space.coordinates, target, space.cutoff)
    m1, m2 = problem.W0.shape
    return _optimum("full", problem, space, torch.zeros_like(target), dW, m1 * m2)


def diablo_optimum(problem: LinearProblem, space: ColumnSpace | None = None) -> Optimum:
    """DiaBlo: minimum ``1/2 sum_i ||(I - P_{X_i}) R_i||^2`` at ``D_i = X_i^+ R_i``, zeros outside the blocks.

    Args:
        problem: The linear problem.
        space: As in :func:`full_optimum`.

    Returns:
        The optimum, with gap ``1/2 sum_i ||(P_X - P_{X_i}) R_i||^2``.

    Source: arXiv 2506.03230v2, section 3 (the linear problem); theory.md, table "Linear problem", row "DiaBlo".
    """
    space, layout = space or column_space(problem.X), problem.layout
    target = captured_coordinates(space, problem.R)
    dW, missed = torch.zeros_like(problem.W0, dtype=torch.float64), torch.zeros_like(target)
    for i in written_groups(layout):
        rows, cols = layout.rows(i), layout.cols(i)
        group = space.group(layout, i)
        dW[rows, cols], missed[:, cols] = _pseudo_inverse_times(group, target[:, cols], space.cutoff)
    return _optimum("diablo", problem, space, missed, dW, layout.num_parameters)


def lora_optimum(problem: LinearProblem, rank: int, space: ColumnSpace | None = None) -> Optimum:
    """The best update of rank at most rho: full plus ``1/2 sum_{j>rho} sigma_j(P_X R)^2``, at ``X^+ (P_X R)_rho``.

    ``X dW`` runs over every matrix of rank at most rho with columns in col X, so this is Eckart-Young for P_X R.

    Args:
        problem: The linear problem.
        rank: rho, at least 0 (a budget below m1 + m2 parameters buys rank 0).
        space: As in :func:`full_optimum`.

    Returns:
        The optimum, with rho (m1 + m2) parameters.

    Raises:
        ValueError: If the rank is negative.

    Source: theory.md, table "Linear problem", row "LoRA"; Eckart and Young (1936).
    """
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    space = space or column_space(problem.X)
    target = captured_coordinates(space, problem.R)
    U, sigma, Vh = torch.linalg.svd(target, full_matrices=False)
    kept = U[:, :rank] @ (sigma[:rank, None] * Vh[:rank])
    dW, _ = _pseudo_inverse_times(space.coordinates, kept, space.cutoff)
    return _optimum("lora", problem, space, sigma[rank:, None], dW, rank * sum(problem.W0.shape))


def lora_rank_at_budget(layout: BlockLayout) -> int:
    """The largest LoRA rank with no more parameters than the blocks: ``floor(params / (m1 + m2))``; it may be 0.

    Source: theory.md, L4; the paper's tables compare at matched trainable parameters.
    """
    return layout.num_parameters // (layout.in_features + layout.out_features)


def worst_case_target(
    X: Float[Tensor, "b m1"], W0: Float[Tensor, "m1 m2"], layout: BlockLayout, space: ColumnSpace | None = None
) -> Float[Tensor, "b m2"]:
    """A target inside ``X W0 + col X`` that DiaBlo serves worst: each ``R_i`` lies where ``X_i`` reaches least.

    In coordinates of col X that direction is the last left singular vector of ``X_i``: outside col X_i if the
    premise of L2 fails for i, and the worst-conditioned direction inside it if the premise holds.

    Args:
        X: Inputs, shape (b, m1).
        W0: Frozen weight, shape (m1, m2).
        layout: The blocks.
        space: ``column_space(X)``, if at hand.

    Returns:
        T, shape (b, m2), the dtype of X; equal to X W0 where X has rank 0.

    Source: theory.md, L3.
    """
    space = space or column_space(X)
    R = torch.zeros(X.shape[0], layout.out_features, dtype=torch.float64)
    if space.rank:
        for i in written_groups(layout):
            group = torch.cat([space.group(layout, i), torch.zeros(space.rank, 1, dtype=torch.float64)], dim=1)
            U, _, _ = torch.linalg.svd(group, full_matrices=True)
            R[:, layout.cols(i)] = space.basis @ U[:, -1:]
    return X @ W0 + tensor_times_power(R, space.exponent).to(X.dtype)
