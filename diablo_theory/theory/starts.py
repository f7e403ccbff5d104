"""Where LoRA may start: the factors A and B of the usual and of the data-aware initialisations.

The update is ``s A B`` with A of shape (m1, rho) and B of shape (rho, m2); scalings are left out, since the directions
that a start opens do not depend on them. Where B is not zero, the frozen weight is W0 - A B, so that the start is the
same function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.theory.arithmetic import gaussian, require_matrix, seeded
from diablo_theory.theory.column_space import ColumnSpace
from diablo_theory.theory.reduction import ReducedProblem


@dataclass(frozen=True)
class Start:
    """A LoRA start.

    Args:
        name: Of the initialisation.
        A: Shape (m1, rho), float64.
        B: Shape (rho, m2), float64.
    """

    name: str
    A: Float[Tensor, "m1 rho"]
    B: Float[Tensor, "rho m2"]


def usual_start(in_features: int, out_features: int, rank: int, generator: torch.Generator) -> Start:
    """LoRA's own: A uniform on +-1/sqrt(m1) (Kaiming's with a = sqrt(5), as in peft), B zero.

    Raises:
        ValueError: If the rank is negative.

    Source: Hu et al. (2022), LoRA; theory.md, notation.
    """
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    A = (2 * torch.rand(in_features, rank, generator=generator, dtype=torch.float64) - 1) / math.sqrt(in_features)
    return Start("usual", A, torch.zeros(rank, out_features, dtype=torch.float64))


def pissa_start(W0: Float[Tensor, "m1 m2"], rank: int, iterations: int | None = None) -> Start:
    """PiSSA: the leading singular triplets of W0, their singular values shared between A and B.

    Args:
        W0: The frozen weight, shape (m1, m2).
        rank: rho, from 0 to min(m1, m2).
        iterations: None for an exact SVD; else power iterations, at least 0, of a randomised one for large matrices.

    Raises:
        ValueError: If W0 is no matrix, or the rank or the iterations are out of range.
        NonFiniteError: If W0 holds a NaN or an infinity.

    Source: Meng et al. (2024), PiSSA.
    """
    _require_one("W0", W0)
    _require_rank(rank, min(W0.shape))
    U, sigma, Vh = _leading(W0.double(), rank, iterations)
    root = sigma.sqrt()
    return Start("pissa", U * root, root[:, None] * Vh)


def eva_start(space: ColumnSpace, out_features: int, rank: int) -> Start:
    """EVA: A spans the leading right singular vectors of X, B is zero.

    Args:
        space: Of X, direct or from sums.
        out_features: m2.
        rank: rho, from 0 to m1; directions past the rank of X come out as zeros, and open nothing.

    Raises:
        ValueError: If the rank is out of range.

    Source: Paischer et al. (2024), EVA.
    """
    Y = space.coordinates
    _require_one("space", Y)
    _require_rank(rank, Y.shape[-1])
    lengths = Y[:rank].norm(dim=-1, keepdim=True)
    directions = torch.where(lengths > 0, Y[:rank] / lengths, 0.0)
    A = torch.cat([directions, Y.new_zeros(rank - len(directions), Y.shape[-1])]).mT
    return Start("eva", A, Y.new_zeros(rank, out_features))


def lora_ga_start(problem: ReducedProblem, rank: int, iterations: int | None = None) -> Start:
    """LoRA-GA: A holds the leading left singular vectors of the full gradient X^T g_Y, B the next right ones.

    Args:
        problem: With R = -g_Y, so that the gradient is -Y^T M.
        rank: rho, from 0 to min(m1, m2) / 2.
        iterations: As in :func:`pissa_start`.

    Raises:
        ValueError: If the rank or the iterations are out of range.

    Source: Wang et al. (2024), LoRA-GA, in the arrangement "A r, B the r after it".
    """
    Y, M = problem.space.coordinates, problem.target
    _require_one("problem", M)
    _require_rank(rank, min(Y.shape[-1], M.shape[-1]) // 2)
    U, _, Vh = _leading(Y.mT @ M, 2 * rank, iterations)
    return Start("lora-ga", U[:, :rank], Vh[rank:])


def corda_start(space: ColumnSpace, W0: Float[Tensor, "m1 m2"], rank: int, iterations: int | None = None) -> Start:
    """CorDA, instruction-previewed: the leading part of the SVD of W0^T G, taken back through G^+ on the inputs' side.

    Args:
        space: Of X, so that G = Y^T Y.
        W0: The frozen weight, shape (m1, m2).
        rank: rho, from 0 to min(m1, m2).
        iterations: As in :func:`pissa_start`.

    Raises:
        ValueError: If W0 is no matrix of m1 rows, or the rank or the iterations are out of range.
        NonFiniteError: If W0 holds a NaN or an infinity.

    Source: Yang et al. (2024), CorDA. The authors damp G until it can be inverted; the singular vectors lie in its row
    space, so a pseudo-inverse needs no damping.
    """
    _require_one("W0", W0)
    Y = space.coordinates
    _require_one("space", Y)
    if W0.shape[-2] != Y.shape[-1]:
        raise ValueError(f"W0 must have {Y.shape[-1]} rows, got {W0.shape[-2]}")
    _require_rank(rank, min(W0.shape))
    V, sigma, Uh = _leading(Y.mT @ (Y @ W0.double()), rank, iterations)  # the transpose of W0^T G
    squares = Y.square().sum(-1)
    inverse = torch.where(squares > 0, squares.pow(-2), 0.0)
    root = sigma.sqrt()
    return Start("corda", Y.mT @ (inverse[:, None] * (Y @ V)) * root, root[:, None] * Uh)


def _leading(matrix: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, U (m, rank), sigma (rank,), V^T (rank, n)."""
    if iterations is None:
        U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, sigma, Vh = _sketch(matrix, rank, iterations)
    return U[:, :rank], sigma[:rank], Vh[:rank]


def _sketch(matrix: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a matrix within a random subspace of its columns: Halko, Martinsson and Tropp (2011), section 4.5.

    The subspace is oversampled to 2 rank + 8, and drawn on the CPU from a seed of its own.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    size = min(2 * rank + 8, *matrix.shape)
    Q, _ = torch.linalg.qr(matrix @ gaussian(matrix.shape[1], size, seeded(0)).to(matrix.device))
    for _ in range(iterations):
        rows, _ = torch.linalg.qr(matrix.mT @ Q)
        Q, _ = torch.linalg.qr(matrix @ rows)
    U, sigma, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
    return Q @ U, sigma, Vh


def _require_one(name: str, matrix: Tensor) -> None:
    require_matrix(name, matrix)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be one matrix, got a batch of shape {tuple(matrix.shape)}")


def _require_rank(rank: int, largest: int) -> None:
    if not 0 <= rank <= largest:
        raise ValueError(f"rank must be from 0 to {largest}, got {rank}")
