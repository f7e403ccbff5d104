"""Seeded instances: linear least-squares problems of a chosen rank, and small tanh networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import NonFiniteError

Update = tuple[Tensor, Tensor | None]
"""A layer's blocks, shape (k, d1, d2), and its tail or None: see BlockLayout.gather."""


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, so that no draw depends on what else ran."""
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, cols: int, generator: torch.Generator) -> Float[Tensor, "rows cols"]:
    """Independent standard normal entries, shape (rows, cols), float64."""
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64)


def _require(name: str, value: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != dtype:
        raise ValueError(f"{name} must have the dtype of the inputs, {dtype}, got {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"{name} holds a NaN or an infinity; theory problems need finite numbers")


def _require_matrix(name: str, value: Tensor) -> None:
    if value.ndim != 2 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be a float32 or float64 matrix, got {value.dtype} with {value.ndim} dimensions")


@dataclass(frozen=True)
class LinearProblem:
    """``min over dW in S of 1/2 ||X (W0 + dW) - T||_F^2``.

    Args:
        X: Inputs, shape (b, m1), float32 or float64, finite.
        W0: The frozen weight, shape (m1, m2), the dtype of X.
        T: The target, shape (b, m2), the dtype of X.
        layout: The blocks that DiaBlo trains, for an m1 x m2 matrix.

    Raises:
        ValueError: If a shape or a dtype does not fit.
        NonFiniteError: If X, W0, T or the residual T - X W0 holds a NaN or an infinity.

    Source: arXiv 2506.03230v2, section 3; its linear problem in the notation Y = X W.
    """

    X: Float[Tensor, "b m1"]
    W0: Float[Tensor, "m1 m2"]
    T: Float[Tensor, "b m2"]
    layout: BlockLayout

    def __post_init__(self) -> None:
        _require_matrix("X", self.X)
        b, m1, m2 = self.X.shape[0], self.layout.in_features, self.layout.out_features
        for name, value, shape in (
            ("X", self.X, (b, m1)),
            ("W0", self.W0, (m1, m2)),
            ("T", self.T, (b, m2)),
        ):
            _require(name, value, shape, self.X.dtype)
        if not bool(torch.isfinite(self.R).all()):
            raise NonFiniteError("R = T - X W0 overflows; scale X or W0 down")

    @property
    def R(self) -> Float[Tensor, "b m2"]:  # noqa: N802 - the paper's letter
        """The residual T - X W0 that the update is to explain."""
        return self.T - self.X @ self.W0


def low_rank_inputs(rows: int, cols: int, rank: int, generator: torch.Generator) -> Float[Tensor, "rows cols"]:
    """``X = Z V`` of an exact rank: Z with orthonormal columns (the Q of a Gaussian matrix), V Gaussian.

    Gaussian Z would only multiply the conditioning: every statement is about col X and the row geometry, which is V's.

    Args:
        rows: b, at least 1.
        cols: m1, at least 1.
        rank: From 0 to min(rows, cols).
        generator: Where the draws come from.

    Returns:
        Shape (rows, cols), float64, entries of order one.

    Raises:
        ValueError: If the rank is out of range.
    """
    if not 0 <= rank <= min(rows, cols):
        raise ValueError(f"rank must be from 0 to min(rows, cols) = {min(rows, cols)}, got {rank}")
    Z, _ = torch.linalg.qr(gaussian(rows, rank, generator)) if rank else (torch.zeros(rows, 0).double(), None)
    X: Tensor = Z @ gaussian(rank, cols, generator)
    return X * math.sqrt(rows / max(rank, 1))


def linear_problem(
    layout: BlockLayout,
    rows: int,
    rank: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> LinearProblem:
    """A generic problem: X of an exact rank, W0 and T with independent normal entries.

    Args:
        layout: The blocks.
        rows: b, at least 1.
        rank: Rank of X.
        generator: Where the draws come from.
        dtype: float32 or float64.
        scale: Multiplies X and T (W0 stays of order one).

    Returns:
        The problem; every shape that a layout allows, ragged ones too.
    """
    X = low_rank_inputs(rows, layout.in_features, rank, generator) * scale
    W0 = gaussian(layout.in_features, layout.out_features, generator) / layout.in_features**0.5
    T = gaussian(rows, layout.out_features, generator) * scale
    return LinearProblem(X.to(dtype), W0.to(dtype), T.to(dtype), layout)


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
        _require_matrix("inputs", self.inputs)
        b, width = self.inputs.shape[0], self.layouts[0].in_features
        _require("inputs", self.inputs, (b, width), self.inputs.dtype)
        for depth, (weight, layout) in enumerate(zip(self.weights, self.layouts, strict=True)):
            if layout.in_features != width:
                raise ValueError(f"layouts[{depth}] must have {width} in_features, got {layout.in_features}")
            width = layout.out_features
            _require(f"weights[{depth}]", weight, (layout.in_features, width), self.inputs.dtype)
        _require("targets", self.targets, (b, width), self.inputs.dtype)

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
