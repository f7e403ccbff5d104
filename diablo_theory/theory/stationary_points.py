"""Stationary points of the blocks that need no descent: targets that make a given point one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.theory.arithmetic import Arithmetic, gaussian
from diablo_theory.theory.networks import NetworkProblem, Update, forward
from diablo_theory.theory.tolerances import tolerance


def output_jacobian(problem: NetworkProblem, updates: Sequence[Update]) -> Float[Tensor, "bk p"]:
    """The derivative of the output's entries by all block parameters, one backward pass an entry.

    Args:
        problem: The network.
        updates: One pair (blocks, tail) an adapted layer.

    Returns:
        Shape (b k, p): rows as in ``output.flatten()``, columns as in :func:`flat`, layer after layer.
    """
    leaves = [(b.detach().requires_grad_(), None if t is None else t.detach().requires_grad_()) for b, t in updates]
    parts = [part for update in leaves for part in update if part is not None]
    output = forward(problem, leaves).output
    rows = []
    for entry in output.flatten():
        gradients = torch.autograd.grad(entry, parts, retain_graph=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def with_stationary_targets(
    problem: NetworkProblem, updates: Sequence[Update], generator: torch.Generator
) -> NetworkProblem:
    """The problem with targets for which the blocks are stationary at a given point, though nothing is fitted.

    The blocks' gradient is ``J^T e / b`` with J the output's Jacobian and ``e = output - targets``; a random e without
    its part in col J makes it zero. That takes more output entries than block parameters, or repeated inputs. Any
    point will do, on a network with kinks too, where descent would stall. Worked out in float64.

    Args:
        problem: The network; its targets are ignored.
        updates: The point, one pair (blocks, tail) an adapted layer.
        generator: Where e comes from.

    Returns:
        The problem, in its own dtype, with such targets.

    Raises:
        ValueError: If every residual has a part that the blocks can fit: no more output entries than rank J.
    """
    wide = problem.placed(Arithmetic(torch.float64, str(problem.inputs.device)))
    point = [(blocks.double(), None if tail is None else tail.double()) for blocks, tail in updates]
    output = forward(wide, point).output
    U, sigma, _ = torch.linalg.svd(output_jacobian(wide, point), full_matrices=False)
    fitted = U[:, sigma > tolerance("rank").value * sigma[0]]
    if fitted.shape[0] == fitted.shape[1]:
        raise ValueError(
            f"the network must have more output entries than its blocks can fit, got {len(fitted)} of each"
        )
    wanted = gaussian(output.shape[0], output.shape[1], generator).to(output).flatten()
    residual = wanted - fitted @ (fitted.T @ wanted)
    targets = output - residual.view_as(output)
    return dataclasses.replace(problem, targets=targets.to(problem.targets))
