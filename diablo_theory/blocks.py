"""The geometry of the diagonal blocks of an ``m1 x m2`` matrix: sizes, the ragged edge, gather and scatter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor


def _positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class BlockLayout:
    """Where the ``N`` diagonal blocks of an ``m1 x m2`` matrix lie (rows are inputs, columns are outputs).

    Blocks are ``d1 x d2`` with ``d1 = ceil(m1/N)`` and ``d2 = ceil(m2/N)``; block ``i`` starts at row ``i d1`` and
    column ``i d2`` and is cut at the edge of the matrix. After the ``complete`` full-size blocks there is therefore
    at most one cut block, the ``tail``, and past that only empty ones.

    DEVIATION(ragged-blocks): the authors' code pads a ragged matrix with zeros and so trains (and counts) entries
    that do nothing; here the tail has its true shape and every parameter matters.

    Args:
        in_features: m1, at least 1.
        out_features: m2, at least 1.
        num_blocks: N, from 1 to max(m1, m2).

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is below 1, or num_blocks exceeds max(m1, m2).

    Source: arXiv 2506.03230v2, section 3 (D = diag(D_1 .. D_N)).
    """

    in_features: int
    out_features: int
    num_blocks: int

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "num_blocks"):
            _positive_int(name, getattr(self, name))
        largest = max(self.in_features, self.out_features)
        if self.num_blocks > largest:
            raise ValueError(
                f"num_blocks must be at most {largest} for a {self.in_features} x {self.out_features} matrix, "
                f"got {self.num_blocks}"
            )

    @cached_property
    def block_rows(self) -> int:
        """d1, the rows (inputs) of a full-size block."""
        return -(-self.in_features // self.num_blocks)

    @cached_property
    def block_cols(self) -> int:
        """d2, the columns (outputs) of a full-size block."""
        return -(-self.out_features // self.num_blocks)

    @cached_property
    def count(self) -> int:
        """Row or column groups, whichever are more; the last ones may hold a cut or an empty block."""
        return max(-(-self.in_features // self.block_rows), -(-self.out_features // self.block_cols))

    @cached_property
    def complete(self) -> int:
        """Blocks of the full size ``d1 x d2``."""
        return min(self.in_features // self.block_rows, self.out_features // self.block_cols)

    @cached_property
    def tail(self) -> tuple[int, int] | None:
        """Shape of the one cut block, or None where the blocks end with the matrix."""
        rows = min(self.block_rows, self.in_features - self.complete * self.block_rows)
        cols = min(self.block_cols, self.out_features - self.complete * self.block_cols)
        return (rows, cols) if rows and cols else None

    @cached_property
    def num_parameters(self) -> int:
        """Entries inside the blocks: m1 m2 / N where N divides both sizes."""
        rows, cols = self.tail or (0, 0)
        return self.complete * self.block_rows * self.block_cols + rows * cols

    def rows(self, i: int) -> slice:
        """Rows of block ``i`` (columns of X that it reads); empty past the edge."""
        return _cut(i, self.block_rows, self.in_features)

    def cols(self, i: int) -> slice:
        """Columns of block ``i`` (outputs that it writes); empty past the edge."""
        return _cut(i, self.block_cols, self.out_features)

    def views(self, matrix: Float[Tensor, "m1 m2"]) -> tuple[Float[Tensor, "k d1 d2"], Float[Tensor, "r c"] | None]:
        """The blocks of a matrix as views: writing into them writes into the matrix.

        Args:
            matrix: Shape (m1, m2), any strides and dtype.

        Returns:
            The complete blocks, shape (complete, d1, d2), and the tail with its true shape, or None.

        Raises:
            ValueError: If the matrix does not have the layout's shape.
        """
        if tuple(matrix.shape) != (self.in_features, self.out_features):
            raise ValueError(
                f"matrix must be {self.in_features} x {self.out_features}, got {' x '.join(map(str, matrix.shape))}"
            )
        row, col = matrix.stride()
        k, d1, d2 = self.complete, self.block_rows, self.block_cols
        blocks = matrix.as_strided((k, d1, d2), (d1 * row + d2 * col, row, col), matrix.storage_offset())
        return blocks, matrix[self.rows(k), self.cols(k)] if self.tail else None

    def gather(self, matrix: Float[Tensor, "m1 m2"]) -> tuple[Float[Tensor, "k d1 d2"], Float[Tensor, "r c"] | None]:
        """The same as :meth:`views`, as copies of their own."""
        blocks, tail = self.views(matrix)
        return blocks.clone(), None if tail is None else tail.clone()

    def scatter(
        self, blocks: Float[Tensor, "k d1 d2"], tail: Float[Tensor, "r c"] | None = None
    ) -> Float[Tensor, "m1 m2"]:
        """The dense ``m1 x m2`` matrix that has these blocks on its diagonal and zeros elsewhere.

        Raises:
            ValueError: If the blocks or the tail do not have the layout's shapes.
        """
        self.check(blocks, tail)
        dense = blocks.new_zeros(self.in_features, self.out_features)
        self.views(dense)[0].copy_(blocks)
        if tail is not None:
            dense[self.rows(self.complete), self.cols(self.complete)] = tail
        return dense

    def check(self, blocks: Tensor, tail: Tensor | None) -> None:
        """Raise ValueError unless blocks and tail have the shapes of this layout."""
        expected = (self.complete, self.block_rows, self.block_cols)
        if tuple(blocks.shape) != expected:
            raise ValueError(f"blocks must have shape {expected}, got {tuple(blocks.shape)}")
        if (None if tail is None else tuple(tail.shape)) != self.tail:
            raise ValueError(f"tail must be {self.tail}, got {None if tail is None else tuple(tail.shape)}")


def _cut(i: int, size: int, limit: int) -> slice:
    return slice(min(i * size, limit), min((i + 1) * size, limit))
