"""The block product and the block gradient, differentiable to any order, and the additive layer made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.ops import kernels


def block_product(
    x: Float[Tensor, "*batch m1"],
    blocks: Float[Tensor, "k d1 d2"],
    tail: Float[Tensor, "r c"] | None,
    layout: BlockLayout,
) -> Float[Tensor, "*batch m2"]:
    """``x D`` for the block-diagonal ``D``, without forming ``D``: 2 (tokens) m1 m2 / N operations.

    Differentiable to any order in x and D.

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
    _check_features(x, layout)
    return _Product.apply(rows_of(x), blocks, tail, layout).reshape(*x.shape[:-1], layout.out_features)


def block_gradient(
    x: Float[Tensor, "*batch m1"], g: Float[Tensor, "*batch m2"], layout: BlockLayout
) -> tuple[Float[Tensor, "k d1 d2"], Float[Tensor, "r c"] | None]:
    """The diagonal blocks of ``x^T g``, without the rest of it: the gradient that D gets.

    Args:
        x: Inputs, shape (..., m1).
        g: Gradients of the outputs, shape (..., m2), the dtype of x.
        layout: The geometry.

    Returns:
        The complete blocks, shape (k, d1, d2), and the tail or None.

    Raises:
        ValueError: If a shape does not fit the layout, or g not x.

    Source: arXiv 2506.03230v2, section 3 (grad D_i = X_i^T g_{Y_i}).
    """
    _check_features(x, layout)
    if g.shape != (*x.shape[:-1], layout.out_features):
        raise ValueError(f"g must have shape {(*x.shape[:-1], layout.out_features)}, got {tuple(g.shape)}")
    blocks, tail = _Gradient.apply(rows_of(x), rows_of(g), layout)
    return blocks, tail


def additive(
    base_output: Float[Tensor, "*batch m2"],
    x: Float[Tensor, "*batch m1"],
    blocks: Float[Tensor, "k d1 d2"],
    tail: Float[Tensor, "r c"] | None,
    layout: BlockLayout,
    *,
    overwrite: bool = False,
) -> Float[Tensor, "*batch m2"]:
    """The frozen layer's output plus the block product, in the dtypes of each.

    Args:
        base_output: What the frozen layer made of ``x``, shape (..., m2), any floating dtype.
        x: The frozen layer's input, shape (..., m1), in the dtype that the product is to be computed in.
        blocks: As in :func:`block_product`; cast to the dtype of x.
        tail: As in :func:`block_product`; cast to the dtype of x.
        layout: As in :func:`block_product`.
        overwrite: ``base_output`` belongs to the caller alone and may be added into, which saves a pass over it.

    Returns:
        Shape (..., m2), the dtype of ``base_output``.

    Raises:
        ValueError: If a shape does not fit the layout.
    """
    blocks, tail = blocks.to(x.dtype), None if tail is None else tail.to(x.dtype)
    if torch.compiler.is_compiling():  # plain operations, which the compiler fuses; it cannot look into a Function
        return base_output + _plain_product(x, blocks, tail, layout).to(base_output.dtype)
    if base_output.shape != (*x.shape[:-1], layout.out_features):
        raise ValueError(
            f"base_output must have shape {(*x.shape[:-1], layout.out_features)}, got {tuple(base_output.shape)}"
        )
    # A view (what nn.Linear makes with a bias of several dimensions) costs autograd more than it saves here.
    if overwrite and base_output.dtype == x.dtype and base_output.is_contiguous() and not base_output._is_view():
        layout.check(blocks, tail)
        _check_features(x, layout)
        return _Additive.apply(base_output, x, blocks, tail, layout)
    return base_output + block_product(x, blocks, tail, layout).to(base_output.dtype)


def _check_features(x: Tensor, layout: BlockLayout) -> None:
    if x.shape[-1] != layout.in_features:
        raise ValueError(f"x must have {layout.in_features} features in its last dimension, got {x.shape[-1]}")


def rows_of(x: Tensor) -> Tensor:
    """(..., m) as (tokens, m)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def transposed(layout: BlockLayout) -> BlockLayout:
    """The geometry of D^T."""
    return BlockLayout(layout.out_features, layout.in_features, layout.num_blocks)


def _plain_product(x: Tensor, blocks: Tensor, tail: Tensor | None, layout: BlockLayout) -> Tensor:
    """:func:`block_product` in operations that autograd and the compiler know."""
    k, d1, _ = blocks.shape
    rows = rows_of(x)
    grouped = rows[:, : k * d1].unflatten(1, (k, d1)).transpose(0, 1)
    parts = [torch.bmm(grouped, blocks).transpose(0, 1).flatten(1)]
    if tail is not None:
        parts.append(rows[:, layout.rows(k)] @ tail)
    missing = layout.out_features - sum(part.shape[1] for part in parts)
    if missing:
        parts.append(rows.new_zeros(rows.shape[0], missing))
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).reshape(*x.shape[:-1], layout.out_features)


def derivatives() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor | None]]]:
    """What a backward pass computes with: the bare kernels, unless a derivative of this derivative is wanted."""
    if torch.is_grad_enabled():
        return _Product.apply, _Gradient.apply
    return kernels.product, kernels.gradient


class _Product(torch.autograd.Function):
    """``x D``; its derivatives are again a block product and a block gradient, so it has all orders."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, tail: Tensor | None, layout: BlockLayout) -> Tensor:
        ctx.save_for_backward(x, blocks, tail)
        ctx.layout = layout
        return kernels.product(x, blocks, tail, layout)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks, tail = ctx.saved_tensors
        grad_x = grad_blocks = grad_tail = None
        product, gradient = derivatives()
        if ctx.needs_input_grad[0]:
            grad_x = product(g, blocks.mT, None if tail is None else tail.mT, transposed(ctx.layout))
        if any(ctx.needs_input_grad[1:3]):
            grad_blocks, grad_tail = gradient(x, g, ctx.layout)
        return grad_x, grad_blocks, grad_tail, None


class _Gradient(torch.autograd.Function):
    """The blocks of ``x^T g``; see :class:`_Product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, g)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return kernels.gradient(x, g, layout)

    @staticmethod
    def backward(ctx: Any, blocks: Tensor | None, tail: Tensor | None) -> tuple[Tensor | None, ...]:
        x, g = ctx.saved_tensors
        layout = ctx.layout
        if blocks is None:
            blocks = x.new_zeros(layout.complete, layout.block_rows, layout.block_cols)
        if tail is None and layout.tail:
            tail = x.new_zeros(layout.tail)
        grad_x = grad_g = None
        if ctx.needs_input_grad[0]:
            grad_x = _Product.apply(g, blocks.mT, None if tail is None else tail.mT, transposed(layout))
        if ctx.needs_input_grad[1]:
            grad_g = _Product.apply(x, blocks, tail, layout)
        return grad_x, grad_g, None


class _Additive(torch.autograd.Function):
    """A base layer's output with the block product added into it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, blocks: Tensor, tail: Tensor | None, layout: BlockLayout) -> Tensor:
        ctx.save_for_backward(x, blocks, tail)
        ctx.layout = layout
        ctx.mark_dirty(out)
        kernels.product(rows_of(x), blocks, tail, layout, into=rows_of(out))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks, tail = ctx.saved_tensors
        grad_x = grad_blocks = grad_tail = None
        product, gradient = derivatives()
        if ctx.needs_input_grad[1]:
            turned = blocks.mT, None if tail is None else tail.mT
            grad_x = product(rows_of(g), *turned, transposed(ctx.layout)).view(x.shape)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_blocks, grad_tail = gradient(rows_of(x), rows_of(g), ctx.layout)
        return g, grad_x, grad_blocks, grad_tail, None
