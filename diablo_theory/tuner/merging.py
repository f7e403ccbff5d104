"""Merging adapters into base weights and taking them out again, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner.quantised import Kept, check_writable, dequantised, storable, write


class Merging(nn.Module):
    """The part of an adapted layer that merges and unmerges; see :class:`diablo_theory.tuner.layer.DiaBloLinear`.

    Interrupted anywhere, the base weight and the record of what is merged agree.
    """

    base_layer: Any
    quantization_backend: Any
    diablo_layout: dict[str, BlockLayout]
    _writer: ops.BlockWriter
    #: What each merge replaced, in order: (adapter, the entries that its blocks covered).
    _undo: list[tuple[str, Any]]
    if TYPE_CHECKING:
        get_delta_weight: Callable[[str], Tensor]
        parts: Callable[[str], tuple[Tensor, Tensor | None]]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active adapters into the base weight; :meth:`unmerge` takes them out again bit for bit.

        Only the entries inside the blocks change, and each is rounded once for each adapter. A quantised weight is
        quantised again, with a warning that says how much of the update that lost.

        Args:
            safe_merge: Of no effect: a merge is always checked first.
            adapter_names: Other adapters than the active ones.

        Raises:
            ValueError: If an entry would not be finite; the weight is then untouched.
            TypeError: If the weight is quantised in a way that cannot be merged into; it is then untouched.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.diablo_layout:
                self.check_mergeable([name])
                with self._writer.lock(self.base_layer.weight):
                    self._merge_quantised(name) if self.quantization_backend else self._merge(name)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit."""
        if not self._undo:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._writer.lock(self.base_layer.weight):
            while self._undo:
                self._put_back()

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters, in the order in which they were merged."""
        return [name for name, _ in self._undo]

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Whether these adapters can be merged.

        Args:
            adapter_names: Those that this layer does not have, or has merged already, are left out.

        Raises:
            ValueError: If an entry would not be finite.
            TypeError: If the weight is quantised in a way that cannot be merged into.
        """
        for name in adapter_names:
            if name not in self.diablo_layout or name in self.merged_adapters:
                continue
            check_writable(self.base_layer, self.quantization_backend)
            if self.quantization_backend is not None:
                finite = bool(torch.isfinite(self._requantisable(name)[2]).all())
            else:
                finite = all(_finite_sum(old, new) for old, new in zip(*self._inside(name), strict=True))
            if not finite:
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken "
                    "(or infinite; the weights were left as they are)"
                )

    def _inside(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        blocks, tail = self.parts(name)
        parts = blocks.detach(), None if tail is None else tail.detach()
        return self._writer.inside(self.base_layer.weight.data, parts, self.diablo_layout[name])

    def _merge(self, name: str) -> None:
        inside, parts = self._inside(name)
        kept = [place.clone() for place in inside]
        done = len(self._undo)
        try:  # interrupted anywhere, the weight and the record of it agree
            torch._foreach_add_(inside, parts)
            torch.autograd.graph.increment_version(self.base_layer.weight)  # for graphs that have saved it
            self._undo.append((name, kept))
        except BaseException:
            torch._foreach_copy_(inside, kept)
            del self._undo[done:]
            raise

    def _requantisable(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The dequantised weight and D in float32, and their sum in the precision that is quantised."""
        before = dequantised(self.base_layer, self.quantization_backend)
        exact = torch.promote_types(before.dtype, torch.float32)
        delta = self.get_delta_weight(name).to(exact)
        merged = (before.to(exact) + delta).to(before.dtype)
        return before.to(exact), delta, storable(merged, self.quantization_backend)

    def _merge_quantised(self, name: str) -> None:
        kept = Kept(self.base_layer)
        before, delta, merged = self._requantisable(name)
        norm = torch.linalg.vector_norm(delta, dtype=torch.float64)
        if norm == 0:  # rounding the weight again would change it for nothing
            self._undo.append((name, kept))
            return
        done = len(self._undo)
        try:  # interrupted anywhere, the weight and the record of it agree
            self._undo.append((name, kept))
            missed = write(self, merged, kept) - before - delta
        except BaseException:
            self.base_layer = kept.layer
            kept.restore()
            del self._undo[done:]
            raise
        lost = float(torch.linalg.vector_norm(missed, dtype=torch.float64) / norm)
        warnings.warn(
            f"merging {name!r} into a quantised weight ({self.quantization_backend.backend_name}) rounds it again: "
            f"the change differs from the adapter's by {100 * lost:.1f}% of its norm",
            stacklevel=3,
        )

    def _put_back(self) -> None:
        """Undo the last merge; interrupted anywhere, the weight and the record of it agree."""
        name, kept = self._undo[-1]
        if self.quantization_backend is not None:
            self.base_layer = kept.layer
            kept.restore()
            self._undo.pop()
            return
        inside, _ = self._inside(name)
        try:
            torch._foreach_copy_(inside, kept)
        except BaseException:
            torch._foreach_copy_(inside, kept)  # done already, if it was an interrupt; if not, the record stays
            self._undo.pop()
            raise
        self._undo.pop()
        torch.autograd.graph.increment_version(self.base_layer.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What was kept aside for :meth:`unmerge` follows the weight to its device and dtype."""
        super()._apply(fn, recurse)
        if self.quantization_backend is None:
            self._undo = [(name, [fn(part) for part in kept]) for name, kept in self._undo]
        elif self._undo:
            now = Kept(self.base_layer)
            try:
                for place, (name, kept) in enumerate(self._undo):
                    kept.restore()
                    kept.layer._apply(fn)
                    self._undo[place] = name, Kept(kept.layer)
            finally:
                now.restore()
        return self


def _finite_sum(old: Tensor, new: Tensor) -> bool:
    """Whether ``old + new`` is finite in the dtype of ``old``; without adding where the largest entries tell."""
    largest = sum(max(-float(low), float(high)) for low, high in (torch.aminmax(old), torch.aminmax(new)))
    if largest < torch.finfo(old.dtype).max:  # false for NaN
        return True
    return bool(torch.isfinite((old + new).to(old.dtype)).all())
