"""Updates as functions of one parameter vector: DiaBlo, LoRA from two starts, and LoRA with a frozen A."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.theory import optima
from diablo_theory.theory.arithmetic import require_like
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem


@dataclass(frozen=True)
class Parametrisation:
    """A method on one linear problem, in float64 on the problem's device.

    Args:
        method: "diablo", "lora" or "lora-frozen-a".
        begin: Where training starts, one word.
        start: The parameters there, shape (p,).
        output: From parameters, shape (p,), to X dW, shape (b, m2), differentiable.
        residual: R, what the output is to match, shape (b, m2).
    """

    method: str
    begin: str
    start: Float[Tensor, " p"]
    output: Callable[[Tensor], Tensor]
    residual: Float[Tensor, "b m2"]

    @property
    def size(self) -> int:
        """p, the number of trainable parameters."""
        return self.start.numel()

    def loss(self, theta: Float[Tensor, " p"]) -> Float[Tensor, ""]:
        """``1/2 ||X dW(theta) - R||_F^2``, shape ()."""
        loss: Tensor = 0.5 * (self.output(theta) - self.residual).square().sum()
        return loss


def kaiming_uniform(rows: int, cols: int, generator: torch.Generator) -> Float[Tensor, "rows cols"]:
    """LoRA's usual A: independent entries, uniform between ``-1/sqrt(m1)`` and ``1/sqrt(m1)``.

    That is Kaiming's rule with a = sqrt(5), as in peft, in the convention Y = X A B.

    Args:
        rows: m1.
        cols: LoRA's rank.
        generator: Where the draws come from.

    Returns:
        Shape (rows, cols), float64.

    Source: peft's LoRA layer, ``reset_lora_parameters``.
    """
    return (2 * torch.rand(rows, cols, generator=generator, dtype=torch.float64) - 1) / math.sqrt(rows)


def diablo(problem: LinearProblem) -> Parametrisation:
    """DiaBlo from zero: the complete blocks, then the tail.

    Source: arXiv 2506.03230v2, section 3.
    """
    layout, X = problem.layout, problem.X.double()
    inside = layout.complete * layout.block_rows * layout.block_cols

    def output(theta: Tensor) -> Tensor:
        blocks = theta[:inside].reshape(layout.complete, layout.block_rows, layout.block_cols)
        tail = theta[inside:].reshape(layout.tail) if layout.tail else None
        return ops.block_product(X, blocks, tail, layout)

    return Parametrisation("diablo", "zero", X.new_zeros(layout.num_parameters), output, problem.R.double())


def lora(
    problem: LinearProblem,
    A: Float[Tensor, "m1 rho"],
    B: Float[Tensor, "rho m2"] | None = None,
    begin: str = "kaiming",
) -> Parametrisation:
    """LoRA with both factors trained: A, then B, with scaling 1.

    Args:
        problem: The linear problem.
        A: Where A starts, shape (m1, rho), float64.
        B: Where B starts, shape (rho, m2); zero, as usual, if not given.
        begin: The start's name.

    Returns:
        ``dW = A B``, with rho (m1 + m2) parameters.

    Raises:
        ValueError: If A or B does not fit.
    """
    X, m2 = problem.X.double(), problem.W0.shape[-1]
    A = _like_inputs("A", A, (X.shape[1], A.shape[-1]), X)
    B = X.new_zeros(A.shape[1], m2) if B is None else _like_inputs("B", B, (A.shape[1], m2), X)
    cut = A.numel()

    def output(theta: Tensor) -> Tensor:
        return X @ theta[:cut].reshape(A.shape) @ theta[cut:].reshape(B.shape)

    start = torch.cat([A.flatten(), B.flatten()])
    return Parametrisation("lora", begin, start, output, problem.R.double())


def principal_lora(problem: LinearProblem, rank: int) -> Parametrisation:
    """LoRA that starts in the leading singular directions of W0, as PiSSA does.

    ``A = U S^(1/2)`` and ``B = S^(1/2) V^T`` from the leading singular values of W0, which are taken out of the frozen
    weight: ``dW = A B - A_0 B_0``, so that the start is the same function.

    Args:
        problem: The linear problem.
        rank: From 1 to min(m1, m2).

    Returns:
        The parametrisation, with rank (m1 + m2) parameters.

    Raises:
        ValueError: If the rank is out of range.

    Source: Meng et al., PiSSA, arXiv 2404.02948, its initialisation.
    """
    if not 1 <= rank <= min(problem.W0.shape):
        raise ValueError(f"rank must be from 1 to min(m1, m2) = {min(problem.W0.shape)}, got {rank}")
    A, B = _balanced_factors(problem.W0.double(), rank)
    trained = lora(problem, A, B, "principal")
    offset = trained.output(trained.start)
    return Parametrisation(
        "lora", "principal", trained.start, lambda theta: trained.output(theta) - offset, trained.residual
    )


def frozen_lora(problem: LinearProblem, A: Float[Tensor, "m1 rho"]) -> Parametrisation:
    """LoRA with A frozen: B alone is trained, from zero.

    Args:
        problem: The linear problem.
        A: Shape (m1, rho), float64.

    Returns:
        ``dW = A B``, with rho m2 parameters.

    Raises:
        ValueError: If A does not fit.

    Source: theory.md, L6; FFA-LoRA and LoRA-FA.
    """
    X, m2 = problem.X.double(), problem.W0.shape[-1]
    design = X @ _like_inputs("A", A, (X.shape[1], A.shape[-1]), X)
    shape = (design.shape[1], m2)
    start = X.new_zeros(shape).flatten()
    return Parametrisation(
        "lora-frozen-a", "zero", start, lambda theta: design @ theta.reshape(shape), problem.R.double()
    )


def best_factors(problem: LinearProblem, rank: int) -> Float[Tensor, " p"]:
    """LoRA's parameters at an optimum: A and B from the minimiser's SVD, equally long, shape (rank (m1 + m2),)."""
    update = optima.lora_optimum(reduce_problem(problem), rank).update
    return torch.cat([factor.flatten() for factor in _balanced_factors(update, rank)])


def _balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = sigma[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def _like_inputs(name: str, factor: Tensor, shape: tuple[int, int], X: Tensor) -> Tensor:
    placed = factor.to(X.device)
    require_like(name, placed, shape, X)
    return placed
