"""Gradient descent and Adam on the linear problem: trajectories of every method, comparable step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.errors import ConfigError, nearest
from diablo_theory.theory.arithmetic import wide
from diablo_theory.theory.column_space import times_power
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem

OptimiserName = Literal["gradient descent", "adam"]
OPTIMISERS: tuple[str, ...] = get_args(OptimiserName)
"""Plain gradient descent, and Adam with its usual constants (0.9, 0.999, 1e-8); no weight decay."""

_ROUNDING = 1e-10


@dataclass(frozen=True)
class Descent:
    """One run of an optimiser.

    Args:
        parameters: Every iterate, shape (iterations + 1, p); the first is the start.
        gradients: The loss's gradient at each, shape (iterations + 1, p).
        losses: The loss at each, shape (iterations + 1,).
    """

    parameters: Float[Tensor, "n p"]
    gradients: Float[Tensor, "n p"]
    losses: Float[Tensor, " n"]

    @property
    def last(self) -> Float[Tensor, " p"]:
        """Where it stopped, shape (p,)."""
        return self.parameters[-1]

    @property
    def gradient_norms(self) -> Float[Tensor, " n"]:
        """Norm of the gradient at each iterate, shape (iterations + 1,)."""
        norms: Tensor = torch.linalg.vector_norm(self.gradients, dim=-1)
        return norms


def descend(
    method: Parametrisation,
    optimiser: str,
    step: float,
    iterations: int,
    *,
    decay: float = 1.0,
    start: Float[Tensor, " p"] | None = None,
) -> Descent:
    """Minimise the loss over a method's parameters, gradients by autograd.

    Args:
        method: What is trained.
        optimiser: One of ``OPTIMISERS``.
        step: The first step size, positive.
        iterations: Steps to take, at least 1.
        decay: The last step size as a fraction of the first; those between shrink geometrically.
        start: Other parameters to start from, shape (p,).

    Returns:
        The run.

    Raises:
        ConfigError: If the optimiser is unknown.
        ValueError: If step, iterations or decay is out of range.
    """
    if optimiser not in OPTIMISERS:
        raise ConfigError(f"unknown optimiser {optimiser!r}.{nearest(optimiser, OPTIMISERS)}")
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
    theta = (method.start if start is None else start).clone().requires_grad_()
    kind = torch.optim.SGD if optimiser == "gradient descent" else torch.optim.Adam
    stepper = kind([theta], lr=step)
    parameters, gradients, losses = [], [], []
    for iteration in range(iterations + 1):
        loss = method.loss(theta)
        (theta.grad,) = torch.autograd.grad(loss, theta)
        parameters.append(theta.detach().clone())
        gradients.append(theta.grad)
        losses.append(loss.detach())
        stepper.param_groups[0]["lr"] = step * decay ** (iteration / max(iterations - 1, 1))
        if iteration < iterations:
            stepper.step()
    return Descent(torch.stack(parameters), torch.stack(gradients), torch.stack(losses))


def trajectories(
    problem: LinearProblem,
    methods: Sequence[Parametrisation],
    optimiser: str,
    steps: Sequence[float],
    iterations: int,
    *,
    decay: float = 1.0,
) -> pd.DataFrame:
    """Losses of several methods on one problem, step by step.

    Args:
        problem: The problem that the methods were made for.
        methods: What is trained, each from its own start.
        optimiser: One of ``OPTIMISERS``.
        steps: First step sizes; every method is run with each.
        iterations: Steps to take.
        decay: As in :func:`descend`.

    Returns:
        One row an iterate: method, start, parameters (how many are trained), optimiser, step, iteration, loss, and
        excess over the minimum of full fine-tuning; the excess is ``1/2 ||X dW - P_X R||^2``, without cancellation.

    Raises:
        ConfigError: If the optimiser is unknown.
        ValueError: If a step, iterations or decay is out of range.
    """
    best = _best_fit(problem)
    runs = []
    for method in methods:
        for step in steps:
            run = descend(method, optimiser, step, iterations, decay=decay)
            outputs = torch.stack([method.output(theta) for theta in run.parameters])
            runs.append(
                pd.DataFrame(
                    {
                        "method": method.method,
                        "start": method.begin,
                        "parameters": method.size,
                        "optimiser": optimiser,
                        "step": step,
                        "iteration": range(iterations + 1),
                        "loss": wide(run.losses).numpy(),
                        "excess": wide(0.5 * (outputs - best).square().sum((-2, -1))).numpy(),
                    }
                )
            )
    return pd.concat(runs, ignore_index=True)


def _best_fit(problem: LinearProblem) -> Tensor:
    """P_X R, shape (b, m2)."""
    reduced = reduce_problem(problem)
    assert reduced.space.basis is not None
    return times_power(reduced.space.basis @ reduced.target, reduced.exponent)


def measured_rate(sizes: Float[Tensor, " n"]) -> float:
    """The factor per step of a sequence that shrinks geometrically in the end: the slope of its logarithm's tail.

    Args:
        sizes: Such as norms of gradients, or square roots of excesses, one a step, positive at the start. What
            follows the first value below 1e-10 of the first one is rounding and left out.

    Returns:
        The factor over the second half of what is left.
    """
    below = (sizes <= _ROUNDING * sizes[0]).nonzero()
    kept = sizes[: int(below[0])] if len(below) else sizes
    half = len(kept) // 2
    return float((kept[-1] / kept[half]) ** (1 / max(len(kept) - 1 - half, 1)))


def in_coordinates(problem: LinearProblem) -> LinearProblem:
    """The same landscape on as many rows as X has rank, in float64 on the CPU.

    ``1/2 ||Y dW - M||^2`` with ``X = U Y`` and ``P_X R = U M`` differs from the loss by what no update can reach, a
    constant. It has no directions of rounding noise, in which float32 inputs are not quite of the rank they were
    given; a gradient there never vanishes.

    Args:
        problem: The problem, of rank at least 1.

    Returns:
        A problem with the same layout, W0 and updates.

    Raises:
        ValueError: If X has rank 0.
    """
    reduced = reduce_problem(problem)
    rank = int(reduced.space.rank)
    if rank == 0:
        raise ValueError("the rank of X must be at least 1, got 0")
    X = times_power(wide(reduced.space.coordinates[:rank]), reduced.space.exponent.cpu())
    R = times_power(wide(reduced.target[:rank]), reduced.exponent.cpu())
    W0 = wide(problem.W0)
    return LinearProblem(X, W0, X @ W0 + R, problem.layout)
