"""Descent on the blocks: plain gradient descent on a linear problem, L-BFGS on a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.theory.networks import NetworkProblem, Update, forward
from diablo_theory.theory.problems import LinearProblem


def joint_loss(problem: LinearProblem, update: Update) -> Float[Tensor, ""]:
    """``1/2 ||X D - R||_F^2`` of all blocks at once, shape ()."""
    return 0.5 * (ops.block_product(problem.X, *update, problem.layout) - problem.R).square().sum()


def gradient_descent(problem: LinearProblem, step: float, iterations: int) -> Float[Tensor, "k m1 m2"]:
    """Plain gradient descent from D = 0 on the joint loss, its gradient taken by autograd.

    Args:
        problem: The linear problem.
        step: The step size, positive.
        iterations: Steps to take.

    Returns:
        Every iterate as a dense matrix, shape (iterations + 1, m1, m2); the first is zero.
    """
    layout = problem.layout
    blocks, tail = layout.gather(torch.zeros_like(problem.W0))
    iterates = [layout.scatter(blocks, tail)]
    for _ in range(iterations):
        leaves = [part.requires_grad_() for part in (blocks, tail) if part is not None]
        grads = torch.autograd.grad(joint_loss(problem, (blocks, tail)), leaves)
        moved = [leaf.detach() - step * grad for leaf, grad in zip(leaves, grads, strict=True)]
        blocks, tail = moved[0], moved[1] if len(moved) > 1 else None
        iterates.append(layout.scatter(blocks, tail))
    return torch.stack(iterates)


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
