"""The two ways to apply an update: additive (a block product beside the frozen layer) and merged (inside its weight).

Both are autograd functions on strided views, so that neither input nor weight is copied. The formulations were chosen
by measurement: a batched product over the blocks, elementwise products where blocks have one row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from diablo_theory.blocks import BlockLayout

#: Blocks with a side shorter than this are multiplied two at a time where their gradient is computed.
SMALL = 16


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
    return _Product.apply(_rows(x), blocks, tail, layout).reshape(*x.shape[:-1], layout.out_features)


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

    Source: arXiv 2506.03230v2, section 3 (grad D_i = X_i^T g_{Y_i}).
    """
    _check_features(x, layout)
    blocks, tail = _Gradient.apply(_rows(x), _rows(g), layout)
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
    """
    blocks, tail = blocks.to(x.dtype), None if tail is None else tail.to(x.dtype)
    if torch.compiler.is_compiling():  # plain operations, which the compiler fuses; it cannot look into a Function
        return base_output + _plain_product(x, blocks, tail, layout).to(base_output.dtype)
    if overwrite and base_output.dtype == x.dtype and base_output.is_contiguous():
        return _Additive.apply(base_output, x, blocks, tail, layout)
    return base_output + block_product(x, blocks, tail, layout).to(base_output.dtype)


def merged(
    x: Float[Tensor, "*batch m1"],
    weight: Tensor,
    bias: Float[Tensor, " m2"] | None,
    blocks: Float[Tensor, "k d1 d2"],
    tail: Float[Tensor, "r c"] | None,
    layout: BlockLayout,
    writer: BlockWriter,
) -> Float[Tensor, "*batch m2"]:
    """``x (W0 + D) + bias`` as one product: D is added into the weight's diagonal blocks for just as long as it takes.

    The weight holds W0 at every moment but inside the two products (this one, and the input gradient's in the backward
    pass); its blocks are put back from a copy, bit for bit, also when the product raises or is interrupted. Nothing
    outside can therefore see a changed weight, and other users of the same weight are not disturbed. Writing the
    blocks moves m1 m2 / N numbers, against (tokens) m1 m2 multiplications.

    Where the product is computed in another dtype than the weight's (autocast), a cast copy is written into instead.
    In low precision W0 + D is rounded once.

    Args:
        x: Inputs, shape (..., m1), in the dtype that the product is to be computed in.
        weight: W0, frozen: shape (m2, m1) as in ``nn.Linear``, or (m1, m2) where the writer says so.
        bias: Shape (m2,), or None; it gets a gradient if it wants one.
        blocks: The complete blocks of D, shape (k, d1, d2), any floating dtype.
        tail: The one cut block, or None.
        layout: The geometry.
        writer: The one that all callers use for this weight.

    Returns:
        Shape (..., m2), the dtype of x.
    """
    out: Tensor = _Merged.apply(x, weight, bias, blocks, tail, layout, writer)
    return out


def _check_features(x: Tensor, layout: BlockLayout) -> None:
    if x.shape[-1] != layout.in_features:
        raise ValueError(f"x must have {layout.in_features} features in its last dimension, got {x.shape[-1]}")


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _transposed(layout: BlockLayout) -> BlockLayout:
    return BlockLayout(layout.out_features, layout.in_features, layout.num_blocks)


def _plain_product(x: Tensor, blocks: Tensor, tail: Tensor | None, layout: BlockLayout) -> Tensor:
    """:func:`block_product` in operations that autograd and the compiler know."""
    k, d1, _ = blocks.shape
    rows = _rows(x)
    grouped = rows[:, : k * d1].unflatten(1, (k, d1)).transpose(0, 1)
    parts = [torch.bmm(grouped, blocks).transpose(0, 1).flatten(1)]
    if tail is not None:
        parts.append(rows[:, layout.rows(k)] @ tail)
    missing = layout.out_features - sum(part.shape[1] for part in parts)
    if missing:
        parts.append(rows.new_zeros(rows.shape[0], missing))
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).reshape(*x.shape[:-1], layout.out_features)


def _product(
    rows: Tensor, blocks: Tensor, tail: Tensor | None, layout: BlockLayout, into: Tensor | None = None
) -> Tensor:
    """The kernel of :func:`block_product`: shape (tokens, m1) to (tokens, m2), or added ``into`` that; no gradient."""
    k, d1, d2 = blocks.shape
    if d2 == 1 < d1:  # einsum knows an order of axes in which one column a block needs no copy
        change = torch.einsum("tki,kio->tko", _groups(rows, k, d1).transpose(0, 1), blocks).flatten(1)
        if into is None and k == layout.out_features:
            return change
        out = change.new_zeros(rows.shape[0], layout.out_features) if into is None else into
        out[:, :k].add_(change)
    else:
        out = rows.new_empty(rows.shape[0], layout.out_features) if into is None else into
        grouped, target = _groups(rows, k, d1), _groups(out, k, d2)
        if k == 1:
            target[0].addmm_(grouped[0], blocks[0], beta=0 if into is None else 1)
        elif d1 == 1:
            torch.mul(grouped, blocks, out=target) if into is None else target.addcmul_(grouped, blocks)
        else:
            change = torch.bmm(grouped, blocks)
            target.copy_(change) if into is None else target.add_(change)
        if into is None and k * d2 < layout.out_features:
            out[:, k * d2 :].zero_()
    if tail is not None:
        out[:, layout.cols(k)].addmm_(rows[:, layout.rows(k)], tail)
    return out


def _gradient(x: Tensor, g: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor | None]:
    """The kernel of :func:`block_gradient`, no gradient."""
    k, d1, d2 = layout.complete, layout.block_rows, layout.block_cols
    if d1 == d2 == 1:
        blocks = (x[:, :k] * g[:, :k]).sum(0).view(k, 1, 1)
    elif min(d1, d2) < SMALL and k > 1:
        # Two blocks in one product, whose off-diagonal half is thrown away: fewer passes over the tokens.
        pairs = _long_side_first(_groups(x, k // 2, 2 * d1), _groups(g, k // 2, 2 * d2))
        pair, row, column = pairs.stride()
        both = pairs.as_strided((k // 2, 2, d1, d2), (pair, d1 * row + d2 * column, row, column))
        blocks = both.reshape(-1, d1, d2)
        if k % 2:
            last = x[:, layout.rows(k - 1)].T @ g[:, layout.cols(k - 1)]
            blocks = torch.cat([blocks, last[None]])
    else:
        blocks = _long_side_first(_groups(x, k, d1), _groups(g, k, d2))
    tail = x[:, layout.rows(k)].T @ g[:, layout.cols(k)] if layout.tail else None
    return blocks, tail


def _long_side_first(xs: Tensor, gs: Tensor) -> Tensor:
    """``xs^T gs`` of each group, computed in the order that is up to twice as fast."""
    if xs.shape[2] > gs.shape[2]:
        return torch.bmm(gs.mT, xs).mT
    return torch.bmm(xs.mT, gs)


def _groups(rows: Tensor, k: int, size: int) -> Tensor:
    """The first k groups of ``size`` columns of (tokens, m) as a view, shape (k, tokens, size)."""
    token, column = rows.stride()
    return rows.as_strided((k, rows.shape[0], size), (size * column, token, column), rows.storage_offset())


def _kernels() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor | None]]]:
    """What a backward pass computes with: the bare kernels, unless a derivative of this derivative is wanted."""
    if torch.is_grad_enabled():
        return _Product.apply, _Gradient.apply
    return _product, _gradient


class _Product(torch.autograd.Function):
    """``x D``; its derivatives are again a block product and a block gradient, so it has all orders."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, tail: Tensor | None, layout: BlockLayout) -> Tensor:
        ctx.save_for_backward(x, blocks, tail)
        ctx.layout = layout
        return _product(x, blocks, tail, layout)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks, tail = ctx.saved_tensors
        grad_x = grad_blocks = grad_tail = None
        product, gradient = _kernels()
        if ctx.needs_input_grad[0]:
            grad_x = product(g, blocks.mT, None if tail is None else tail.mT, _transposed(ctx.layout))
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
        return _gradient(x, g, layout)

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
            grad_x = _Product.apply(g, blocks.mT, None if tail is None else tail.mT, _transposed(layout))
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
        _product(_rows(x), blocks, tail, layout, into=_rows(out))
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, blocks, tail = ctx.saved_tensors
        grad_x = grad_blocks = grad_tail = None
        product, gradient = _kernels()
        if ctx.needs_input_grad[1]:
            turned = blocks.mT, None if tail is None else tail.mT
            grad_x = product(_rows(g), *turned, _transposed(ctx.layout)).view(x.shape)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_blocks, grad_tail = gradient(_rows(x), _rows(g), ctx.layout)
        return g, grad_x, grad_blocks, grad_tail, None


class BlockWriter:
    """Writes blocks into one weight for the time of one product; copies and pickles get a lock of their own.

    Args:
        inputs_first: The weight is stored inputs by outputs (transformers' ``Conv1D``), not as ``nn.Linear`` does.
    """

    def __init__(self, inputs_first: bool = False) -> None:
        self.inputs_first = inputs_first
        #: Held while the weight is changed, so that other threads never compute with a weight that is half-way.
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[BlockWriter], tuple[bool]]:
        return BlockWriter, (self.inputs_first,)

    def product(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: tuple[Tensor, Tensor | None],
        layout: BlockLayout,
        *,
        back: bool,
    ) -> Tensor:
        """``rows (W0 + D) + bias``, or with ``back`` ``rows (W0 + D)^T``; the weight is as before afterwards."""
        # .data: these writes are undone before anybody can look, so autograd must not count them as changes of W0.
        data = weight.data
        if weight.dtype != rows.dtype:
            return linear(rows, self._factor(self._cast(data, parts, layout, rows.dtype), back), bias)
        inside, change = self.inside(data, parts, layout)
        factor = self._factor(data, back)
        with self.lock:
            # From the change to its undoing nothing may come between. An exception (Ctrl-C too) is raised between two
            # calls into C, never inside one; the first call that follows it is the one that restores.
            kept = [place.clone() for place in inside]
            try:
                torch._foreach_add_(inside, change)
                return linear(rows, factor, bias)
            finally:
                torch._foreach_copy_(inside, kept)

    def inside(
        self, data: Tensor, parts: tuple[Tensor, Tensor | None], layout: BlockLayout
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the entries of a weight that D covers, beside the parts of D that go there."""
        blocks, tail = parts
        block_views, tail_view = layout.views(data if self.inputs_first else data.T)
        if tail is None or tail_view is None:
            return [block_views], [blocks]
        return [block_views, tail_view], [blocks, tail]

    def _factor(self, data: Tensor, back: bool) -> Tensor:
        # F.linear multiplies by the transpose of what it is given.
        return data.T if back is not self.inputs_first else data

    def _cast(
        self, data: Tensor, parts: tuple[Tensor, Tensor | None], layout: BlockLayout, dtype: torch.dtype
    ) -> Tensor:
        """W0 + D in another dtype, each entry rounded once."""
        copy = data.to(dtype)
        exact, change = self.inside(data, parts, layout)
        for place, old, part in zip(self.inside(copy, parts, layout)[0], exact, change, strict=True):
            place.copy_(old + part)
        return copy


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        tail: Tensor | None,
        layout: BlockLayout,
        writer: BlockWriter,
    ) -> Tensor:
        # The weight and D are saved as autograd would save them, so that changing either before the backward pass
        # is noticed; x only if D learns.
        learns = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if learns else None, weight, blocks, tail)
        ctx.layout, ctx.writer = layout, writer
        return writer.product(x, weight, bias, (blocks, tail), layout, back=False)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, blocks, tail = ctx.saved_tensors
        layout, writer = ctx.layout, ctx.writer
        differentiable = torch.is_grad_enabled()
        grad_x = grad_bias = grad_blocks = grad_tail = None
        if ctx.needs_input_grad[0] and differentiable:
            back = block_product(
                g, blocks.mT.to(g.dtype), None if tail is None else tail.mT.to(g.dtype), _transposed(layout)
            )
            grad_x = linear(g, (weight if writer.inputs_first else weight.T).to(g.dtype)) + back
        elif ctx.needs_input_grad[0]:
            grad_x = writer.product(g, weight, None, (blocks, tail), layout, back=True)
        if ctx.needs_input_grad[2]:
            grad_bias = _rows(g).sum(0)
        if x is not None:
            _, gradient = _kernels()
            grad_blocks, grad_tail = gradient(_rows(x), _rows(g), layout)
            grad_blocks = grad_blocks.to(blocks.dtype)
            grad_tail = None if grad_tail is None else grad_tail.to(tail.dtype)
        return grad_x, None, grad_bias, grad_blocks, grad_tail, None, None
