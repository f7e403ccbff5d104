"""Gradients of a network's loss by autograd: at its blocks, at its dense weights, and at LoRA's factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.duality import transposed
from diablo_theory.theory.networks import NetworkProblem, Update, dense_forward, forward, run

Factors = tuple[Tensor, Tensor]
"""A layer's LoRA factors: A, shape (m1, rho), and B, shape (rho, m2)."""


@dataclass(frozen=True)
class LayerGradients:
    """What autograd says of one layer at one point.

    Args:
        X: The layer's inputs, shape (b, m1).
        g: The loss's gradient at its output, shape (b, m2).
        blocks: The loss's gradient at the layer's blocks and tail, through the block product.
        dense: The loss's gradient at the dense weight W + D, shape (m1, m2), through an ordinary product.
        layout: The layer's blocks.
    """

    X: Float[Tensor, "b m1"]
    g: Float[Tensor, "b m2"]
    blocks: Update
    dense: Float[Tensor, "m1 m2"]
    layout: BlockLayout

    @property
    def transposed(self) -> LayerGradients:
        """The layer with X and g exchanged, whose gradients are the transposed ones: see duality.py."""
        blocks, tail = self.blocks
        swapped = (blocks.mT, None if tail is None else tail.mT)
        return LayerGradients(self.g, self.X, swapped, self.dense.mT, transposed(self.layout))


def layer_gradients(problem: NetworkProblem, updates: Sequence[Update]) -> list[LayerGradients]:
    """Inputs and gradients of every adapted layer at one point.

    Args:
        problem: The network.
        updates: One pair (blocks, tail) an adapted layer.

    Returns:
        One entry a layer.
    """
    leaves = [(b.detach().requires_grad_(), None if t is None else t.detach().requires_grad_()) for b, t in updates]
    passed = forward(problem, leaves)
    loss = problem.loss(passed.output)
    gradients = []
    dense = dense_gradients(problem, updates)
    for layer, (blocks, tail) in enumerate(leaves):
        X, Y = passed.trace[layer]
        wanted = [Y, blocks] + ([] if tail is None else [tail])
        g, *parts = torch.autograd.grad(loss, wanted, retain_graph=True)
        update = (parts[0], parts[1] if tail is not None else None)
        gradients.append(LayerGradients(X.detach(), g, update, dense[layer], problem.layouts[layer]))
    return gradients


def dense_gradients(problem: NetworkProblem, updates: Sequence[Update]) -> list[Tensor]:
    """Gradients at the dense weights ``W + D`` of the adapted layers, shapes (m1, m2), with D scattered into W."""
    adapted = [
        (weight + layout.scatter(*update)).requires_grad_()
        for weight, layout, update in zip(problem.weights, problem.layouts, updates, strict=False)
    ]
    loss = problem.loss(dense_forward(problem, [*adapted, *problem.weights[len(adapted) :]]))
    return list(torch.autograd.grad(loss, adapted))


def lora_gradients(problem: NetworkProblem, factors: Sequence[Factors], scale: float) -> list[Factors]:
    """Gradients at A and B where every adapted layer is ``X W + s X A B``.

    Args:
        problem: The network.
        factors: One pair (A, B) an adapted layer.
        scale: s, LoRA's scaling.

    Returns:
        One pair (grad A, grad B) a layer.

    Source: theory.md, notation of LoRA.
    """
    leaves = [(A.detach().requires_grad_(), B.detach().requires_grad_()) for A, B in factors]

    def apply(layer: int, X: Tensor) -> Tensor:
        frozen: Tensor = X @ problem.weights[layer]
        if layer >= len(leaves):
            return frozen
        A, B = leaves[layer]
        return frozen + scale * (X @ A @ B)

    loss = problem.loss(run(problem, apply).output)
    found = iter(torch.autograd.grad(loss, [factor for pair in leaves for factor in pair]))
    return list(zip(found, found, strict=True))
