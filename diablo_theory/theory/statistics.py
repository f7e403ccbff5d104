"""Sums over tokens that every closed form can be computed from: they stream, add across workers and fit on a disk.

``G = X^T X``, ``C = X^T R`` and ``s = ||R||_F^2`` take the same memory for any number of tokens. The price is that
squaring X squares its condition number: sums are kept in float64, and singular values of X below
``sqrt(4096 eps)`` of the largest are out of reach.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diablo_theory.errors import NonFiniteError, ResultsError
from diablo_theory.files import write_with
from diablo_theory.theory.column_space import ColumnSpace, decide_rank, largest_magnitude, times_power, unit_scale
from diablo_theory.theory.reduction import ReducedProblem
from diablo_theory.theory.tolerances import tolerance

_FORMAT = "diablo_theory statistics 1"
_SUMS = ("gram", "cross", "square")
_SCALARS = ("tokens", "x_exponent", "r_exponent", "single")
_SMALLEST = -1074  # of the powers of two that float64 holds


@dataclass(eq=False)
class LayerStatistics:
    """The sums of one linear layer ``Y = X W``, filled batch by batch.

    Powers of two are taken out of X and R, exactly, so that inputs of any scale neither overflow nor vanish when they
    are squared: ``X^T X = 4^x_exponent gram``, ``X^T R = 2^(x_exponent + r_exponent) cross`` and
    ``||R||_F^2 = 4^r_exponent square``.

    Args:
        gram: G, shape (m1, m1), float64; both triangles.
        cross: C, shape (m1, m2), float64.
        square: s, shape (), float64.
        tokens: Rows seen.
        x_exponent: The power of two taken out of X: that of its largest entry so far, or the smallest of float64
            while X is zero.
        r_exponent: The same of R.
        single: Whether some X came in float32 or below, so that ranks are judged by float32's rounding.
    """

    gram: Float[Tensor, "m1 m1"]
    cross: Float[Tensor, "m1 m2"]
    square: Float[Tensor, ""]
    tokens: int = 0
    x_exponent: int = _SMALLEST
    r_exponent: int = _SMALLEST
    single: bool = False

    @classmethod
    def empty(cls, in_features: int, out_features: int, device: str | torch.device = "cpu") -> LayerStatistics:
        """No tokens yet.

        Args:
            in_features: m1, at least 1.
            out_features: m2, at least 1.
            device: Where the sums live and are computed.

        Raises:
            ValueError: If a size is below 1.
        """
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        return cls(gram, gram.new_zeros(in_features, out_features), gram.new_zeros(()))

    @classmethod
    def of(cls, batches: Iterable[Sequence[Tensor]]) -> LayerStatistics:
        """The sums over batches ``(X, R)``, such as those of a DataLoader.

        Raises:
            ValueError: If there is no batch, or one does not fit the first.
            TypeError: If a tensor does not hold floating-point numbers.
            NonFiniteError: If one holds a NaN or an infinity.
        """
        statistics: LayerStatistics | None = None
        for X, R in batches:
            if statistics is None:
                m1, m2 = (tensor.shape[-1] if tensor.ndim else 1 for tensor in (X, R))
                statistics = cls.empty(m1, m2, X.device)
            statistics.add(X, R)
        if statistics is None:
            raise ValueError("batches must hold at least one pair (X, R), got none")
        return statistics

    def add(self, X: Shaped[Tensor, "... m1"], R: Shaped[Tensor, "... m2"]) -> None:
        """Add a batch of tokens; nothing is added if it does not fit.

        Args:
            X: Inputs, shape (..., m1), any floating-point dtype; the products are taken in float64.
            R: Residuals, shape (..., m2), with the same leading dimensions.

        Raises:
            ValueError: If a shape or a device does not fit.
            TypeError: If a tensor does not hold floating-point numbers.
            NonFiniteError: If one holds a NaN or an infinity.
        """
        m1, m2 = self.cross.shape
        x, r = self._rows("X", X, m1), self._rows("R", R, m2)
        if X.shape[:-1] != R.shape[:-1]:
            raise ValueError(f"X and R must have as many tokens, got {tuple(X.shape[:-1])} and {tuple(R.shape[:-1])}")
        (x, e), (r, f) = _unit(x), _unit(r)
        narrow = len(x) > 0 and X.dtype != torch.float64
        batch = LayerStatistics(x.mT @ x, x.mT @ r, r.square().sum(), len(x), e, f, narrow)
        vars(self).update(vars(self.merge(batch)))

    def _rows(self, name: str, tensor: Tensor, size: int) -> Float[Tensor, "tokens m"]:
        """A tensor's tokens as rows of float64, if it fits."""
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must hold floating-point numbers, got {tensor.dtype}")
        if tensor.ndim < 1 or tensor.shape[-1] != size:
            raise ValueError(f"{name} must have {size} columns, got shape {tuple(tensor.shape)}")
        if tensor.device != self.gram.device:
            raise ValueError(f"{name} must be on {self.gram.device}, where the sums are, got {tensor.device}")
        rows = tensor.detach().reshape(-1, size).double()
        if not bool(largest_magnitude(rows).isfinite()):
            raise NonFiniteError(f"{name} holds a NaN or an infinity; nothing of this batch was added")
        return rows

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """The sums over the tokens of both, as new tensors.

        Raises:
            ValueError: If the two are of different shapes or devices.
        """
        if self.cross.shape != other.cross.shape:
            raise ValueError(f"other must be of shape {tuple(self.cross.shape)}, got {tuple(other.cross.shape)}")
        if self.gram.device != other.gram.device:
            raise ValueError(f"other must be on {self.gram.device}, got {other.gram.device}")
        e, f = max(self.x_exponent, other.x_exponent), max(self.r_exponent, other.r_exponent)
        one, two = self._sums_at(e, f), other._sums_at(e, f)
        gram, cross, square = (a + b for a, b in zip(one, two, strict=True))
        return LayerStatistics(gram, cross, square, self.tokens + other.tokens, e, f, self.single or other.single)

    def _sums_at(self, e: int, f: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gram, cross and square for exponents at least as large as the present ones."""
        x, r = self.x_exponent - e, self.r_exponent - f
        return _scaled(self.gram, 2 * x), _scaled(self.cross, x + r), _scaled(self.square, 2 * r)

    def reduce(self, rtol: float | None = None) -> ReducedProblem:
        """Coordinates of X and P_X R from one eigendecomposition of G: what all closed forms take.

        With ``G = V S^2 V^T``, ``Y = S V^T`` and ``M = S^{-1} V^T C``. What is captured differs from the direct
        computation's, at the same rtol, by at most the "streamed" tolerance times cond(X)^2 of what is captured, with
        cond(X) taken over the singular values that are kept.

        Args:
            rtol: Singular values of X at or below ``rtol`` times the largest count as zero. By default the
                "streamed rank" tolerance, or the "rank" tolerance of float32 where an input came in it.

        Returns:
            The reduced problem; its space has no basis.

        Raises:
            ValueError: If rtol is below ``sqrt(eps)`` or not below 1, or nothing was added yet.
        """
        if self.tokens == 0:
            raise ValueError("the statistics hold no tokens; add a batch first")
        floor = math.sqrt(torch.finfo(torch.float64).eps)
        default = max(tolerance("streamed rank").value, tolerance("rank", torch.float32).value if self.single else 0.0)
        relative = default if rtol is None else rtol
        if not floor <= relative < 1:
            raise ValueError(f"rtol must be at least sqrt(eps) = {floor:.3g} and below 1, got {relative}")
        squares, V = torch.linalg.eigh(self.gram)
        sigma = squares.flip(0).clamp(min=0).sqrt()
        largest = sigma[0]
        cutoff = relative * largest
        kept = sigma > cutoff
        Y = (sigma * kept)[:, None] * V.mT.flip(0)
        M = torch.where(kept, 1 / squares.flip(0), 0.0)[:, None] * (Y @ self.cross)
        decision = decide_rank(sigma, cutoff, floor * largest, math.log10(relative / floor))
        return ReducedProblem(
            ColumnSpace(Y, torch.tensor(self.x_exponent, device=Y.device), decision, cutoff, floor * largest),
            target=M,
            outside=(self.square - M.square().sum()).clamp(min=0),
            exponent=torch.tensor(self.r_exponent, device=Y.device),
        )


def _unit(rows: Tensor) -> tuple[Tensor, int]:
    """Rows at unit scale and the exponent taken out; of zeros the smallest, so that they never set the scale."""
    scaled, exponent = unit_scale(rows)
    return scaled, int(exponent) if bool(scaled.any()) else _SMALLEST


def _scaled(tensor: Tensor, power: int) -> Tensor:
    """``tensor 2^power`` for a power of at most zero; 2^-2200 takes every number of float64 to zero."""
    return tensor if power == 0 else times_power(tensor, torch.tensor(max(power, -2200), device=tensor.device))


def energy_rank(space: ColumnSpace, share: float = 0.99) -> int:
    """The smallest k with ``sum_{j<=k} sigma_j^2 >= share sum_j sigma_j^2``: directions that hold a share of X.

    Args:
        space: Of one X, direct or from sums; singular values at or below its cutoff count as zero.
        share: Above 0, at most 1.

    Returns:
        k, from 0 (for X = 0) to the rank.

    Raises:
        ValueError: If the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    energy = space.coordinates.square().sum(-1).cumsum(0)
    if not bool(energy.any()):
        return 0
    return int((energy < share * energy[-1] * (1 - torch.finfo(torch.float64).eps)).sum()) + 1


def save_statistics(path: Path, layers: Mapping[str, LayerStatistics]) -> None:
    """Write the sums of several layers to one safetensors file, whole or not at all.

    Args:
        path: The file; replaced if it exists.
        layers: By the layer's name.
    """
    tensors = {
        f"{name}:{field}": getattr(layer, field).cpu().contiguous()
        for name, layer in layers.items()
        for field in _SUMS
    }
    scalars = {name: {field: getattr(layer, field) for field in _SCALARS} for name, layer in layers.items()}
    metadata = {"format": _FORMAT, "layers": json.dumps(scalars)}
    write_with(path, lambda aside: safetensors.torch.save_file(tensors, aside, metadata))


def load_statistics(path: Path) -> dict[str, LayerStatistics]:
    """Read what :func:`save_statistics` wrote, onto the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ResultsError: If the file is damaged or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such statistics file", str(path))
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == _FORMAT:
                return {name: _layer(file, name, scalars) for name, scalars in json.loads(metadata["layers"]).items()}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is truncated or damaged ({error}); write it again") from error
    raise ResultsError(f"{path} is no statistics file of this version: its format is {metadata.get('format')!r}")


def _layer(file: Any, name: str, scalars: Mapping[str, Any]) -> LayerStatistics:
    sums = (file.get_tensor(f"{name}:{field}") for field in _SUMS)
    return LayerStatistics(*sums, *(scalars[field] for field in _SCALARS))
