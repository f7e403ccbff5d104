"""What the autograd functions compute with: values in, values out, no gradients recorded.

The formulations were chosen by measurement (``diablo-theory bench --kernels``): a batched product over views of the
blocks, elementwise products where blocks have one row, and the compiled kernel of ``compiled`` where it applies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.ops import compiled


def product(
    rows: Tensor, blocks: Tensor, tail: Tensor | None, layout: BlockLayout, into: Tensor | None = None
) -> Tensor:
    """``x D``.

    Args:
        rows: Inputs, shape (tokens, m1).
        blocks: The complete blocks, shape (k, d1, d2).
        tail: The one cut block, or None.
        layout: The geometry.
        into: What it is added to, shape (tokens, m2), contiguous rows; a new tensor if left out.

    Returns:
        ``into``, or the new tensor of that shape.
    """
    if _autocasts(rows):
        with torch.autocast(rows.device.type, enabled=False):
            return product(rows, blocks, tail, layout, into)
    k, d1, d2 = blocks.shape
    if into is None and d2 == 1 < d1 and k == layout.out_features:
        # einsum knows an order of axes in which one column a block needs no copy.
        return torch.einsum("tki,kio->tko", _groups(rows, k, d1).transpose(0, 1), blocks).flatten(1)
    out = rows.new_empty(rows.shape[0], layout.out_features) if into is None else into
    if not compiled.product(rows, blocks, out, add=into is not None):
        _batched_product(rows, blocks, _groups(out, k, d2), add=into is not None)
    if into is None and k * d2 < layout.out_features:
        out[:, k * d2 :].zero_()
    if tail is not None:
        out[:, layout.cols(k)].addmm_(rows[:, layout.rows(k)], tail)
    return out


def _batched_product(rows: Tensor, blocks: Tensor, target: Tensor, *, add: bool) -> None:
    """Each group of columns of ``rows`` by its block, into the ``target`` of shape (k, tokens, d2)."""
    k, d1, _ = blocks.shape
    grouped = _groups(rows, k, d1)
    if k == 1:
        target[0].addmm_(grouped[0], blocks[0], beta=int(add))
    elif d1 == 1:
        target.addcmul_(grouped, blocks) if add else torch.mul(grouped, blocks, out=target)
    else:
        change = torch.bmm(grouped, blocks)
        target.add_(change) if add else target.copy_(change)


def gradient(x: Tensor, g: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor | None]:
    """The diagonal blocks of ``x^T g``.

    Args:
        x: Shape (tokens, m1).
        g: Shape (tokens, m2).
        layout: The geometry.

    Returns:
        The complete blocks, shape (k, d1, d2), any strides, and the tail or None.
    """
    if _autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return gradient(x, g, layout)
    k, d1, d2 = layout.complete, layout.block_rows, layout.block_cols
    blocks = compiled.gradient(x, g, k, d1, d2)
    if blocks is None and d1 == d2 == 1:
        blocks = (x[:, :k] * g[:, :k]).sum(0).view(k, 1, 1)
    elif blocks is None:
        xs, gs = _groups(x, k, d1), _groups(g, k, d2)
        # The order with the long side first is up to twice as fast.
        blocks = torch.bmm(gs.mT, xs).mT if d1 > d2 else torch.bmm(xs.mT, gs)
    tail = x[:, layout.rows(k)].T @ g[:, layout.cols(k)] if layout.tail else None
    return blocks, tail


def _autocasts(x: Tensor) -> bool:
    """Callers have chosen the dtype; autocast would choose again in some formulations and not in others."""
    return torch.is_autocast_enabled(x.device.type)


def _groups(rows: Tensor, k: int, size: int) -> Tensor:
    """The first k groups of ``size`` columns of (tokens, m) as a view, shape (k, tokens, size)."""
    token, column = rows.stride()
    return rows.as_strided((k, rows.shape[0], size), (size * column, token, column), rows.storage_offset())
