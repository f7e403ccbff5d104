"""Gradients and descent on the blocks of a network: L-BFGS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.theory.networks import NetworkProblem, Update, forward


@dataclass(frozen=True)
class LayerGradients:
    """What autograd says of one layer.

    Args:
        X: The layer's inputs, shape (b, m1).
        g: The loss's gradient at its output, shape (b, m2).
        blocks: The loss's gradient at the layer's blocks and tail, through the block product.
    """

    X: Float[Tensor, "b m1"]
    g: Float[Tensor, "b m2"]
    blocks: Update


def layer_gradients(problem: NetworkProblem, updates: list[Update]) -> list[LayerGradients]:
    """Inputs, output gradients and block gradients of every layer at one point.

    Args:
        problem: The network.
        updates: One pair (blocks, tail) a layer.

    Returns:
        One entry a layer.
    """
    leaves = [(b.detach().requires_grad_(), None if t is None else t.detach().requires_grad_()) for b, t in updates]
    trace = forward(problem, leaves)
    loss = problem.loss(trace[-1][1])
    gradients = []
    for (X, Y), (blocks, tail) in zip(trace, leaves, strict=True):
        wanted = [Y, blocks] + ([] if tail is None else [tail])
        g, *parts = torch.autograd.grad(loss, wanted, retain_graph=True)
        gradients.append(LayerGradients(X.detach(), g, (parts[0], parts[1] if tail is not None else None)))
    return gradients


def minimise_blocks(problem: NetworkProblem, iterations: int, gradient_tolerance: float) -> list[Update]:
    """L-BFGS with a strong Wolfe line search on all blocks of a network, from DiaBlo's start.

    Args:
        problem: The network.
        iterations: At most so many.
        gradient_tolerance: Stop where no entry of the gradient is larger.

    Returns:
        The updates where it stopped.
    """
    updates = [(b.requires_grad_(), None if t is None else t.requires_grad_()) for b, t in problem.zero_updates()]
    leaves = [part for update in updates for part in update if part is not None]
    optimiser = torch.optim.LBFGS(
        leaves,
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=50,
        tolerance_grad=gradient_tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimiser.zero_grad()
        loss = problem.loss(forward(problem, updates)[-1][1])
        torch.autograd.backward(loss)
        return float(loss.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return [(b.detach(), None if t is None else t.detach()) for b, t in updates]
