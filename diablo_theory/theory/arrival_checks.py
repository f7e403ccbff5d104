"""D2: where Adam arrives from several starts, and the start from which nothing moves."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import dynamics, optima, parametrisations, starts
from diablo_theory.theory.arithmetic import Arithmetic, gaussian
from diablo_theory.theory.instances import clear_problem
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe, room

# rows b, m1, m2, N, rank X: within L2's premise, with room; ragged; beyond the premise. Blocks as tall as the rank
# would be too badly conditioned: there DiaBlo needs many times LoRA's steps.
_SIZES = ((20, 16, 6, 2, 4), (20, 17, 7, 2, 4), (20, 12, 6, 4, 6))
_RANK = 1
_STEP, _DECAY, _ITERATIONS, _DOUBLINGS = 0.2, 1e-2, 300, 4
_STATIONARY = 1e-6
_ESCAPE = 60


def arrival(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """D2 [beyond the paper]: Adam with a decreasing step reaches the minimum of the set that its start belongs to.

    - Adam, until its gradient is 1e-6 of the first, reaches the closed form's minimum: DiaBlo from zero and from a
      random D, LoRA with a frozen A of as many parameters, and LoRA of rank 1 from its usual start and from random
      factors. Premise: the start is not stationary; margin, decades of its gradient relative to ||X^T R||. Control:
      LoRA at A = B = 0.
    - The starts of LoRA do not all share a minimum: PiSSA's takes ``A_0 B_0`` out of W0, so its updates are
      ``A B - A_0 B_0``, and its minimum is that of the residual ``R + X A_0 B_0``. Control: the minimum of R, which is
      LoRA's from its usual start. Premise: zero factors give the residual that the minimum is of; margin, decades of
      the difference relative to R.
    - Gradient descent never moves LoRA from A = B = 0, a saddle. Premise: no gradient there; margin, decades of it
      relative to ||X^T R||. Control: factors of 1e-3 escape. (DiaBlo's zero is no saddle: its problem is convex.)

    Claim margins are decades of ``|loss - minimum|`` relative to what full fine-tuning captures, or of the distance
    moved relative to the optimal factors.

    Args:
        generator: Where the instances come from.
        number: The trial's number; it picks one of the sizes in turn.
        arithmetic: The precision and device of the instances; Adam runs in float64 on their coordinates.

    Returns:
        Seven claims and three controls.

    Source: theory.md, L1 (the saddle), L6, "set" and "tangent" capture; Meng et al., PiSSA, arXiv 2404.02948.
    """
    b, m1, m2, n, rank = _SIZES[number % len(_SIZES)]
    drawn = clear_problem(
        BlockLayout(m1, m2, n), b, rank, generator, arithmetic, condition=2.0, target="low-rank", noise=0.3
    )
    problem = dynamics.in_coordinates(drawn)
    trial = Trial("D2", number, describe(b, m1, m2, n, rank) + f" rho={_RANK}")
    return [
        *_reached(trial, problem, generator),
        *_shifted(trial, problem),
        *_at_the_saddle(trial, problem, generator),
    ]


def _reached(trial: Trial, problem: LinearProblem, generator: torch.Generator) -> list[Verdict]:
    (m1, m2), reduced = problem.W0.shape, reduce_problem(problem)
    diablo = parametrisations.diablo(problem)
    lora = parametrisations.lora(problem, starts.usual_start(m1, m2, _RANK, generator))
    blocks = optima.diablo_optimum(reduced, problem.layout, minimiser=False)
    fixed = starts.usual_start(m1, m2, optima.frozen_rank_at_budget(problem.layout), generator).A
    frozen = optima.frozen_lora_optimum(reduced, fixed, minimiser=False)
    both = optima.lora_optimum(reduced, _RANK, minimiser=False)
    captured, verdicts = float(reduced.loss_of(reduced.captured)), []
    for role, method, best in (
        ("claim", diablo, blocks),
        ("claim", _from_random(diablo, m1, generator), blocks),
        ("claim", parametrisations.frozen_lora(problem, fixed), frozen),
        ("claim", lora, both),
        ("claim", _from_random(lora, m1, generator), both),
        ("control", dataclasses.replace(lora, begin="saddle", start=0 * lora.start), both),
    ):
        slope = _relative_gradient(problem, method)
        margin = -room(slope, tolerance("gradient").value)
        statement = f"Adam reaches the set's minimum: {method.method} from {method.begin}"
        off = abs(_arrived(method) - float(best.minimum)) / captured
        verdicts.append(trial.vanishes(role, statement, Premise(margin > 0, margin), off, tolerance("arrival")))
    return verdicts


def _from_random(method: Parametrisation, m1: int, generator: torch.Generator) -> Parametrisation:
    """The same method from normal parameters of variance 1/m1, so that it does not start at W0."""
    return dataclasses.replace(method, begin="random", start=gaussian(1, method.size, generator)[0] / m1**0.5)


def _shifted(trial: Trial, problem: LinearProblem) -> list[Verdict]:
    U, sigma, Vh = torch.linalg.svd(problem.W0)  # not by the start's own function: that is what is asked
    removed = problem.X @ (U[:, :_RANK] * sigma[:_RANK]) @ Vh[:_RANK]
    method = parametrisations.lora(problem, starts.pissa_start(problem.W0, _RANK))
    reduced, arrived, verdicts = reduce_problem(problem), _arrived(method), []
    for role, shift in (("claim", removed), ("control", torch.zeros_like(removed))):
        moved = reduce_problem(dataclasses.replace(problem, T=problem.T + shift))
        minimum = float(optima.lora_optimum(moved, _RANK, minimiser=False).minimum)
        difference = method.output(torch.zeros_like(method.start)) + shift
        margin = room(float(difference.norm() / problem.R.norm()), tolerance("gradient").value)
        statement = "LoRA from PiSSA's start reaches the minimum of R + X A_0 B_0 (control: of R, as LoRA does)"
        off = abs(arrived - minimum) / float(reduced.loss_of(reduced.captured))
        verdicts.append(trial.vanishes(role, statement, Premise(margin > 0, margin), off, tolerance("arrival")))
    return verdicts


def _arrived(method: Parametrisation) -> float:
    """The loss where Adam becomes stationary."""
    iterations = _ITERATIONS
    for _ in range(_DOUBLINGS):
        run = dynamics.descend(method, "adam", _STEP, iterations, decay=_DECAY)
        if float(run.gradient_norms[-1]) <= _STATIONARY * float(run.gradient_norms[0]):
            break
        iterations *= 2
    return float(run.losses[-1])


def _relative_gradient(problem: LinearProblem, method: Parametrisation, at: Tensor | None = None) -> float:
    theta = (method.start if at is None else at).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(method.loss(theta), theta)
    return float(gradient.norm() / (problem.X.mT @ problem.R).norm())


def _at_the_saddle(trial: Trial, problem: LinearProblem, generator: torch.Generator) -> list[Verdict]:
    (m1, m2), bound = problem.W0.shape, tolerance("gradient")
    method = parametrisations.lora(problem, starts.usual_start(m1, m2, _RANK, generator))
    step = 0.5 / float(torch.linalg.matrix_norm(problem.X.mT @ problem.R, 2))
    length = float(parametrisations.best_factors(problem, _RANK).norm())
    nearby = 1e-3 * gaussian(1, method.size, generator)[0]
    verdicts = []
    for role, start in (("claim", 0 * method.start), ("control", nearby)):
        margin = room(_relative_gradient(problem, method, start), bound.value)
        run = dynamics.descend(method, "gradient descent", step, _ESCAPE, start=start)
        statement = "gradient descent never moves from A = B = 0 (control: factors of 1e-3 escape)"
        moved = float((run.last - start).norm()) / length
        verdicts.append(trial.vanishes(role, statement, Premise(margin > 0, margin), moved, bound))
    return verdicts
