"""L1: DiaBlo's linear problem is convex, splits by blocks and yields to gradient descent; LoRA's is not convex."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import descent, optima, problems
from diablo_theory.theory.arithmetic import Arithmetic, gaussian
from diablo_theory.theory.column_space import written_groups
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe, room

_SIZES = ((30, 12, 9, 3, 3), (30, 13, 8, 3, 4), (20, 8, 11, 4, 6), (20, 6, 5, 1, 4))
_ITERATIONS = 150


@dataclass(frozen=True)
class Adapter:
    """An update as a function of one parameter vector.

    Args:
        output: From parameters, shape (p,), to X dW, shape (b, m2).
        size: p.
        groups: For each parameter the block that it belongs to, shape (p,); None where blocks mean nothing.
    """

    output: Callable[[Tensor], Tensor]
    size: int
    groups: Tensor | None

    def loss(self, problem: LinearProblem) -> Callable[[Tensor], Tensor]:
        """The linear problem's loss as a function of the parameters."""
        R = problem.R
        return lambda theta: 0.5 * (self.output(theta) - R).square().sum()


def diablo_adapter(problem: LinearProblem) -> Adapter:
    """DiaBlo's parameters: the complete blocks, then the tail."""
    layout, X = problem.layout, problem.X
    k, d1, d2 = layout.complete, layout.block_rows, layout.block_cols
    groups = torch.arange(layout.num_parameters) // (d1 * d2)

    def output(theta: Tensor) -> Tensor:
        blocks = theta[: k * d1 * d2].reshape(k, d1, d2)
        tail = theta[k * d1 * d2 :].reshape(layout.tail) if layout.tail else None
        return ops.block_product(X, blocks, tail, layout)

    return Adapter(output, layout.num_parameters, groups)


def lora_adapter(problem: LinearProblem, rank: int) -> Adapter:
    """LoRA's parameters: A, shape (m1, rank), then B, shape (rank, m2), with scaling 1."""
    m1, m2 = problem.W0.shape

    def output(theta: Tensor) -> Tensor:
        A, B = theta[: m1 * rank].reshape(m1, rank), theta[m1 * rank :].reshape(rank, m2)
        return problem.X @ A @ B

    return Adapter(output, rank * (m1 + m2), None)


def best_factors(problem: LinearProblem, rank: int) -> Float[Tensor, " p"]:
    """LoRA's parameters at an optimum: A and B from the minimiser's SVD, shape (rank (m1 + m2),)."""
    U, sigma, Vh = torch.linalg.svd(optima.lora_optimum(reduce_problem(problem), rank).update, full_matrices=False)
    root = sigma[:rank].sqrt()
    return torch.cat([(U[:, :rank] * root).flatten(), (root[:, None] * Vh[:rank]).flatten()])


def convexity(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L1: the DiaBlo problem is convex and separable and gradient descent solves it; LoRA's and long steps do not.

    Three statements on each size.

    - Midpoint. Premise: the output is linear in the parameters; margin, decades of its relative midpoint defect below
      tolerance. Claim: the midpoint of a segment has no larger loss than the mean of its ends; margin in decades of
      the relative excess. Control: LoRA on the segment from its optimum (A, B) to (-A, -B), equal optima whose
      midpoint is 0.
    - Curvature. Premise as before. Claim: the Hessian at zero has no negative eigenvalue and nothing between blocks.
      Control: LoRA at A = 0, B = 0, a stationary point with a negative eigenvalue (a strict saddle).
    - Descent. Premise: step < 2/lambda_max; margin ``1 - step lambda_max / 2``. Claim: from zero, every step shrinks
      every block's distance to ``X_i^+ R_i`` at least by ``max_j |1 - step sigma_j(X_i)^2|`` over the nonzero sigma_j
      (by 1 where that exceeds 1); margin in decades of the largest excess. Control: step > 2/lambda_max.

    Args:
        generator: Where the instances come from.
        number: The trial's number; it picks one of the sizes in turn.
        arithmetic: The precision and device of the instances.

    Returns:
        Three claims and three controls.

    Source: arXiv 2506.03230v2, convexity of the DiaBlo problem; theory.md, L1.
    """
    b, m1, m2, n, rank = _SIZES[number % len(_SIZES)]
    problem = problems.linear_problem(BlockLayout(m1, m2, n), b, rank, generator)
    trial = Trial("L1", number, describe(b, m1, m2, n, rank))
    diablo, lora = diablo_adapter(problem), lora_adapter(problem, 1)
    ends = gaussian(2, diablo.size, generator)
    optimum = best_factors(problem, 1)
    return [
        _midpoint(trial, "claim", problem, diablo, ends[0], ends[1]),
        _midpoint(trial, "control", problem, lora, optimum, -optimum),
        _curvature(trial, "claim", problem, diablo, ends[0]),
        _curvature(trial, "control", problem, lora, optimum),
        _descent(trial, "claim", problem, float(0.6 + 1.3 * torch.rand(1, generator=generator))),
        _descent(trial, "control", problem, float(2.1 + 0.5 * torch.rand(1, generator=generator))),
    ]


def _linearity(adapter: Adapter, a: Tensor, b: Tensor) -> Premise:
    """Premise: output((a - b)/2) = (output(a) - output(b))/2, and the same for (a + b)/2."""
    out_a, out_b = adapter.output(a), adapter.output(b)
    defect = max(
        float(torch.linalg.matrix_norm(adapter.output((a + sign * b) / 2) - (out_a + sign * out_b) / 2))
        for sign in (1, -1)
    )
    scale = float(torch.linalg.matrix_norm(out_a) + torch.linalg.matrix_norm(out_b))
    margin = room(defect / scale, tolerance("linearity").value)
    return Premise(margin >= 0, margin)


def derivatives_at_zero(adapter: Adapter, problem: LinearProblem) -> tuple[Float[Tensor, " p"], Float[Tensor, "p p"]]:
    """The loss's gradient, shape (p,), and Hessian, shape (p, p), at zero parameters, by autograd row by row."""
    theta = torch.zeros(adapter.size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(adapter.loss(problem)(theta), theta, create_graph=True)
    rows = [torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in gradient]
    return gradient.detach(), torch.stack(rows)


def _midpoint(trial: Trial, role: str, problem: LinearProblem, adapter: Adapter, a: Tensor, b: Tensor) -> Verdict:
    loss = adapter.loss(problem)
    mean = 0.5 * float(loss(a) + loss(b))
    excess = float(loss((a + b) / 2)) / mean - 1
    statement = "no midpoint above the mean of its ends (control: LoRA between two equal optima)"
    return trial.vanishes(role, statement, _linearity(adapter, a, b), excess, tolerance("convexity"))


def _curvature(trial: Trial, role: str, problem: LinearProblem, adapter: Adapter, point: Tensor) -> Verdict:
    gradient, hessian = derivatives_at_zero(adapter, problem)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    bad = -float(eigenvalues[0])
    if adapter.groups is None:
        bad = 0.0 if bool(gradient.any()) else bad
    else:
        between = adapter.groups[:, None] != adapter.groups[None, :]
        bad = max(bad, float((hessian * between).abs().max()))
    statement = "positive semidefinite and blockwise Hessian at zero (control: LoRA's strict saddle at A = B = 0)"
    premise = _linearity(adapter, point, -0.5 * point)
    return trial.vanishes(role, statement, premise, bad / float(eigenvalues[-1]), tolerance("curvature"))


def _descent(trial: Trial, role: str, problem: LinearProblem, share: float) -> Verdict:
    """One run with step ``share / lambda_max``."""
    layout, cutoff = problem.layout, tolerance("rank").value
    spectra = {
        i: torch.linalg.svdvals(problem.X[:, layout.rows(i)]).square()
        for i in written_groups(layout)
        if layout.rows(i).stop > layout.rows(i).start
    }
    largest = max(float(s[0]) for s in spectra.values())
    step = share / largest
    optimum = optima.diablo_optimum(reduce_problem(problem), layout).update
    errors = descent.gradient_descent(problem, step, _ITERATIONS) - optimum
    excess = -1.0
    for i, squares in spectra.items():
        rate = float((1 - step * squares[squares > cutoff**2 * largest]).abs().max())
        distance = torch.linalg.matrix_norm(errors[:, layout.rows(i), layout.cols(i)])
        followed = distance[:-1] > 1e-6 * distance[0]
        ratios = (distance[1:] / distance[:-1])[followed]
        excess = max(excess, float(ratios.max()) - min(rate, 1.0))
    statement = "gradient descent converges at the predicted rate (control: a step beyond 2/lambda_max)"
    return trial.vanishes(role, statement, Premise(share < 2, 1 - share / 2), excess, tolerance("contraction"))
