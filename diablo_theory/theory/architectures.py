"""Architectures as functions of their linear layers: the same one runs with block updates, LoRA or dense weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.errors import ConfigError, nearest

Apply = Callable[[int, Tensor], Tensor]
"""``apply(l, X)``: the output of linear layer l, shape (b, m2), on its input X, shape (b, m1)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
}
"""Activations by name; relu alone has kinks."""


@runtime_checkable
class Architecture(Protocol):
    """How a network's linear layers, numbered from 0 in the order of their use, make its output."""

    @property
    def name(self) -> str:
        """A short name for tables."""

    @property
    def layers(self) -> int:
        """How many linear layers it applies, each once."""

    def __call__(self, inputs: Tensor, apply: Apply) -> Tensor:
        """The network's output, shape (b, k), of inputs of shape (b, n)."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Look an activation up.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}.{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class MLP:
    """Linear layers with an activation between each two, the last one linear; then, if asked for, a linear head.

    Nothing stands between the last layer and the head, so that the gradient at the last layer's output Y is
    ``g_out V^T`` with V the head's weight: of a rank at most V's width.

    Args:
        depth: Linear layers before the head.
        activation: A key of ``ACTIVATIONS``.
        head: Whether one more linear layer, number ``depth``, follows.
    """

    depth: int
    activation: str = "tanh"
    head: bool = False

    def __post_init__(self) -> None:
        activation(self.activation)

    @property
    def name(self) -> str:
        """Such as ``tanh MLP with a head``."""
        return f"{self.activation} MLP{' with a head' if self.head else ''}"

    @property
    def layers(self) -> int:
        """The layers before the head, and the head."""
        return self.depth + self.head

    def __call__(self, inputs: Float[Tensor, "b n"], apply: Apply) -> Float[Tensor, "b k"]:
        """The last layer's output, through the head if there is one."""
        X = inputs
        for layer in range(self.depth - 1):
            X = activation(self.activation)(apply(layer, X))
        Y = apply(self.depth - 1, X)
        return apply(self.depth, Y) if self.head else Y


@dataclass(frozen=True)
class AttentionBlock:
    """One transformer block without norms: causal attention with one head, and an MLP, each added to its input.

    Layers 0 to 5 are the projections to queries, keys and values, the output projection, and the MLP's up and down.
    Rows are the tokens of several sequences, one sequence after the other. The attention weights of a sequence are a
    triangular matrix with a positive diagonal, hence invertible: mixing values does not lower their rank.

    Args:
        tokens: The length of a sequence.
        activation: Of the MLP, a key of ``ACTIVATIONS``.
    """

    tokens: int
    activation: str = "gelu"

    def __post_init__(self) -> None:
        activation(self.activation)

    @property
    def name(self) -> str:
        """Such as ``gelu attention block of 3 tokens``."""
        return f"{self.activation} attention block of {self.tokens} tokens"

    @property
    def layers(self) -> int:
        """Six."""
        return 6

    def __call__(self, inputs: Float[Tensor, "b m"], apply: Apply) -> Float[Tensor, "b m"]:
        """The block's output, of the shape of its input.

        Raises:
            ValueError: If rows are not whole sequences, or a width does not fit.
        """
        if inputs.shape[0] % self.tokens:
            raise ValueError(f"inputs must hold whole sequences of {self.tokens} tokens, got {inputs.shape[0]} rows")
        queries, keys, values = (apply(layer, inputs) for layer in range(3))
        stream = _add(inputs, apply(3, self._attend(queries, keys, values)))
        return _add(stream, apply(5, activation(self.activation)(apply(4, stream))))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``softmax(Q K^T / sqrt(width)) V`` within each sequence, over the tokens up to one's own."""
        if queries.shape != keys.shape:
            raise ValueError(f"queries and keys must be as wide, got {queries.shape[1]} and {keys.shape[1]}")
        Q, K, V = (rows.reshape(-1, self.tokens, rows.shape[1]) for rows in (queries, keys, values))
        future = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=Q.device).triu(1)
        scores = (Q @ K.mT / Q.shape[2] ** 0.5).masked_fill(future, -torch.inf)
        mixed: Tensor = torch.softmax(scores, dim=2) @ V
        return mixed.flatten(0, 1)


def _add(stream: Tensor, branch: Tensor) -> Tensor:
    if stream.shape != branch.shape:
        raise ValueError(f"a branch must have the width of its input, {stream.shape[1]}, got {branch.shape[1]}")
    return stream + branch
