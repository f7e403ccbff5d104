"""Seeded linear least-squares problems: chosen rank, conditioning, target and noise, with the truth attached."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import ConfigError, NonFiniteError, nearest
from diablo_theory.theory.arithmetic import (
    FLOAT64,
    Arithmetic,
    gaussian,
    require_broadcast,
    require_like,
    require_matrix,
)
from diablo_theory.theory.tolerances import tolerance

TargetKind = Literal["generic", "low-rank", "block-aligned", "sparse", "noise"]
TARGETS: tuple[str, ...] = get_args(TargetKind)
"""What T - X W0 is: anything; X dW* with dW* dense and of low rank, within the blocks, or sparse; or noise alone."""


@dataclass(frozen=True)
class LinearProblem:
    """``min over dW in S of 1/2 ||X (W0 + dW) - T||_F^2``, or a batch of such.

    Leading dimensions are batch dimensions, as in torch.linalg; those of X, W0 and T broadcast, so that problems
    which share an input need not repeat it.

    Args:
        X: Inputs, shape (..., b, m1), float32 or float64, finite.
        W0: The frozen weight, shape (..., m1, m2), the dtype of X.
        T: The target, shape (..., b, m2), the dtype of X.
        layout: The blocks that DiaBlo trains, for an m1 x m2 matrix.
        truth: The dW* that the target was made from, shape (..., m1, m2), where there is one.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit.
        NonFiniteError: If X, W0, T or the residual T - X W0 holds a NaN or an infinity.

    Source: arXiv 2506.03230v2, section 3; its linear problem in the notation Y = X W.
    """

    X: Float[Tensor, "... b m1"]
    W0: Float[Tensor, "... m1 m2"]
    T: Float[Tensor, "... b m2"]
    layout: BlockLayout
    truth: Float[Tensor, "... m1 m2"] | None = None

    def __post_init__(self) -> None:
        require_matrix("X", self.X)
        b, m1, m2 = self.X.shape[-2], self.layout.in_features, self.layout.out_features
        require_like("X", self.X, (b, m1), self.X)
        require_like("W0", self.W0, (m1, m2), self.X)
        require_like("T", self.T, (b, m2), self.X)
        require_broadcast(X=self.X, W0=self.W0, T=self.T)
        if self.truth is not None:
            require_like("truth", self.truth, (m1, m2), self.X)
        if not bool(torch.isfinite(self.R).all()):
            raise NonFiniteError("R = T - X W0 overflows; scale X or W0 down")

    @property
    def R(self) -> Float[Tensor, "... b m2"]:  # noqa: N802 - the paper's letter
        """The residual T - X W0 that the update is to explain."""
        return self.T - self.X @ self.W0

    def loss(self, dW: Float[Tensor, "... m1 m2"]) -> Float[Tensor, ...]:
        """``1/2 ||X (W0 + dW) - T||_F^2``, shape (...), in the dtype of dW, float32 or float64.

        Raises:
            ValueError: If the shape or the dtype of dW does not fit.
            NonFiniteError: If dW holds a NaN or an infinity.
        """
        m1, m2 = self.layout.in_features, self.layout.out_features
        if dW.shape[-2:] != (m1, m2):  # a single column would broadcast against R
            raise ValueError(f"dW must have shape {(m1, m2)}, got {tuple(dW.shape)}")
        require_matrix("dW", dW)
        return 0.5 * (self.X.to(dW.dtype) @ dW - self.R.to(dW.dtype)).square().sum((-2, -1))


def low_rank_inputs(
    rows: int, cols: int, rank: int, generator: torch.Generator, condition: float | None = None
) -> Float[Tensor, "rows cols"]:
    """``X = Z V`` of an exact rank: Z with orthonormal columns (the Q of a Gaussian matrix), V Gaussian.

    Gaussian Z would only multiply the conditioning: every statement is about col X and the row geometry, which is V's.

    Args:
        rows: b, at least 1.
        cols: m1, at least 1.
        rank: From 0 to min(rows, cols).
        generator: Where the draws come from.
        condition: The largest singular value over the smallest that is not zero, at least 1; those between are spaced
            geometrically. V then has orthonormal rows, scaled. None leaves V Gaussian.

    Returns:
        Shape (rows, cols), float64, entries of order one.

    Raises:
        ValueError: If the rank or the condition is out of range.
    """
    if not 0 <= rank <= min(rows, cols):
        raise ValueError(f"rank must be from 0 to min(rows, cols) = {min(rows, cols)}, got {rank}")
    if condition is not None and not 1 <= condition < math.inf:
        raise ValueError(f"condition must be at least 1 and finite, got {condition}")
    if rank == 0:
        return torch.zeros(rows, cols, dtype=torch.float64)
    Z, _ = torch.linalg.qr(gaussian(rows, rank, generator))
    V = gaussian(rank, cols, generator)
    if condition is not None:
        sigma = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
        V = sigma[:, None] * torch.linalg.qr(V.mT)[0].mT * math.sqrt(rank * cols / float(sigma.square().sum()))
    X: Tensor = Z @ V
    return X * math.sqrt(rows / rank)


def update_of_kind(
    kind: str, layout: BlockLayout, generator: torch.Generator, rank: int = 1
) -> Float[Tensor, "m1 m2"] | None:
    """A true update dW* to make a target from.

    Args:
        kind: One of ``TARGETS``.
        layout: The blocks, for "block-aligned"; "sparse" has as many entries, anywhere.
        generator: Where the draws come from.
        rank: Of a "low-rank" update, from 0 to min(m1, m2).

    Returns:
        Shape (m1, m2), float64; None for "generic", whose target is made from no update.

    Raises:
        ConfigError: If the kind is unknown.
        ValueError: If the rank is out of range.
    """
    if kind not in TARGETS:
        raise ConfigError(f"unknown target {kind!r}.{nearest(kind, TARGETS)}")
    m1, m2 = layout.in_features, layout.out_features
    if kind == "generic":
        return None
    if kind == "low-rank":
        if not 0 <= rank <= min(m1, m2):
            raise ValueError(f"target_rank must be from 0 to min(m1, m2) = {min(m1, m2)}, got {rank}")
        return gaussian(m1, rank, generator) @ gaussian(rank, m2, generator) / math.sqrt(m1 * max(rank, 1))
    dense = gaussian(m1, m2, generator) / math.sqrt(m1)
    if kind == "block-aligned":
        return layout.scatter(*layout.gather(dense))
    if kind == "sparse":
        kept = torch.randperm(m1 * m2, generator=generator)[: layout.num_parameters]
        return torch.zeros_like(dense).flatten().index_copy(0, kept, dense.flatten()[kept]).reshape(m1, m2)
    return torch.zeros_like(dense)


def linear_problem(
    layout: BlockLayout,
    rows: int,
    rank: int,
    generator: torch.Generator,
    *,
    condition: float | None = None,
    target: str = "generic",
    target_rank: int = 1,
    noise: float = 0.0,
    scale: float = 1.0,
    arithmetic: Arithmetic = FLOAT64,
) -> LinearProblem:
    """One problem: X of an exact rank, W0 with independent normal entries, T of a chosen kind.

    Args:
        layout: The blocks.
        rows: b (tokens), at least 1.
        rank: Rank of X.
        generator: Where the draws come from.
        condition: Of X; see :func:`low_rank_inputs`.
        target: One of ``TARGETS``: "generic" draws T itself, the others set ``T = X (W0 + dW*) + E``.
        target_rank: Rank of a "low-rank" dW*.
        noise: ``||E||_F / ||X dW*||_F``, at least 0, and 0 for a "generic" target, which has no dW*; for the target
            "noise" the standard deviation of E's entries, where 0 means 1.
        scale: Multiplies X and T (W0 stays of order one); within the normal numbers of the precision by a factor
            of 1/eps, so that neither the rank is lost to underflow nor a sum to overflow.
        arithmetic: The precision and device of the tensors.

    Returns:
        The problem with its truth; every shape that a layout allows, ragged ones too.

    Raises:
        ConfigError: If the target is unknown.
        ValueError: If a rank, the condition, the noise or the scale is out of range.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {noise}")
    if noise and target == "generic":
        raise ValueError(f"noise must be 0 for target 'generic', which has no signal, got {noise}")
    numbers = torch.finfo(arithmetic.dtype)
    low, high = numbers.tiny / numbers.eps, numbers.max * numbers.eps
    if not low <= scale <= high:
        raise ValueError(f"scale must lie from {low:.3g} to {high:.3g} for {arithmetic.dtype}, got {scale}")
    worst = 0.1 / tolerance("rank", arithmetic.dtype).value
    if condition is not None and rank > 1 and worst < condition < math.inf:
        raise ValueError(
            f"condition must be at most {worst:.3g} for {arithmetic.dtype}, else the rank is not {rank} in that "
            f"precision, got {condition}"
        )
    X = low_rank_inputs(rows, layout.in_features, rank, generator, condition)
    W0 = gaussian(layout.in_features, layout.out_features, generator) / layout.in_features**0.5
    truth = update_of_kind(target, layout, generator, target_rank)
    draw = gaussian(rows, layout.out_features, generator)
    if truth is None:
        T = draw
    elif target == "noise":
        T = X @ W0 + (noise or 1.0) * draw
    else:
        signal = X @ truth
        T = X @ W0 + signal + noise * (signal.norm() / draw.norm()) * draw
    problem = LinearProblem(arithmetic.place(X * scale), arithmetic.place(W0), arithmetic.place(T * scale), layout)
    return problem if truth is None else dataclasses.replace(problem, truth=arithmetic.place(truth))
