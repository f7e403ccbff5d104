"""A linear layer whose diagonal blocks are trained while its weight stays frozen."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.ops import additive


class DiaBloLinear(nn.Module):
    """``base_layer(x) + x D`` with ``D`` block-diagonal, trainable and zero at the start.

    Args:
        base_layer: The layer to adapt; its parameters are frozen. Weight of shape (m2, m1), any floating dtype.
        num_blocks: N, from 1 to max(m1, m2).

    Attributes:
        diablo_blocks: The complete blocks, shape (k, d1, d2), inputs by outputs.
        diablo_tail: The one block that the edge of the matrix cuts, or None; see :class:`BlockLayout`.

    Raises:
        TypeError: If base_layer is not an ``nn.Linear`` or num_blocks is not an integer.
        ValueError: If num_blocks does not fit the layer.

    Source: arXiv 2506.03230v2, section 3; zero start and no scaling factor as in the paper.
    """

    diablo_tail: nn.Parameter | None

    def __init__(self, base_layer: nn.Linear, num_blocks: int) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"base_layer must be a torch.nn.Linear, got {type(base_layer).__name__}")
        self.layout = BlockLayout(base_layer.in_features, base_layer.out_features, num_blocks)
        self.base_layer = base_layer.requires_grad_(False)
        weight = base_layer.weight
        layout = self.layout
        shape = (layout.complete, layout.block_rows, layout.block_cols)
        # Adapters train in float32 even on a half-precision base: their steps are smaller than its rounding.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.diablo_blocks = nn.Parameter(weight.new_zeros(shape, dtype=dtype))
        self.diablo_tail = None if layout.tail is None else nn.Parameter(weight.new_zeros(layout.tail, dtype=dtype))

    def forward(self, x: Float[Tensor, "*batch m1"]) -> Float[Tensor, "*batch m2"]:
        """The adapted output, in the dtype that the base layer returns."""
        return additive(self.base_layer(x), x, self.diablo_blocks, self.diablo_tail, self.layout)

    def delta_weight(self) -> Float[Tensor, "m2 m1"]:
        """What training has added, as a dense matrix in the orientation of ``nn.Linear.weight``."""
        return self.layout.scatter(self.diablo_blocks.detach(), self._tail()).T

    def merged(self) -> nn.Linear:
        """The base layer with the update written into its weight; this module must not be used afterwards.

        Only the entries inside the blocks change, and each is rounded once.

        Raises:
            ValueError: If an entry of the merged weight would not be finite; the weight is then untouched.
        """
        inside = self.layout.views(self.base_layer.weight.detach().T)
        update = (self.diablo_blocks.detach(), self._tail())
        sums = [
            (old, (old.to(new.dtype) + new).to(old.dtype))
            for old, new in zip(inside, update, strict=True)
            if old is not None and new is not None
        ]
        if not all(bool(torch.isfinite(total).all()) for _, total in sums):
            raise ValueError("the update holds NaN or infinite entries: refusing to merge it into the weight")
        for old, total in sums:
            old.copy_(total)
        return self.base_layer

    def extra_repr(self) -> str:
        """Blocks and their size, for ``print(model)``."""
        layout = self.layout
        return f"num_blocks={layout.num_blocks}, block={layout.block_rows}x{layout.block_cols}, tail={layout.tail}"

    def _tail(self) -> Tensor | None:
        return None if self.diablo_tail is None else self.diablo_tail.detach()
