"""Networks whose linear layers take block updates, and seeded ones that meet or break the premises of S1 and S2."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.architectures import MLP, Apply, Architecture, AttentionBlock
from diablo_theory.theory.arithmetic import FLOAT64, Arithmetic, gaussian, require_like, require_matrix
from diablo_theory.theory.column_space import written_groups
from diablo_theory.theory.duality import transposed

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


def mlp_problem(
    sizes: Sequence[int],
    num_blocks: Sequence[int],
    samples: int,
    generator: torch.Generator,
    *,
    repeats: int = 1,
    activation: str = "tanh",
    head_width: int | None = None,
    arithmetic: Arithmetic = FLOAT64,
) -> NetworkProblem:
    """A generic MLP and data, every layer but the head adapted.

    With ``repeats`` above one every input comes that often, each time with another target: rank X stays at most
    ``samples`` in every layer while no update can bring the loss to zero, so that a vanishing gradient says
    something. S1's premise holds where ``samples`` is at most the size of every input group (with relu, whose units
    can be dead, where it is well below), S2's where ``head_width`` is at most that of every output group. Targets
    have standard deviation 0.3, which keeps tanh out of the saturation where descent stalls.

    Args:
        sizes: Widths, at least two: inputs, hidden ones, the last layer's outputs.
        num_blocks: N of each layer, ``len(sizes) - 1`` of them.
        samples: Distinct inputs.
        generator: Where the draws come from.
        repeats: How often each comes.
        activation: A key of ``ACTIVATIONS``.
        head_width: q, the width of a frozen linear head, or None for none.
        arithmetic: The precision and device of the tensors.

    Returns:
        The problem, with b = samples * repeats, and its truth.
    """
    adapted = _layouts(itertools.pairwise(sizes), num_blocks)
    outputs = sizes[-1] if head_width is None else head_width
    head = [] if head_width is None else [(sizes[-1], head_width)]
    architecture = MLP(len(adapted), activation, head=bool(head))
    inputs = gaussian(samples, sizes[0], generator)
    return _generic(architecture, inputs, repeats, adapted, head, outputs, generator).placed(arithmetic)


def attention_problem(
    width: int,
    hidden: int,
    num_blocks: int,
    sequences: int,
    tokens: int,
    generator: torch.Generator,
    *,
    repeats: int = 1,
    activation: str = "gelu",
    arithmetic: Arithmetic = FLOAT64,
) -> NetworkProblem:
    """A generic attention block and data, all six layers adapted; premises as in :func:`mlp_problem`.

    Tokens have standard deviation 0.5, which keeps attention weights away from 0 and 1, where values lose their rank.

    Args:
        width: Of the tokens, queries, keys and values.
        hidden: Of the MLP.
        num_blocks: N of every layer.
        sequences: Distinct ones; ``sequences * tokens`` is the rank of generic inputs that are wide enough.
        tokens: In each sequence.
        generator: Where the draws come from.
        repeats: How often each sequence comes, each time with other targets.
        activation: A key of ``ACTIVATIONS``.
        arithmetic: The precision and device of the tensors.

    Returns:
        The problem, with b = sequences * tokens * repeats, and its truth.
    """
    shapes = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
    adapted = _layouts(shapes, [num_blocks] * len(shapes))
    inputs = 0.5 * gaussian(sequences * tokens, width, generator)
    problem = _generic(AttentionBlock(tokens, activation), inputs, repeats, adapted, [], width, generator)
    return problem.placed(arithmetic)


def _layouts(shapes: Iterable[tuple[int, int]], num_blocks: Sequence[int]) -> tuple[BlockLayout, ...]:
    return tuple(BlockLayout(m1, m2, n) for (m1, m2), n in zip(shapes, num_blocks, strict=True))


def _generic(
    architecture: Architecture,
    inputs: Tensor,
    repeats: int,
    adapted: tuple[BlockLayout, ...],
    head: list[tuple[int, int]],
    outputs: int,
    generator: torch.Generator,
) -> NetworkProblem:
    """Random targets and weights around given distinct inputs, and the truth that follows from the counts."""
    samples = len(inputs)
    shapes = [*((layout.in_features, layout.out_features) for layout in adapted), *head]
    return NetworkProblem(
        inputs=inputs.repeat(repeats, 1),
        targets=0.3 * gaussian(samples * repeats, outputs, generator),
        weights=tuple(gaussian(m1, m2, generator) / m1**0.5 for m1, m2 in shapes),
        layouts=adapted,
        architecture=architecture,
        truth=Truth(
            inputs=all(_groups_hold(samples, layout) for layout in adapted),
            gradients=_groups_hold(min(samples * repeats, outputs), transposed(adapted[-1])),
        ),
    )


def _groups_hold(rank: int, layout: BlockLayout) -> bool:
    """Whether generic inputs of this rank, or of all columns if they are fewer, have it in every column group."""
    sizes = [layout.rows(i).stop - layout.rows(i).start for i in written_groups(layout)]
    return bool(min(rank, layout.in_features) <= min(sizes))
