"""Seeded small networks whose linear layers take block updates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import gaussian, require_like, require_matrix

Update = tuple[Tensor, Tensor | None]
"""A layer's blocks, shape (k, d1, d2), and its tail or None: see BlockLayout.gather."""


@dataclass(frozen=True)
class NetworkProblem:
    """A tanh network ``h <- tanh(h (W + D))`` with a linear last layer, under ``1/(2b) ||output - targets||_F^2``.

    Args:
        inputs: Shape (b, sizes[0]), float64.
        targets: Shape (b, sizes[-1]), float64.
        weights: The frozen weights, shapes (sizes[l], sizes[l+1]).
        layouts: One a layer, for its weight.

    Raises:
        ValueError: If the layers do not chain, or a shape or dtype does not fit.
        NonFiniteError: If a tensor holds a NaN or an infinity.
    """

    inputs: Float[Tensor, "b n"]
    targets: Float[Tensor, "b k"]
    weights: tuple[Tensor, ...]
    layouts: tuple[BlockLayout, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.layouts) or not self.weights:
            raise ValueError(
                f"weights and layouts must be as many, at least one, got {len(self.weights)} and {len(self.layouts)}"
            )
        require_matrix("inputs", self.inputs)
        b, width = self.inputs.shape[0], self.layouts[0].in_features
        require_like("inputs", self.inputs, (b, width), self.inputs)
        for depth, (weight, layout) in enumerate(zip(self.weights, self.layouts, strict=True)):
            if layout.in_features != width:
                raise ValueError(f"layouts[{depth}] must have {width} in_features, got {layout.in_features}")
            width = layout.out_features
            require_like(f"weights[{depth}]", weight, (layout.in_features, width), self.inputs)
        require_like("targets", self.targets, (b, width), self.inputs)

    def loss(self, output: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        """``1/(2b) ||output - targets||_F^2``, shape ()."""
        return (output - self.targets).square().sum() / (2 * self.inputs.shape[0])

    def zero_updates(self) -> list[Update]:
        """DiaBlo's start: blocks (and tails) of zeros for every layer."""
        return [layout.gather(torch.zeros_like(w)) for w, layout in zip(self.weights, self.layouts, strict=True)]

    def random_updates(self, generator: torch.Generator) -> list[Update]:
        """A generic point: blocks with normal entries of a weight's own size."""
        return [
            layout.gather(gaussian(w.shape[0], w.shape[1], generator).to(w.dtype) / w.shape[0] ** 0.5)
            for w, layout in zip(self.weights, self.layouts, strict=True)
        ]


def forward(problem: NetworkProblem, updates: Sequence[Update]) -> list[tuple[Tensor, Tensor]]:
    """Run the network with block updates, through the product that the adapter itself uses.

    Args:
        problem: The network.
        updates: One pair (blocks, tail) a layer.

    Returns:
        For each layer its input X, shape (b, m1), and its output before tanh Y, shape (b, m2).
    """
    trace, X = [], problem.inputs
    for weight, layout, (blocks, tail) in zip(problem.weights, problem.layouts, updates, strict=True):
        Y = X @ weight + ops.block_product(X, blocks, tail, layout)
        trace.append((X, Y))
        X = torch.tanh(Y)
    return trace


def dense_forward(problem: NetworkProblem, weights: Sequence[Tensor]) -> Float[Tensor, "b k"]:
    """Run the network with dense weights: the oracle that a reader can check by eye.

    Returns:
        The last layer's output, shape (b, sizes[-1]).
    """
    Y = problem.inputs @ weights[0]
    for weight in weights[1:]:
        Y = torch.tanh(Y) @ weight
    return Y


def network_problem(
    sizes: Sequence[int], num_blocks: Sequence[int], samples: int, generator: torch.Generator, *, repeats: int = 1
) -> NetworkProblem:
    """A generic tanh network and data.

    With ``repeats`` above one every input comes that often, each time with another target: rank X stays at most
    ``samples`` in every layer while no update can bring the loss to zero, so that a vanishing gradient says
    something. The premise of S1 holds generically where ``samples`` is at most d1 in every layer. Targets have
    standard deviation 0.3, which keeps tanh out of the saturation where descent stalls.

    Args:
        sizes: Widths, at least two: inputs, hidden ones, outputs.
        num_blocks: N of each layer, ``len(sizes) - 1`` of them.
        samples: Distinct inputs.
        generator: Where the draws come from.
        repeats: How often each comes.

    Returns:
        The problem, with b = samples * repeats.
    """
    shapes = list(itertools.pairwise(sizes))
    return NetworkProblem(
        inputs=gaussian(samples, sizes[0], generator).repeat(repeats, 1),
        targets=0.3 * gaussian(samples * repeats, sizes[-1], generator),
        weights=tuple(gaussian(m1, m2, generator) / m1**0.5 for m1, m2 in shapes),
        layouts=tuple(BlockLayout(m1, m2, n) for (m1, m2), n in zip(shapes, num_blocks, strict=True)),
    )
