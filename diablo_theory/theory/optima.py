"""Closed forms of the linear problem: full fine-tuning, DiaBlo, LoRA and LoRA with a frozen A.

Each has its minimum, a minimiser, its gap and its parameters. All take a reduced problem, so that several methods
share one decomposition of X and one rank decision, and all take batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import (
    require_broadcast,
    require_device,
    require_integer,
    require_layout,
    require_matrix,
)
from diablo_theory.theory.column_space import (
    ColumnSpace,
    TruncatedSVD,
    times_power,
    truncated_svd,
    unit_scale,
    written_groups,
)
from diablo_theory.theory.reduction import ReducedProblem
from diablo_theory.theory.tolerances import tolerance


@dataclass(frozen=True)
class Optimum:
    """What a set of updates can reach on a linear problem, or on each of a batch.

    Args:
        method: "full", "diablo", "lora", "lora-frozen-a" or "lora-tangent".
        minimum: The smallest loss, 1/2 ||X (W0 + dW) - T||_F^2 over the set, shape (...); its unit is that of T
            squared, and it is infinite or zero where float64 cannot hold that square.
        gap: Its excess over full fine-tuning, at least 0, the same unit and shape.
        relative_gap: The gap as a fraction of 1/2 ||P_X R||_F^2, what full fine-tuning captures; from 0 to 1, and 0
            where there is nothing to capture. Free of any scale. ``1 - relative_gap`` is the capture ratio.
        minimiser: A dW in the set that attains the minimum, shape (..., m1, m2), float64, with entries that are
            infinite or zero where float64 cannot hold them; None if not asked for.
        num_parameters: Trainable entries.
    """

    method: str
    minimum: Float[Tensor, ...]
    gap: Float[Tensor, ...]
    relative_gap: Float[Tensor, ...]
    minimiser: Float[Tensor, "... m1 m2"] | None
    num_parameters: int

    @property
    def update(self) -> Float[Tensor, "... m1 m2"]:
        """The minimiser, shape (..., m1, m2).

        Raises:
            ValueError: If the optimum was computed without one.
        """
        if self.minimiser is None:
            raise ValueError(f"this {self.method} optimum was computed with minimiser=False")
        return self.minimiser


def _optimum(method: str, problem: ReducedProblem, missed: Tensor, dW: Tensor | None, num_parameters: int) -> Optimum:
    """Put scales back: ``missed`` is what the fit leaves of the coordinates of P_X R, squared and summed."""
    return Optimum(
        method=method,
        minimum=problem.loss_of(problem.outside + missed),
        gap=problem.loss_of(missed),
        relative_gap=problem.share(missed),
        minimiser=None if dW is None else problem.update_of(dW),
        num_parameters=num_parameters,
    )


def _square(matrix: Tensor) -> Tensor:
    return matrix.square().sum((-2, -1))


def _sizes(problem: ReducedProblem) -> tuple[int, int]:
    return problem.space.coordinates.shape[-1], problem.target.shape[-1]


def _full_update(problem: ReducedProblem, target: Tensor) -> Tensor:
    """``Y^+ target``; the rows of Y are orthogonal by construction, so only their lengths are divided out."""
    Y = problem.space.coordinates
    squares = Y.square().sum(-1)
    return Y.mT @ (torch.where(squares > 0, 1 / squares, 0.0)[..., None] * target)


def full_optimum(problem: ReducedProblem, minimiser: bool = True) -> Optimum:
    """Full fine-tuning: minimum ``1/2 ||(I - P_X) R||^2`` at ``dW = X^+ R``.

    Args:
        problem: The reduced problem.
        minimiser: Whether to compute one.

    Returns:
        The optimum; its gap is 0 by definition.

    Source: theory.md, table "Linear problem", row "all"; ordinary least squares.
    """
    m1, m2 = _sizes(problem)
    dW = _full_update(problem, problem.target) if minimiser else None
    return _optimum("full", problem, torch.zeros_like(problem.outside), dW, m1 * m2)


def diablo_optimum(problem: ReducedProblem, layout: BlockLayout, minimiser: bool = True) -> Optimum:
    """DiaBlo: minimum ``1/2 sum_i ||(I - P_{X_i}) R_i||^2`` at ``D_i = X_i^+ R_i``, zeros outside the blocks.

    Args:
        problem: The reduced problem.
        layout: The blocks, of an m1 x m2 matrix.
        minimiser: Whether to compute one.

    Returns:
        The optimum, with gap ``1/2 sum_i ||(P_X - P_{X_i}) R_i||^2``.

    Raises:
        ValueError: If the layout is not of the problem's size.

    Source: arXiv 2506.03230v2, section 3 (the linear problem); theory.md, table "Linear problem", row "DiaBlo".
    """
    require_layout(layout, *_sizes(problem))
    space, target = problem.space, problem.target
    missed = torch.zeros_like(problem.outside)
    dW = target.new_zeros(*target.shape[:-2], *_sizes(problem)) if minimiser else None
    for i in written_groups(layout):
        cols = layout.cols(i)
        group = truncated_svd(space.group(layout, i), space.cutoff)
        missed = missed + _square(group.outside(target[..., cols]))
        if dW is not None:
            dW[..., layout.rows(i), cols] = group.pinv_times(target[..., cols])
    return _optimum("diablo", problem, missed, dW, layout.num_parameters)


def lora_optimum(problem: ReducedProblem, rank: int, minimiser: bool = True) -> Optimum:
    """The best update of rank at most rho: full plus ``1/2 sum_{j>rho} sigma_j(P_X R)^2``, at ``X^+ (P_X R)_rho``.

    ``X dW`` runs over every matrix of rank at most rho with columns in col X, so this is Eckart-Young for P_X R.

    Args:
        problem: The reduced problem.
        rank: rho, at least 0 (a budget below m1 + m2 parameters buys rank 0).
        minimiser: Whether to compute one; without it only singular values are.

    Returns:
        The optimum, with rho (m1 + m2) parameters.

    Raises:
        TypeError: If the rank is not an integer.
        ValueError: If it is negative.

    Source: theory.md, table "Linear problem", row "LoRA"; Eckart and Young (1936).
    """
    require_integer("rank", rank)
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    parameters = rank * sum(_sizes(problem))
    if not minimiser:
        sigma = torch.linalg.svdvals(problem.target)
        return _optimum("lora", problem, sigma[..., rank:].square().sum(-1), None, parameters)
    U, sigma, Vh = torch.linalg.svd(problem.target, full_matrices=False)
    kept = U[..., :rank] @ (sigma[..., :rank, None] * Vh[..., :rank, :])
    return _optimum("lora", problem, sigma[..., rank:].square().sum(-1), _full_update(problem, kept), parameters)


def lora_relative_gaps(problem: ReducedProblem) -> Float[Tensor, "... ranks"]:
    """LoRA's relative gap at rank 0, 1, .., min(k, m2), from one computation of singular values.

    Returns:
        Shape (..., min(k, m2) + 1), descending from 1 (where there is something to capture) to 0.
    """
    squares = torch.linalg.svdvals(problem.target).square()
    zero = squares.new_zeros(*squares.shape[:-1], 1)
    tails = torch.cat([squares.flip(-1).cumsum(-1).flip(-1), zero], -1)
    return problem.share(tails.movedim(-1, 0)).movedim(0, -1)


def frozen_lora_optimum(problem: ReducedProblem, A: Float[Tensor, "... m1 rho"], minimiser: bool = True) -> Optimum:
    """LoRA with a frozen A, only B trained: full plus ``1/2 ||(P_X - P_{XA}) R||^2``, at ``A (XA)^+ R``.

    Args:
        problem: The reduced problem.
        A: Shape (..., m1, rho), any scale.
        minimiser: Whether to compute one.

    Returns:
        The optimum, with rho m2 parameters.

    Raises:
        ValueError: If A does not fit.
        NonFiniteError: If A holds a NaN or an infinity.

    Source: theory.md, L6.
    """
    directions, reach = _reach(problem, A)
    dW = directions @ reach.pinv_times(problem.target) if minimiser else None
    missed = _square(reach.outside(problem.target))
    return _optimum("lora-frozen-a", problem, missed, dW, A.shape[-1] * problem.target.shape[-1])


def lora_tangent_optimum(
    problem: ReducedProblem,
    A: Float[Tensor, "... m1 rho"],
    B: Float[Tensor, "... rho m2"],
    minimiser: bool = True,
) -> Optimum:
    """The best update among the directions open to LoRA at (A, B): ``dW = A dB + dA B``.

    ``X A dB`` fills ``col XA`` and ``X dA B`` fills col X within the row space of B, so what is missed is
    ``(P_X - P_{XA}) R (I - Q)``, with Q the projector on row B. At B = 0 this is LoRA with A frozen.

    Args:
        problem: The reduced problem.
        A: Shape (..., m1, rho), any scale.
        B: Shape (..., rho, m2), any scale.
        minimiser: Whether to compute one.

    Returns:
        The optimum, with rho (m1 + m2) parameters.

    Raises:
        ValueError: If A or B does not fit.
        NonFiniteError: If A or B holds a NaN or an infinity.

    Source: theory.md, "set" and "tangent" capture.
    """
    rho, m2 = A.shape[-1], problem.target.shape[-1]
    if B.shape[-2:] != (rho, m2):
        raise ValueError(f"B must have shape {(rho, m2)}, got {tuple(B.shape)}")
    require_device("B", B, problem.target)
    require_matrix("B", B)
    require_broadcast(problem=problem.target, A=A, B=B)
    directions, reach = _reach(problem, A)
    rows = unit_scale(B)[0].mT
    readout = truncated_svd(rows, tolerance("rank", B.dtype).value * _norm(rows))
    beside = reach.outside(problem.target)
    missed = readout.outside(beside.mT)
    dW = None
    if minimiser:
        dW = directions @ reach.pinv_times(problem.target) + _full_update(problem, beside - missed.mT)
    return _optimum("lora-tangent", problem, _square(missed), dW, rho * sum(_sizes(problem)))


def _reach(problem: ReducedProblem, A: Tensor) -> tuple[Tensor, TruncatedSVD]:
    """An orthonormal basis of col A, and the SVD of its image under Y.

    What A reaches depends on its column space alone; its own conditioning must not look like a rank of XA. The image
    is judged by the cutoff of X, as a column group is, which is the image of some columns of the identity.
    """
    Y = problem.space.coordinates
    require_device("A", A, Y)
    require_matrix("A", A)
    require_broadcast(problem=problem.target, A=A)
    if A.shape[-2] != Y.shape[-1]:
        raise ValueError(f"A must have {Y.shape[-1]} rows, got {A.shape[-2]}")
    scaled, _ = unit_scale(A)
    basis = truncated_svd(scaled, tolerance("rank", A.dtype).value * _norm(scaled)).U
    image = Y @ basis
    return basis, truncated_svd(image, problem.space.cutoff.expand(image.shape[:-2]))


def _norm(matrix: Tensor) -> Tensor:
    """The spectral norm, zero for an empty matrix."""
    return torch.linalg.matrix_norm(matrix, 2) if 0 not in matrix.shape[-2:] else matrix.sum((-2, -1))


def lora_rank_at_budget(layout: BlockLayout) -> int:
    """The largest LoRA rank with no more parameters than the blocks: ``floor(params / (m1 + m2))``; it may be 0.

    Source: theory.md, L4; the paper's tables compare at matched trainable parameters.
    """
    return layout.num_parameters // (layout.in_features + layout.out_features)


def frozen_rank_at_budget(layout: BlockLayout) -> int:
    """The largest rank of LoRA with a frozen A with no more parameters than the blocks: ``floor(params / m2)``.

    Source: theory.md, L6; where N divides both sizes it is d1.
    """
    return layout.num_parameters // layout.out_features


def worst_case_target(
    X: Float[Tensor, "b m1"], W0: Float[Tensor, "m1 m2"], layout: BlockLayout, space: ColumnSpace
) -> Float[Tensor, "b m2"]:
    """A target inside ``X W0 + col X`` that DiaBlo serves worst: each ``R_i`` lies where ``X_i`` reaches least.

    In coordinates of col X that direction is the last left singular vector of ``X_i``: outside col X_i if the
    premise of L2 fails for i, and the worst-conditioned direction inside it if the premise holds.

    Args:
        X: Inputs, shape (b, m1).
        W0: Frozen weight, shape (m1, m2).
        layout: The blocks.
        space: ``column_space(X)``.

    Returns:
        T, shape (b, m2), the dtype of X; equal to X W0 where X has rank 0.

    Raises:
        ValueError: If the layout is not of the weight's size, or the space is not of X.

    Source: theory.md, L3.
    """
    require_layout(layout, *W0.shape)
    if space.basis is None or (space.basis.shape[0], space.coordinates.shape[-1]) != X.shape:
        raise ValueError("space must be column_space(X), with its basis, of this one X")
    r, R = int(space.rank), torch.zeros(X.shape[0], layout.out_features, dtype=torch.float64, device=X.device)
    if r:
        for i in written_groups(layout):
            U, _, _ = torch.linalg.svd(space.group(layout, i)[:r], full_matrices=True)
            R[:, layout.cols(i)] = space.basis[:, :r] @ U[:, -1:]
    return X @ W0 + times_power(R, space.exponent).to(X.dtype)
