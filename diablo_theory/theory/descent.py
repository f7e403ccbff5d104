"""How gradient descent goes on one linear problem within the theorem's premise and one beyond it, for every method."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import curvature, dynamics, optima, parametrisations, starts
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.instances import clear_problem
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem

#: Rank of X of each problem; the blocks are 8 x 8, so that the first is within the premise and the second is not.
RANKS = {"holds": 6, "fails": 16}
_SIZE, _BLOCKS, _ROWS, _CONDITION = 32, 4, 64, 2.0


def descents(seed: int = 0, iterations: int = 2000) -> pd.DataFrame:
    """Gradient descent of four methods on the problems of :data:`RANKS`, each with the step 1/lambda_max of its own.

    The targets are generic. DiaBlo (N = 4, 32 x 32), LoRA and LoRA with a frozen A have equal numbers of parameters.

    Args:
        seed: Of the problems and of LoRA's factors.
        iterations: Steps to take, at least 1.

    Returns:
        A row a problem, method and kept iterate (all of the first hundred, then evenly spaced in the logarithm):
        premise ("holds" or "fails"), rank, method, parameters, step, iteration; excess over the minimum of full
        fine-tuning, and floor, the least one that the method can reach (closed form), both relative to the excess of
        no update; left, their difference; factor, the curvature's prediction of how what is left shrinks in each step
        in the end: ``max_j (1 - step lambda_j)^2``. For LoRA the lambda_j are those where descent ended.

    Raises:
        ValueError: If iterations is below 1.

    Source: theory.md, L1 (descent), L4 and L6; D1 checks the factors.
    """
    kept = _kept(iterations)
    parts = []
    for premise, rank in RANKS.items():
        generator, layout = seeded(seed), BlockLayout(_SIZE, _SIZE, _BLOCKS)
        drawn = clear_problem(layout, _ROWS, rank, generator, condition=_CONDITION)
        problem = dynamics.in_coordinates(drawn)
        for method, floor, curvatures in _methods(problem, generator):
            step = 1 / float(curvatures[0])
            table = dynamics.trajectories(problem, [method], "gradient descent", [step], iterations)
            named = {"premise": premise, "rank": rank, "method": method.method, "parameters": method.size}
            factor = curvature.contraction(_reached(problem, method, step, iterations, curvatures), step) ** 2
            excess = table["excess"].to_numpy()
            relative = excess[kept] / excess[0]  # every method starts at no update
            parts.append(
                pd.DataFrame(
                    named
                    | {"step": step, "iteration": kept, "excess": relative, "floor": floor, "left": relative - floor}
                    | {"factor": factor}
                )
            )
    return pd.concat(parts, ignore_index=True)


def _kept(iterations: int) -> npt.NDArray[np.int64]:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    spaced = np.geomspace(1, iterations, 150).round().astype(int)
    return np.unique(np.concatenate([np.arange(min(100, iterations) + 1), spaced]))


def _methods(problem: LinearProblem, generator: torch.Generator) -> list[tuple[Parametrisation, float, torch.Tensor]]:
    """Each with the least relative excess that it can reach, and the Hessian's eigenvalues, descending."""
    layout, reduced = problem.layout, reduce_problem(problem)
    m1, m2 = problem.W0.shape
    rho, frozen_rho = optima.lora_rank_at_budget(layout), optima.frozen_rank_at_budget(layout)
    whole = dataclasses.replace(problem, layout=BlockLayout(m1, m2, 1))
    full = dataclasses.replace(parametrisations.diablo(whole), method="full")
    lora = parametrisations.lora(problem, starts.usual_start(m1, m2, rho, generator))
    A = starts.usual_start(m1, m2, frozen_rho, generator).A
    best = parametrisations.best_factors(problem, rho)
    blocks = optima.diablo_optimum(reduced, layout, minimiser=False)
    frozen = optima.frozen_lora_optimum(reduced, A, minimiser=False)
    at_best = curvature.lora_curvatures(lora, best, _lora_directions(problem, rho))
    return [
        (full, 0.0, curvature.full_curvatures(problem)),
        (parametrisations.diablo(problem), float(blocks.relative_gap), curvature.diablo_curvatures(problem)),
        (lora, float(optima.lora_relative_gaps(reduced)[rho]), at_best),
        (
            parametrisations.frozen_lora(problem, A),
            float(frozen.relative_gap),
            curvature.frozen_curvatures(problem, A),
        ),
    ]


def _lora_directions(problem: LinearProblem, rho: int) -> int:
    """How many of the Hessian's eigenvalues are not zero at a minimum of LoRA; X has as many rows as rank."""
    return rho * (len(problem.X) + problem.W0.shape[1] - rho)


def _reached(
    problem: LinearProblem, method: Parametrisation, step: float, iterations: int, known: torch.Tensor
) -> torch.Tensor:
    """The Hessian's eigenvalues where descent ends: LoRA's differ between its minima, the others' do not."""
    if method.method != "lora":
        return known
    last = dynamics.descend(method, "gradient descent", step, iterations).last
    return curvature.lora_curvatures(method, last, len(known))
