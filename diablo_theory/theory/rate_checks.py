"""D1: gradient descent converges at the rate that the curvature predicts, for DiaBlo and LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import curvature, dynamics, parametrisations
from diablo_theory.theory.arithmetic import Arithmetic, gaussian
from diablo_theory.theory.instances import clear_problem
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe

# rows b, m1, m2, N, rank X, LoRA's rank: within L2's premise; ragged; beyond the premise
_SIZES = ((24, 12, 9, 3, 3, 1), (24, 13, 8, 3, 4, 2), (20, 8, 11, 4, 5, 2))
_ITERATIONS = 60


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
    A = parametrisations.kaiming_uniform(problem.W0.shape[0], rho, generator)
    full = curvature.full_curvatures(problem)
    return [
        _linear(parametrisations.diablo(problem), curvature.diablo_curvatures(problem), full),
        _linear(parametrisations.frozen_lora(problem, A), curvature.frozen_curvatures(problem, A), full),
        _nearby(problem, parametrisations.lora(problem, A), rho),
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

    Args:
        generator: Where the instances come from.
        number: The trial's number; it picks one of the sizes in turn.
        arithmetic: The precision and device of the instances; descent runs in float64 on their coordinates.

    Returns:
        One claim and two controls for each of the three methods.

    Source: theory.md, L1 (descent) and L6; the classical analysis of gradient descent on a quadratic.
    """
    b, m1, m2, n, rank, rho = _SIZES[number % len(_SIZES)]
    layout = BlockLayout(m1, m2, n)
    drawn = clear_problem(
        layout, b, rank, generator, arithmetic, condition=1.25, target="low-rank", target_rank=rho, noise=0.5
    )
    problem = dynamics.in_coordinates(drawn)
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
    return verdicts


def _departure(factors: tuple[Tensor, Tensor], predicted: float) -> float:
    """How far the slowest mode's factors are from the predicted one, and a generic start's above it."""
    slowest, anywhere = factors
    predicted = min(predicted, 1.0)
    return max(float((slowest - predicted).abs().max()), float(anywhere.max()) - predicted)
