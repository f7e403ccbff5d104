"""Descent on the blocks of a network: L-BFGS."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.optimize
import torch
from torch import Tensor

from diablo_theory.theory.arithmetic import Arithmetic
from diablo_theory.theory.networks import NetworkProblem, Update, flat, forward


def minimise_blocks(problem: NetworkProblem, iterations: int, gradient_tolerance: float) -> list[Update]:
    """L-BFGS on all blocks of a network, from DiaBlo's start.

    The search works in float64 whatever the problem's dtype: a line search compares losses, and in float32 their
    differences round away long before the gradient is small.

    Args:
        problem: The network.
        iterations: At most so many.
        gradient_tolerance: Stop where no entry of the gradient is larger.

    Returns:
        The updates where it stopped, in the problem's dtype.
    """
    wide = problem.placed(Arithmetic(torch.float64, str(problem.inputs.device)))
    start = wide.zero_updates()

    def loss_and_gradient(theta: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        leaf = torch.tensor(theta, device=wide.inputs.device, requires_grad=True)
        loss = wide.loss(forward(wide, _unflatten(leaf, start)).output)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient.cpu().numpy()

    found = scipy.optimize.minimize(
        loss_and_gradient,
        np.zeros(sum(flat(update).numel() for update in start)),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxcor": 50,
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "gtol": gradient_tolerance,
            "ftol": 0.0,
        },
    )
    theta = torch.from_numpy(found.x).to(problem.inputs)
    return _unflatten(theta, start)


def _unflatten(theta: Tensor, like: list[Update]) -> list[Update]:
    """Cut a vector into updates of given shapes: the inverse of :func:`flat` on every layer in turn."""
    sizes = [part.numel() for update in like for part in update if part is not None]
    pieces = iter(torch.split(theta, sizes))
    return [
        (next(pieces).view_as(blocks), None if tail is None else next(pieces).view_as(tail)) for blocks, tail in like
    ]
