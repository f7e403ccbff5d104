"""Updates as functions of one parameter vector: DiaBlo, LoRA from any start, and LoRA with a frozen A."""

from __future__ import annotations

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
from diablo_theory.theory.starts import Start, pissa_start


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


def lora(problem: LinearProblem, start: Start) -> Parametrisation:
    """LoRA with both factors trained: A, then B, with scaling 1.

    The start's product is taken out of the frozen weight, so that training begins at W0 from any start: ``dW = A B -
    A_0 B_0``, which is ``A B`` where B starts at zero.

    Args:
        problem: The linear problem.
        start: A of shape (m1, rho) and B of shape (rho, m2), float64.

    Returns:
        The parametrisation, with rho (m1 + m2) parameters.

    Raises:
        ValueError: If A or B does not fit.
    """
    X, (m1, m2), rho = problem.X.double(), problem.W0.shape, start.A.shape[-1]
    A, B = _like_inputs("A", start.A, (m1, rho), X), _like_inputs("B", start.B, (rho, m2), X)
    cut, offset = A.numel(), X @ A @ B

    def output(theta: Tensor) -> Tensor:
        return X @ theta[:cut].reshape(A.shape) @ theta[cut:].reshape(B.shape) - offset

    return Parametrisation("lora", start.name, torch.cat([A.flatten(), B.flatten()]), output, problem.R.double())


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
    best = pissa_start(update, rank)
    return torch.cat([best.A.flatten(), best.B.flatten()])


def _like_inputs(name: str, factor: Tensor, shape: tuple[int, int], X: Tensor) -> Tensor:
    placed = factor.to(X.device)
    require_like(name, placed, shape, X)
    return placed
