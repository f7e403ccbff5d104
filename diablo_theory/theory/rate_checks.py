"""D1: gradient descent converges at the rate that the curvature predicts, and DiaBlo's to the smallest minimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import curvature, dynamics, optima, parametrisations, starts
from diablo_theory.theory.arithmetic import Arithmetic, gaussian
from diablo_theory.theory.column_space import written_groups
from diablo_theory.theory.instances import clear_problem
from diablo_theory.theory.networks import flat
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe, room

# rows b, m1, m2, N, rank X, LoRA's rank: within L2's premise; ragged; beyond the premise
_SIZES = ((24, 12, 9, 3, 3, 1), (24, 13, 8, 3, 4, 2), (20, 8, 11, 4, 5, 2))
_ITERATIONS = 60
_LIMIT = 1e-10
"""Descent to the limit goes on until the predicted distance is this share of the first one."""
_LONGEST = 2000


@dataclass(frozen=True)
class _Case:
    """A method at a minimum of its loss.

    Args:
        method: The parametrisation.
        curvatures: The Hessian's nonzero eigenvalues there, descending.
        others: The eigenvalues of the method that it is not to be mistaken for, descending.
        minimum: The parameters, shape (p,).
        largest_step: In units of 1/lambda_max, at most 2.
        quantity: The tolerance on its rates.
        reach: How far from the minimum descent starts, relative to ``||minimum||``.
        followed: Gradients are followed down to this share of the first.
    """

    method: Parametrisation
    curvatures: Float[Tensor, " n"]
    others: Float[Tensor, " k"]
    minimum: Float[Tensor, " p"]
    largest_step: float = 1.9
    quantity: str = "contraction"
    reach: float = 1.0
    followed: float = 1e-6

    def factors(self, step: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ratios of consecutive gradients' norms, from off the minimum along the slowest mode and from anywhere."""
        eigenvalues, vectors = torch.linalg.eigh(curvature.derivatives(self.method, self.minimum)[1])
        count = len(self.curvatures)
        slowest = int((1 - step * eigenvalues[-count:]).abs().argmax())
        generic = gaussian(1, self.method.size, generator)[0]
        return (
            self._factors(step, vectors[:, -count:][:, slowest]),
            self._factors(step, generic / generic.norm()),
        )

    def _factors(self, step: float, direction: Tensor) -> Tensor:
        start = self.minimum + self.reach * self.minimum.norm() * direction
        norms = dynamics.descend(self.method, "gradient descent", step, _ITERATIONS, start=start).gradient_norms
        kept = (norms[:-1] > self.followed * norms[0]).cummin(0).values
        return (norms[1:] / norms[:-1])[kept]


def _linear(method: Parametrisation, curvatures: Tensor, others: Tensor) -> _Case:
    """The loss is quadratic: one Newton step from the start is a minimum, and the quadratic holds far from it."""
    gradient, hessian = curvature.derivatives(method, method.start)
    rcond = tolerance("rank").value
    newton = torch.linalg.lstsq(hessian, gradient[:, None], rcond=rcond, driver="gelsd").solution[:, 0]
    return _Case(method, curvatures, others, method.start - newton)


def _nearby(problem: LinearProblem, method: Parametrisation, rho: int) -> _Case:
    """LoRA at its minimum, not to be mistaken for LoRA with A frozen there.

    Steps stay below 1/lambda_max, where the slowest mode is the one of the smallest eigenvalue: the two methods'
    smallest ones differ at first order in sigma_{rho+1} / sigma_rho, so their rates do not agree by chance.
    """
    (m1, m2), minimum = problem.W0.shape, parametrisations.best_factors(problem, rho)
    own = curvature.lora_curvatures(method, minimum, rho * (problem.X.shape[0] + m2 - rho))
    frozen = curvature.frozen_curvatures(problem, minimum[: m1 * rho].reshape(m1, rho))
    return _Case(method, own, frozen, minimum, 1.0, "nearby contraction", 2.0**-26, 2.0**-6)


def _cases(problem: LinearProblem, rho: int, generator: torch.Generator) -> list[_Case]:
    m1, m2 = problem.W0.shape
    usual = starts.usual_start(m1, m2, rho, generator)
    full = curvature.full_curvatures(problem)
    return [
        _linear(parametrisations.diablo(problem), curvature.diablo_curvatures(problem), full),
        _linear(parametrisations.frozen_lora(problem, usual.A), curvature.frozen_curvatures(problem, usual.A), full),
        _nearby(problem, parametrisations.lora(problem, usual), rho),
    ]


def rate(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """D1 [beyond the paper]: gradient descent converges at the rate ``max_j |1 - step lambda_j|``.

    The lambda_j are the nonzero eigenvalues of the loss's Hessian: ``sigma_j(X_i)^2`` for DiaBlo, ``sigma_j(X A)^2``
    with A frozen, both on the whole space; for LoRA those at its minimum, near it. Descent, gradients by autograd, is
    followed from two starts: along the slowest eigenvector the gradient must shrink by that factor in each step, and
    from a generic start by no larger one. Measured is the largest departure, an absolute difference of factors.

    Premise: step < 2/lambda_max, margin ``1 - step lambda_max / 2``. Controls: a step beyond it, which no factor below
    1 describes; and the rate by another method's eigenvalues in place of the method's own, full fine-tuning's
    ``sigma_j(X)^2`` or, for LoRA, those with A frozen (margin: decades between the smallest ones, negative).

    And DiaBlo's limit is ``D_i = X_i^+ R_i``: from zero, by the step 1/lambda_max, after as many steps as the rate
    says bring it within 1e-10 of the first distance (the instance is drawn until 2,000 are enough). Measured is the
    distance to LAPACK's smallest solutions and to the closed form's minimiser, the larger, relative to their norm.
    Premise: the start lies in the row spaces of the X_i, and the step is short enough; margin, the smaller of the
    decades of its part beside them, relative to that norm, and ``1 - step lambda_max / 2``. Controls: a long step,
    and a start beside the row spaces, where there is room for one: descent never brings it back.

    Args:
        generator: Where the instances come from.
        number: The trial's number; it picks one of the sizes in turn.
        arithmetic: The precision and device of the instances; descent runs in float64 on their coordinates.

    Returns:
        One claim and two controls for each of the three methods, and one or two for the limit.

    Source: theory.md, L1 (descent) and L6; the classical analysis of gradient descent on a quadratic.
    """
    b, m1, m2, n, rank, rho = _SIZES[number % len(_SIZES)]
    layout = BlockLayout(m1, m2, n)

    def draw() -> LinearProblem:
        details = {"condition": 1.25, "target": "low-rank", "target_rank": rho, "noise": 0.5}
        return dynamics.in_coordinates(clear_problem(layout, b, rank, generator, arithmetic, **details))

    problem = draw()
    trial = Trial("D1", number, describe(b, m1, m2, n, rank) + f" rho={rho}")
    verdicts = []
    for case in _cases(problem, rho, generator):
        own, bound = case.curvatures, tolerance(case.quantity)
        for role, low, high in (("claim", 0.6, case.largest_step), ("control", 2.1, 2.6)):
            share = low + (high - low) * float(torch.rand(1, generator=generator))
            step = share / float(own[0])
            factors = case.factors(step, generator)
            statement = (
                f"{case.method.method}: gradient descent at the predicted rate (control: a step beyond 2/lambda)"
            )
            off = _departure(factors, curvature.contraction(own, step))
            verdicts.append(trial.vanishes(role, statement, Premise(share < 2, 1 - share / 2), off, bound))
            if role == "claim":
                statement = f"{case.method.method}: the rate by another method's eigenvalues"
                premise = Premise(False, -abs(math.log10(float(own[-1] / case.others[-1]))))
                off = _departure(factors, curvature.contraction(case.others, step))
                verdicts.append(trial.vanishes("control", statement, premise, off, bound))
    return verdicts + _limit(trial, draw, generator)


def _limit(trial: Trial, draw: Callable[[], LinearProblem], generator: torch.Generator) -> list[Verdict]:
    """Where gradient descent on DiaBlo ends, from zero and from beside the row spaces."""
    problem = draw()
    while _steps_needed(curvatures := curvature.diablo_curvatures(problem)) > _LONGEST:
        problem = draw()
    method, layout = parametrisations.diablo(problem), problem.layout
    closed = optima.diablo_optimum(reduce_problem(problem), layout).update
    limits = [flat(layout.gather(answer)) for answer in (closed, _smallest_solutions(problem, problem.R))]
    size, bound, verdicts = float(limits[-1].norm()), tolerance("limit"), []
    anywhere = layout.scatter(*layout.gather(size * gaussian(layout.in_features, layout.out_features, generator)))
    zero, unseen = torch.zeros_like(anywhere), anywhere - _smallest_solutions(problem, problem.X @ anywhere)
    too_long = 2.1 + 0.5 * float(torch.rand(1, generator=generator))
    cases = [("claim", 1.0, zero), ("control", too_long, zero)]
    if len(problem.X) < layout.block_rows:  # else the row spaces hold everything
        cases.append(("control", 1.0, unseen))
    for role, share, start in cases:
        steps = _steps_needed(curvatures) if share < 2 else _ITERATIONS
        step, begin = share / float(curvatures[0]), flat(layout.gather(start))
        last = dynamics.descend(method, "gradient descent", step, steps, start=begin).last
        beside = float((start - _smallest_solutions(problem, problem.X @ start)).norm()) / size
        margin = min(1 - share / 2, room(beside, bound.value))
        statement = "diablo: gradient descent reaches X_i^+ R_i (controls: from beside the row spaces; a long step)"
        off = max(float((last - limit).norm()) for limit in limits) / size
        verdicts.append(trial.vanishes(role, statement, Premise(margin > 0, margin), off, bound))
    return verdicts


def _steps_needed(curvatures: Tensor) -> int:
    """Steps of length 1/lambda_max until the slowest mode has shrunk to the limit's share."""
    return math.ceil(math.log(_LIMIT) / math.log1p(-float(curvatures[-1] / curvatures[0])))


def _smallest_solutions(problem: LinearProblem, R: Tensor) -> Tensor:
    """``X_i^+ R_i`` in the blocks of an m1 x m2 matrix, by LAPACK; the row space's part of S where R = X S."""
    matrix, cutoff = torch.zeros_like(problem.W0), tolerance("rank").value
    for i in written_groups(problem.layout):
        rows, cols = problem.layout.rows(i), problem.layout.cols(i)
        matrix[rows, cols] = torch.linalg.lstsq(problem.X[:, rows], R[:, cols], rcond=cutoff, driver="gelsd").solution
    return matrix


def _departure(factors: tuple[Tensor, Tensor], predicted: float) -> float:
    """How far the slowest mode's factors are from the predicted one, and a generic start's above it."""
    slowest, anywhere = factors
    predicted = min(predicted, 1.0)
    return max(float((slowest - predicted).abs().max()), float(anywhere.max()) - predicted)
