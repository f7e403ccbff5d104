"""L1: DiaBlo's linear problem is convex and splits by blocks; LoRA's is not convex."""

from __future__ import annotations

import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import parametrisations, problems, starts
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, wide
from diablo_theory.theory.curvature import derivatives
from diablo_theory.theory.measures import linearity, midpoint_excess
from diablo_theory.theory.oracles import widened
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Trial, Verdict, describe

_SIZES = ((30, 12, 9, 3, 3), (30, 13, 8, 3, 4), (20, 8, 11, 4, 6), (20, 6, 5, 1, 4))


def convexity(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L1: the DiaBlo problem is convex and separable; LoRA's is not. D1 follows gradient descent on both.

    Two statements on each size.

    - Midpoint. Premise: the output is linear in the parameters; margin, decades of its relative midpoint defect below
      tolerance. Claim: the midpoint of a segment has no larger loss than the mean of its ends; margin in decades of
      the relative excess. Control: LoRA on the segment from its optimum (A, B) to (-A, -B), equal optima whose
      midpoint is 0.
    - Curvature. Premise as before. Claim: the Hessian at zero has no negative eigenvalue and nothing between blocks.
      Control: LoRA at A = 0, B = 0, a stationary point with a negative eigenvalue (a strict saddle).

    Args:
        generator: Where the instances come from.
        number: The trial's number; it picks one of the sizes in turn.
        arithmetic: The precision and device of the instances.

    Returns:
        Two claims and two controls.

    Source: arXiv 2506.03230v2, convexity of the DiaBlo problem; theory.md, L1.
    """
    b, m1, m2, n, rank = _SIZES[number % len(_SIZES)]
    given = problems.linear_problem(BlockLayout(m1, m2, n), b, rank, generator, arithmetic=arithmetic)
    problem, dtype = widened(given), arithmetic.dtype
    trial = Trial("L1", number, describe(b, m1, m2, n, rank))
    diablo = parametrisations.diablo(problem)
    lora = parametrisations.lora(problem, starts.usual_start(m1, m2, 1, generator))
    ends = gaussian(2, diablo.size, generator)
    optimum = wide(parametrisations.best_factors(given, 1))
    return [
        _midpoint(trial, "claim", diablo, ends[0], ends[1], dtype),
        _midpoint(trial, "control", lora, optimum, -optimum, dtype),
        _curvature(trial, "claim", diablo, ends[0], dtype, block_of_parameter(problem.layout)),
        _curvature(trial, "control", lora, optimum, dtype),
    ]


def block_of_parameter(layout: BlockLayout) -> Tensor:
    """For each of DiaBlo's parameters the number of its block, shape (p,)."""
    return torch.arange(layout.num_parameters) // (layout.block_rows * layout.block_cols)


def _midpoint(trial: Trial, role: str, method: Parametrisation, a: Tensor, b: Tensor, dtype: torch.dtype) -> Verdict:
    statement = "no midpoint above the mean of its ends (control: LoRA between two equal optima)"
    excess = midpoint_excess(method, a, b)
    return trial.vanishes(role, statement, linearity(method, a, b, dtype), excess, tolerance("convexity", dtype))


def _curvature(
    trial: Trial, role: str, method: Parametrisation, point: Tensor, dtype: torch.dtype, blocks: Tensor | None = None
) -> Verdict:
    gradient, hessian = derivatives(method, torch.zeros_like(method.start))
    eigenvalues = torch.linalg.eigvalsh(hessian)
    bad = -float(eigenvalues[0])
    if blocks is None:
        bad = 0.0 if bool(gradient.any()) else bad
    else:
        bad = max(bad, float((hessian * (blocks[:, None] != blocks[None, :])).abs().max()))
    statement = "positive semidefinite and blockwise Hessian at zero (control: LoRA's strict saddle at A = B = 0)"
    premise = linearity(method, point, -0.5 * point, dtype)
    return trial.vanishes(role, statement, premise, bad / float(eigenvalues[-1]), tolerance("curvature", dtype))
