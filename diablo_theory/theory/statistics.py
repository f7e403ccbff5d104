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

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diablo_theory.errors import NonFiniteError, ResultsError
from diablo_theory.files import write_tensors
from diablo_theory.theory.column_space import ColumnSpace, decide_rank, largest_magnitude, times_power
from diablo_theory.theory.reduction import ReducedProblem
from diablo_theory.theory.tolerances import tolerance

_FORMAT = "diablo_theory statistics 3"
_EXPONENTS = ("x_exponent", "r_exponent")
_STEP = 256  # of the powers of two that are taken out: what is left of the largest entry is within 2^128 of 1
_SMALLEST = -1024  # of these powers: that of zeros, which never set the scale
_BESIDE = 5  # columns beside X: tokens in float64, in float32, in less, first of a batch; ||r||


@dataclass(eq=False)
class LayerStatistics:
    """The sums of one linear layer ``Y = X W``, filled batch by batch.

    One matrix holds them all, ``sums = [X c]^T [X c R]``, whose columns c are, for each token, 1 or 0 for the
    precision in which x came (float64, float32, less), 1 for the first of a batch, and ||r||. A batch enters by one
    matrix product in place: that takes little more than the products themselves, and an interrupt finds it in all of
    the sums or in none.

    Powers of two are taken out of X and R, exactly, so that inputs of any scale neither overflow nor vanish when they
    are squared: ``X^T X = 4^x_exponent gram``, ``X^T R = 2^(x_exponent + r_exponent) cross`` and
    ``||R||_F^2 = 4^r_exponent square``.

    Args:
        sums: Shape (m1 + 5, m1 + 5 + m2), float64; changed in place by :meth:`add`.
        x_exponent: The power of two taken out of X: the multiple of 256 nearest to that of its largest entry so far,
            or the smallest, -1024, while X is zero.
        r_exponent: The same of R.
    """

    sums: Float[Tensor, "rows cols"]
    x_exponent: int = _SMALLEST
    r_exponent: int = _SMALLEST

    @property
    def in_features(self) -> int:
        """m1."""
        return self.sums.shape[0] - _BESIDE

    @property
    def out_features(self) -> int:
        """m2."""
        return self.sums.shape[1] - self.sums.shape[0]

    @property
    def gram(self) -> Float[Tensor, "m1 m1"]:
        """G, shape (m1, m1), both triangles; a view."""
        return self.sums[: self.in_features, : self.in_features]

    @property
    def cross(self) -> Float[Tensor, "m1 m2"]:
        """C, shape (m1, m2); a view."""
        return self.sums[: self.in_features, self.in_features + _BESIDE :]

    @property
    def square(self) -> Float[Tensor, ""]:
        """s, shape (); a view."""
        return self.sums[-1, self.in_features + 4]

    @property
    def tokens_by_precision(self) -> tuple[int, int, int]:
        """Rows whose x came in float64, in float32 and in less; the coarsest judges the rank."""
        wide, single, less = (int(self.sums[self.in_features + i, self.in_features + i]) for i in range(3))
        return wide, single, less

    @property
    def tokens(self) -> int:
        """Rows seen."""
        return sum(self.tokens_by_precision)

    @property
    def batches(self) -> int:
        """Batches added, empty ones not counted."""
        return int(self.sums[self.in_features + 3, self.in_features + 3])

    @property
    def rounding(self) -> float:
        """How far a sum may be off, relative to the sum of the products' sizes: ``(4096 + batches) eps``.

        A batch's products round like any sum here, and each addition of a batch costs at most one eps more.
        """
        return (4096 + self.batches) * torch.finfo(torch.float64).eps

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
        rows = in_features + _BESIDE
        return cls(torch.zeros(rows, rows + out_features, dtype=torch.float64, device=device))

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
        x, e = self._rows("X", X, self.in_features)
        r, f = self._rows("R", R, self.out_features)
        if X.shape[:-1] != R.shape[:-1]:
            raise ValueError(f"X and R must have as many tokens, got {tuple(X.shape[:-1])} and {tuple(R.shape[:-1])}")
        e, f = max(e, self.x_exponent), max(f, self.r_exponent)
        vars(self).update(vars(self._at(e, f)))  # one step, so that an interrupt finds sums with their own exponents
        m = self.in_features + _BESIDE
        batch = self.sums.new_empty(len(x), self.sums.shape[1])
        batch[:, : m - _BESIDE] = x if e == 0 else times_power(x.double(), torch.tensor(-e, device=x.device))
        batch[:, m:] = r if f == 0 else times_power(r.double(), torch.tensor(-f, device=r.device))
        batch[:, m - 5 : m - 1] = 0
        batch[:, m - 5 + {torch.float64: 0, torch.float32: 1}.get(X.dtype, 2)] = 1
        batch[:1, m - 2] = 1
        torch.linalg.vector_norm(batch[:, m:], dim=1, out=batch[:, m - 1])
        self.sums.addmm_(batch[:, :m].mT, batch)

    def _rows(self, name: str, tensor: Tensor, size: int) -> tuple[Shaped[Tensor, "tokens m"], int]:
        """A tensor's tokens as rows, if it fits, and the power of two to take out of them."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {getattr(tensor, 'layout', type(tensor).__name__)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must hold floating-point numbers, got {tensor.dtype}")
        if tensor.ndim < 1 or tensor.shape[-1] != size:
            raise ValueError(f"{name} must have {size} columns, got shape {tuple(tensor.shape)}")
        if tensor.device != self.sums.device:
            raise ValueError(f"{name} must be on {self.sums.device}, where the sums are, got {tensor.device}")
        rows = tensor.detach().reshape(-1, size)
        if rows.dtype.itemsize == 1:  # float8 knows no arithmetic
            rows = rows.double()
        largest = float(largest_magnitude(rows))
        if not math.isfinite(largest):
            raise NonFiniteError(f"{name} holds a NaN or an infinity; nothing of this batch was added")
        return rows, _STEP * round(math.frexp(largest)[1] / _STEP) if largest else _SMALLEST

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """The sums over the tokens of both, as new tensors.

        Raises:
            ValueError: If the two are of different shapes or devices.
        """
        for field in ("in_features", "out_features"):
            if getattr(self, field) != getattr(other, field):
                raise ValueError(f"other must have {field}={getattr(self, field)}, got {getattr(other, field)}")
        if self.sums.device != other.sums.device:
            raise ValueError(f"other must be on {self.sums.device}, got {other.sums.device}")
        e, f = max(self.x_exponent, other.x_exponent), max(self.r_exponent, other.r_exponent)
        return LayerStatistics(self._at(e, f).sums + other._at(e, f).sums, e, f)

    def _at(self, e: int, f: int) -> LayerStatistics:
        """The same sums for exponents at least as large as the present ones."""
        x, r = self.x_exponent - e, self.r_exponent - f
        if x == r == 0 or not bool(self.sums.any()):  # zeros need no scaling: the first batch of every layer
            return LayerStatistics(self.sums, e, f)
        powers = torch.tensor(
            [x] * self.in_features + [0] * (_BESIDE - 1) + [r] * (1 + self.out_features), device=self.sums.device
        )
        rows = powers[: len(self.sums), None]
        return LayerStatistics(times_power(times_power(self.sums, rows), powers), e, f)

    def reduce(self, rtol: float | None = None) -> ReducedProblem:
        """Coordinates of X and P_X R from one eigendecomposition of G: what all closed forms take.

        With ``G = V S^2 V^T``, ``Y = S V^T`` and ``M = S^{-1} V^T C``. What is captured, as a squared norm, differs
        from the direct computation's at the same rtol by at most ``e ||R|| (||P_X R|| + e ||R||)``, with e the
        "streamed" tolerance (and one eps more for each batch) times cond(X)^2 over the singular values that are kept.

        Args:
            rtol: Singular values of X at or below ``rtol`` times the largest count as zero. By default the square root
                of :attr:`rounding`, or the "rank" tolerance of float32 where an input came in it.

        Returns:
            The reduced problem; its space has no basis.

        Raises:
            ValueError: If rtol is below ``sqrt(eps)`` or not below 1, nothing was added yet, or some X came in less
                than float32 and no rtol is given: rounding such as bfloat16's 0.4% of every entry leaves no rank that
                a default could find.
        """
        _, single, less = self.tokens_by_precision
        if self.tokens == 0:
            raise ValueError("the statistics hold no tokens; add a batch first")
        if rtol is None and less:
            raise ValueError(f"rtol must be given, such as 0.01: {less} tokens came in less precision than float32")
        default = max(math.sqrt(self.rounding), tolerance("rank", torch.float32).value if single else 0.0)
        relative, floor = default if rtol is None else require_rtol(rtol), math.sqrt(torch.finfo(torch.float64).eps)
        p, r = (torch.frexp(square).exponent.long() // 2 for square in (self.gram.diagonal().amax(), self.square))
        squares, V = torch.linalg.eigh(self.gram)
        squares = times_power(squares.flip(0), -2 * p)  # at unit scale, as R is by 2^-r
        sigma = squares.clamp(min=0).sqrt()
        largest = sigma[0]
        cutoff = relative * largest
        kept = sigma > cutoff
        Y = (sigma * kept)[:, None] * V.mT.flip(0)
        M = times_power(torch.where(kept, 1 / squares, 0.0), -p - r)[:, None] * (Y @ self.cross)
        decision = decide_rank(sigma, cutoff, floor * largest, math.log10(relative / floor))
        return ReducedProblem(
            ColumnSpace(Y, self.x_exponent + p, decision, cutoff, floor * largest),
            target=M,
            outside=(times_power(self.square, -2 * r) - M.square().sum()).clamp(min=0),
            exponent=self.r_exponent + r,
            rounding=self.rounding * largest / torch.where(kept, sigma, largest).amin(),
        )


def require_rtol(rtol: float) -> float:
    """The rtol of sums; raise ValueError unless it is at least ``sqrt(eps)``, which squares leave, and below 1."""
    floor = math.sqrt(torch.finfo(torch.float64).eps)
    if not floor <= rtol < 1:
        raise ValueError(f"rtol must be at least sqrt(eps) = {floor:.3g} and below 1, got {rtol}")
    return rtol


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

    Raises:
        OSError: If it cannot be written, a full disk for one.
    """
    tensors = {f"{name}:sums": layer.sums.cpu() for name, layer in layers.items()}
    exponents = {name: {field: getattr(layer, field) for field in _EXPONENTS} for name, layer in layers.items()}
    metadata = {"format": _FORMAT, "layers": json.dumps(exponents)}
    write_tensors(path, tensors, metadata)


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
                layers = json.loads(metadata["layers"]).items()
                return {name: _layer(file.get_tensor(f"{name}:sums"), exponents) for name, exponents in layers}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is truncated or damaged ({error}); write it again") from error
    raise ResultsError(f"{path} is no statistics file of this version: its format is {metadata.get('format')!r}")


def _layer(sums: Tensor, exponents: Mapping[str, int]) -> LayerStatistics:
    """One layer as it was saved; ValueError where that cannot have been."""
    if sums.ndim != 2 or sums.dtype != torch.float64 or not _BESIDE < len(sums) < sums.shape[1]:
        raise ValueError(f"sums of shape {tuple(sums.shape)} and {sums.dtype}")
    if not bool(sums.isfinite().all()) or bool((sums.diagonal() < 0).any()):
        raise ValueError("sums that are not finite, or of squares and negative")
    for field in _EXPONENTS:
        if exponents[field] not in range(_SMALLEST, -_SMALLEST + 1, _STEP) or isinstance(exponents[field], float):
            raise ValueError(f"{field} {exponents[field]!r}")
    return LayerStatistics(sums, *(exponents[field] for field in _EXPONENTS))
