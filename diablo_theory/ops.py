"""How the blocks act on an input. Additive: the base weight stays frozen and the block product is added."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout


def block_product(
    x: Float[Tensor, "*batch m1"],
    blocks: Float[Tensor, "k d1 d2"],
    tail: Float[Tensor, "r c"] | None,
    layout: BlockLayout,
) -> Float[Tensor, "*batch m2"]:
    """``x D`` for the block-diagonal ``D``, without forming ``D``: 2 (tokens) m1 m2 / N operations.

    Args:
        x: Inputs, shape (..., m1), the dtype of the blocks.
        blocks: The complete blocks, shape (k, d1, d2), inputs by outputs.
        tail: The one cut block, shape (r, c), or None; see :class:`BlockLayout`.
        layout: The geometry that blocks and tail belong to.

    Returns:
        Shape (..., m2). Outputs that no block writes are zero.

    Raises:
        ValueError: If a shape does not fit the layout.

    Source: arXiv 2506.03230v2, section 3, Y = X W0 + X D.
    """
    layout.check(blocks, tail)
    if x.shape[-1] != layout.in_features:
        raise ValueError(f"x must have {layout.in_features} features in its last dimension, got {x.shape[-1]}")
    k, d1, d2 = blocks.shape
    rows = x.reshape(-1, layout.in_features)
    grouped = rows[:, : k * d1].reshape(-1, k, d1).transpose(0, 1)
    out = torch.bmm(grouped, blocks).transpose(0, 1).reshape(-1, k * d2)
    if out.shape[1] < layout.out_features:
        parts = [out]
        if tail is not None:
            parts.append(rows[:, layout.rows(k)] @ tail)
        missing = layout.out_features - sum(part.shape[1] for part in parts)
        out = torch.cat([*parts, out.new_zeros(out.shape[0], missing)], dim=1)
    return out.reshape(*x.shape[:-1], layout.out_features)


def additive(
    base_output: Float[Tensor, "*batch m2"],
    x: Float[Tensor, "*batch m1"],
    blocks: Float[Tensor, "k d1 d2"],
    tail: Float[Tensor, "r c"] | None,
    layout: BlockLayout,
) -> Float[Tensor, "*batch m2"]:
    """The frozen layer's output plus the block product, in the dtypes of each.

    Args:
        base_output: What the frozen layer made of ``x``, shape (..., m2), any floating dtype.
        x: The frozen layer's input, shape (..., m1); cast to the blocks' dtype for the product.
        blocks: As in :func:`block_product`.
        tail: As in :func:`block_product`.
        layout: As in :func:`block_product`.

    Returns:
        Shape (..., m2), the dtype of ``base_output``.
    """
    return base_output + block_product(x.to(blocks.dtype), blocks, tail, layout).to(base_output.dtype)
