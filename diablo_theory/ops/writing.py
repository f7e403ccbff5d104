"""Merged mode: D inside the frozen weight, for just as long as one product takes."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from diablo_theory.blocks import BlockLayout
from diablo_theory.ops import compiled
from diablo_theory.ops.products import block_product, derivatives, rows_of, transposed


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
    pass); its blocks are put back from a copy, bit for bit, also when the product raises or is interrupted. Nothing in
    this thread can therefore see a changed weight; see :class:`BlockWriter` for others. Writing the blocks moves
    m1 m2 / N numbers, against (tokens) m1 m2 multiplications.

    Where the product is computed in another dtype than the weight's (autocast), a cast copy is written into instead.
    In low precision W0 + D is rounded once.

    Args:
        x: Inputs, shape (..., m1), in the dtype that the product is to be computed in.
        weight: W0, frozen: shape (m2, m1) as in ``nn.Linear``, or (m1, m2) where the writer says so.
        bias: Shape (m2,), or None; it gets a gradient if it wants one.
        blocks: The complete blocks of D, shape (k, d1, d2), any floating dtype.
        tail: The one cut block, or None.
        layout: The geometry.
        writer: Any one that knows the weight's orientation; one for each layer is the fastest.

    Returns:
        Shape (..., m2), the dtype of x.

    Raises:
        ValueError: If the weight is trainable, or blocks or weight do not fit the layout.
    """
    if weight.requires_grad:
        raise ValueError("weight must be frozen: merged mode computes no gradient for it")
    out: Tensor = _Merged.apply(x, weight, bias, blocks, tail, layout, writer)
    return out


#: Address of a weight's memory to the lock of all that write there, for as long as one of them lives.
_LOCKS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_LOCKS_LOCK = threading.Lock()


class BlockWriter:
    """Writes blocks into a weight for the time of one product.

    Writers of the same memory take turns, also from several threads. Whoever reads the weight without a writer, in
    another thread or on another stream of a GPU, may meet W0 + D.

    Args:
        inputs_first: The weight is stored inputs by outputs (transformers' ``Conv1D``), not as ``nn.Linear`` does.
    """

    def __init__(self, inputs_first: bool = False) -> None:
        self.inputs_first = inputs_first
        self._lock: tuple[int, Any] = (-1, None)
        #: Where weight and blocks were last, and what was prepared for that: one attribute, so that no interrupt can
        #: come between the two.
        self._prepared: tuple[tuple[Any, ...], compiled.Swap | None] = ((), None)

    def __reduce__(self) -> tuple[type[BlockWriter], tuple[bool]]:
        return BlockWriter, (self.inputs_first,)

    def lock(self, weight: Tensor) -> Any:
        """What is held while this weight is changed, so that nobody else computes with a weight that is half-way."""
        place = weight.untyped_storage().data_ptr() if type(weight) in compiled.PLAIN else id(weight)
        if self._lock[0] != place:
            with _LOCKS_LOCK:
                self._lock = place, _LOCKS.setdefault(place, threading.RLock())
        return self._lock[1]

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: tuple[Tensor, Tensor | None],
        layout: BlockLayout,
        *,
        back: bool,
    ) -> Tensor:
        """``x (W0 + D) + bias``, or with ``back`` ``x (W0 + D)^T``; the weight is as before afterwards.

        Raises:
            MemoryError: If there is no room for a copy of what the blocks cover.
            RuntimeError: If this thread is inside a product with this weight already (from a signal handler).
        """
        # .data: these writes are undone before anybody can look, so autograd must not count them as changes of W0.
        data = weight.data
        if weight.dtype is not x.dtype:
            return linear(x, self._factor(self._cast(data, parts, layout, x.dtype), back), bias)
        if torch._C._has_storage(x) and x.untyped_storage().data_ptr() == data.untyped_storage().data_ptr():
            x = x.clone()  # an input that lies in the weight must not change with it
        factor = self._factor(data, back)
        lock = self.lock(weight)
        if lock._is_owned():
            raise RuntimeError("a product within a product with the same weight, which holds the blocks already")
        with lock:
            # An exception (Ctrl-C too) is raised between two calls into C, never inside one; the first call that
            # follows it is the one that restores.
            _alive, (write, written), (restore, restored) = self._swap(data, parts, layout)
            try:
                if write(*written):
                    raise MemoryError("no room for a copy of what the blocks cover")
                return linear(x, factor, bias)
            finally:
                restore(*restored)

    def _swap(
        self, data: Tensor, parts: tuple[Tensor, Tensor | None], layout: BlockLayout
    ) -> tuple[object, compiled.Write, compiled.Write]:
        """How to write, and how to put back, each as one function in C with its arguments; behind what they need."""
        blocks, tail = parts
        if blocks.device != data.device:
            raise ValueError(f"blocks must be where the weight is, on {data.device}, got {blocks.device}")
        if tail is None:
            here = compiled.whereabouts(data, blocks)
            if here != self._prepared[0]:
                layout.check(blocks, tail)
                layout.views(data if self.inputs_first else data.T)  # the weight's shape too is checked
                self._prepared = here, compiled.swap(data, self.inputs_first, blocks)
            if swap := self._prepared[1]:
                return swap, swap.write, swap.restore
        inside, change = self.inside(data, parts, layout)
        kept = [place.clone() for place in inside]
        return kept, (_add, (inside, change)), (torch._foreach_copy_, (inside, kept))

    def inside(
        self, data: Tensor, parts: tuple[Tensor, Tensor | None], layout: BlockLayout
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the entries of a weight that D covers, beside the parts of D that go there, as the weight lies."""
        places = [view for view in layout.views(data if self.inputs_first else data.T) if view is not None]
        changes = [part for part in parts if part is not None]
        if self.inputs_first:
            return places, changes
        # Rows of the weight are columns of D: torch is several times faster along the rows of what it writes.
        return [place.mT for place in places], [change.mT for change in changes]

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


def _add(inside: list[Tensor], change: list[Tensor]) -> int:
    torch._foreach_add_(inside, change)
    return 0


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
                g, blocks.mT.to(g.dtype), None if tail is None else tail.mT.to(g.dtype), transposed(layout)
            )
            grad_x = linear(g, (weight if writer.inputs_first else weight.T).to(g.dtype)) + back
        elif ctx.needs_input_grad[0]:
            grad_x = writer.product(g, weight, None, (blocks, tail), layout, back=True)
        if ctx.needs_input_grad[2]:
            grad_bias = rows_of(g).sum(0)
        if x is not None:
            _, gradient = derivatives()
            grad_blocks, grad_tail = gradient(rows_of(x), rows_of(g), layout)
            grad_blocks = grad_blocks.to(blocks.dtype)
            grad_tail = None if grad_tail is None else grad_tail.to(tail.dtype)
        return grad_x, None, grad_bias, grad_blocks, grad_tail, None, None
