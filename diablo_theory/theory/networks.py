"""Networks whose linear layers take block updates: the problem, and how it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.architectures import Apply, Architecture
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, require_like, require_matrix

Update = tuple[Tensor, Tensor | None]
"""A layer's blocks, shape (k, d1, d2), and its tail or None: see BlockLayout.gather."""


def flat(update: Update) -> Float[Tensor, " p"]:
    """All of a layer's parameters, or their gradients, in one row: the blocks, then the tail."""
    return torch.cat([part.flatten() for part in update if part is not None])


@dataclass(frozen=True)
class Truth:
    """Which premises a network meets at generic points, known from how it was made.

    Args:
        inputs: S1's: ``rank X_i = rank X`` in every adapted layer; otherwise it fails in one of them at least.
        gradients: S2's: ``rank g_{Y_i} = rank g_Y`` in the last adapted layer; otherwise it fails there.
    """

    inputs: bool
    gradients: bool


@dataclass(frozen=True)
class NetworkProblem:
    """A network with block updates in its linear layers, under ``1/(2b) ||output - targets||_F^2``.

    Args:
        inputs: Shape (b, n), float32 or float64.
        targets: Shape (b, k), the dtype of the inputs.
        weights: The frozen weight of every linear layer, shapes (m1, m2).
        layouts: The blocks of the first layers, one a layer; layers past them take no update.
        architecture: What the layers are part of.
        truth: Which premises hold, where that is known.

    Raises:
        ValueError: If the layers do not chain, or a shape or dtype does not fit.
        NonFiniteError: If a tensor holds a NaN or an infinity.
    """

    inputs: Float[Tensor, "b n"]
    targets: Float[Tensor, "b k"]
    weights: tuple[Tensor, ...]
    layouts: tuple[BlockLayout, ...]
    architecture: Architecture
    truth: Truth | None = None

    def __post_init__(self) -> None:
        layers = self.architecture.layers
        if len(self.weights) != layers or not 1 <= len(self.layouts) <= layers:
            raise ValueError(
                f"weights must be {layers}, one a layer, and layouts from 1 to as many, "
                f"got {len(self.weights)} and {len(self.layouts)}"
            )
        require_matrix("inputs", self.inputs)
        for layer, layout in enumerate(self.layouts):
            shape = (layout.in_features, layout.out_features)
            require_like(f"weights[{layer}]", self.weights[layer], shape, self.inputs)
        output = self.architecture(self.inputs, self._dry)
        require_like("targets", self.targets, (output.shape[0], output.shape[1]), self.inputs)

    def _dry(self, layer: int, X: Tensor) -> Tensor:
        """A layer that only looks at shapes: the architecture itself shows how the layers chain."""
        weight = self.weights[layer]
        require_like(f"weights[{layer}]", weight, (X.shape[1], weight.shape[-1]), self.inputs)
        return X.new_zeros(X.shape[0], weight.shape[1])

    @property
    def description(self) -> str:
        """The network in one line, such as ``tanh MLP, b=12, 12x16/2 16x9/3`` (m1 x m2 / N)."""
        layers = " ".join(f"{lo.in_features}x{lo.out_features}/{lo.num_blocks}" for lo in self.layouts)
        return f"{self.architecture.name}, b={self.inputs.shape[0]}, {layers}"

    def loss(self, output: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        """``1/(2b) ||output - targets||_F^2``, shape ()."""
        return (output - self.targets).square().sum() / (2 * self.inputs.shape[0])

    def placed(self, arithmetic: Arithmetic) -> NetworkProblem:
        """The same problem in another precision, or on another device."""
        return dataclasses.replace(
            self,
            inputs=arithmetic.place(self.inputs),
            targets=arithmetic.place(self.targets),
            weights=tuple(arithmetic.place(weight) for weight in self.weights),
        )

    def zero_updates(self) -> list[Update]:
        """DiaBlo's start: blocks (and tails) of zeros for every adapted layer."""
        return [layout.gather(torch.zeros_like(w)) for w, layout in zip(self.weights, self.layouts, strict=False)]

    def random_updates(self, generator: torch.Generator) -> list[Update]:
        """A generic point: blocks with normal entries of a weight's own size."""
        return [
            layout.gather(gaussian(w.shape[0], w.shape[1], generator).to(w) / w.shape[0] ** 0.5)
            for w, layout in zip(self.weights, self.layouts, strict=False)
        ]


@dataclass(frozen=True)
class Pass:
    """One run of a network.

    Args:
        output: Shape (b, k).
        trace: For each linear layer its input X, shape (b, m1), and its output Y, shape (b, m2).
    """

    output: Float[Tensor, "b k"]
    trace: tuple[tuple[Tensor, Tensor], ...]


def run(problem: NetworkProblem, apply: Apply) -> Pass:
    """Run a network with linear layers of any kind, and keep what goes into them and comes out.

    Args:
        problem: The network.
        apply: Its linear layers.

    Returns:
        The output and the trace.
    """
    trace: dict[int, tuple[Tensor, Tensor]] = {}

    def traced(layer: int, X: Tensor) -> Tensor:
        Y = apply(layer, X)
        trace[layer] = (X, Y)
        return Y

    output = problem.architecture(problem.inputs, traced)
    return Pass(output, tuple(trace[layer] for layer in sorted(trace)))


def forward(problem: NetworkProblem, updates: Sequence[Update]) -> Pass:
    """Run a network with block updates, through the product that the adapter itself uses.

    Args:
        problem: The network.
        updates: One pair (blocks, tail) an adapted layer.

    Returns:
        The output and the trace.
    """

    def apply(layer: int, X: Tensor) -> Tensor:
        frozen: Tensor = X @ problem.weights[layer]
        if layer >= len(updates):
            return frozen
        return frozen + ops.block_product(X, *updates[layer], problem.layouts[layer])

    return run(problem, apply)


def dense_forward(problem: NetworkProblem, weights: Sequence[Tensor]) -> Float[Tensor, "b k"]:
    """The output, shape (b, k), with dense weights, one a layer."""
    return run(problem, lambda layer, X: X @ weights[layer]).output
