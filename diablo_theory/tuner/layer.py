"""The adapted layer: ``nn.Linear`` or transformers' ``Conv1D``, plain or quantised, with any number of adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner.config import DiaBloConfig
from diablo_theory.tuner.quantised import Kept, backend_of, check_writable, dequantised, is_reordered, storable, write

#: Standard deviation of D with ``init_weights=False``: visible in outputs, small beside a pretrained weight's entries.
RANDOM_STD = 0.02


class DiaBloLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """``base_layer(x) + x D`` with ``D`` block-diagonal and trainable, for each active adapter.

    How that is computed is the mode of :meth:`mode`; the base weight holds W0 in either.

    Args:
        base_layer: The layer to adapt: ``nn.Linear``, ``Conv1D`` or a quantised linear layer that peft knows.
        adapter_name: Name of the first adapter.
        num_blocks: Its N, from 1 to max(m1, m2).
        config: Its other choices.
        **kwargs: What peft's quantisation backends need.

    Attributes:
        diablo_blocks: Adapter name to the complete blocks, shape (k, d1, d2), inputs by outputs.
        diablo_tail: Adapter name to the one block that the edge of the matrix cuts; see :class:`BlockLayout`.

    Raises:
        TypeError: If the layer is of another kind, or num_blocks is not an integer.
        ValueError: If num_blocks does not fit the layer, or mode "merged" is asked for where it is not valid.

    Source: arXiv 2506.03230v2, section 3; zero start and no scaling factor as in the paper.
    """

    adapter_layer_names = ("diablo_blocks", "diablo_tail")
    other_param_names = ("diablo_layout", "diablo_mode", "diablo_dropout")

    base_layer: Any
    quantization_backend: Any
    diablo_blocks: nn.ParameterDict
    diablo_tail: nn.ParameterDict
    diablo_dropout: nn.ModuleDict
    _writer: ops.BlockWriter
    if TYPE_CHECKING:  # what peft's untyped mixin brings
        active_adapters: list[str]
        set_adapter: Callable[..., None]
        _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
        _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, num_blocks: int, config: DiaBloConfig, **kwargs: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = backend_of(base_layer, **kwargs)
        self.in_features, self.out_features = features(base_layer, quantised=self.quantization_backend is not None)
        self.diablo_blocks = nn.ParameterDict()
        self.diablo_tail = nn.ParameterDict()
        self.diablo_dropout = nn.ModuleDict()
        self.diablo_layout: dict[str, BlockLayout] = {}
        self.diablo_mode: dict[str, str] = {}
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._active_adapter = adapter_name
        #: What each merge replaced, in order: (adapter, the entries that its blocks covered).
        self._undo: list[tuple[str, Any]] = []
        self._writer = ops.BlockWriter(inputs_first=isinstance(base_layer, Conv1D))
        self.update_layer(adapter_name, num_blocks, config)

    def update_layer(
        self, adapter_name: str, num_blocks: int, config: DiaBloConfig, inference_mode: bool = False, **_: Any
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            num_blocks: Its N.
            config: Its other choices.
            inference_mode: Leave it frozen.

        Raises:
            TypeError: If num_blocks is not an integer.
            ValueError: If num_blocks does not fit, or mode "merged" is not valid here.
        """
        layout = BlockLayout(self.in_features, self.out_features, num_blocks)
        if config.mode == "merged" and (reason := self._why_never_merged()):
            raise ValueError(f"mode 'merged' is not valid here: {reason}. Use mode 'auto' or 'additive'")
        self.diablo_layout[adapter_name] = layout
        self.diablo_mode[adapter_name] = config.mode
        self.diablo_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.diablo_blocks[adapter_name] = nn.Parameter(
            torch.zeros(layout.complete, layout.block_rows, layout.block_cols)
        )
        if layout.tail:
            self.diablo_tail[adapter_name] = nn.Parameter(torch.zeros(layout.tail))
        if not config.init_weights:
            for parameter in self.parts(adapter_name):
                if parameter is not None:
                    nn.init.normal_(parameter, std=RANDOM_STD)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.dtype is not None:
            for parts in (self.diablo_blocks, self.diablo_tail):
                if adapter_name in parts:
                    parts[adapter_name] = parts[adapter_name].to(config.dtype)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def parts(self, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """The blocks and the tail (or None) of an adapter."""
        return self.diablo_blocks[adapter_name], self.diablo_tail.get(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output, in the dtype that the base layer returns."""
        if self._disable_adapters and self._undo:
            self.unmerge()
        if self._disable_adapters or self._undo:
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.diablo_layout]
        if len(active) == 1 and not args and not kwargs and self._why_additive(active[0]) is None:
            dtype = _product_dtype(x, self.base_layer.weight.dtype)
            if x.dtype == dtype:
                return self._merged_forward(x, active[0])
            if _autocasts(x):
                return self._merged_forward(x.to(dtype), active[0])
            # An input of a wrong dtype is left to the base layer, which says so.
        quantised = self.quantization_backend is not None
        if quantised and x.requires_grad and torch.is_grad_enabled() and is_reordered(self.base_layer):
            raise RuntimeError(
                "bitsandbytes reordered this 4-bit weight for inference on this CPU when the model was evaluated, and "
                "computes no gradients through it any more: load the model again to train it, or quantise with torchao"
            )
        result = self.base_layer(x, *args, **kwargs)
        if quantised:
            result = self.quantization_backend.maybe_clone_base_result(result)
        # Nobody else holds what a plain layer returns.
        ours = self._why_never_merged() is None and _why_not_plain(self.base_layer) is None
        for name in active:
            blocks, tail = self.parts(name)
            inputs = self.diablo_dropout[name](self._cast_input_dtype(x, _product_dtype(x, blocks.dtype)))
            result = ops.additive(result, inputs, blocks, tail, self.diablo_layout[name], overwrite=ours)
        return result

    def _merged_forward(self, x: Tensor, name: str) -> Tensor:
        base = self.base_layer
        return ops.merged(x, base.weight, base.bias, *self.parts(name), self.diablo_layout[name], self._writer)

    def mode(self, adapter_name: str) -> tuple[str, str]:
        """How an adapter is applied when it is the only active one, and why.

        Returns:
            "merged" or "additive", and the reason in words.
        """
        if self.diablo_mode[adapter_name] == "additive":
            return "additive", "asked for"
        if reason := self._why_additive(adapter_name):
            return "additive", reason
        return "merged", "asked for" if self.diablo_mode[adapter_name] == "merged" else "valid for this layer"

    def _why_never_merged(self) -> str | None:
        """What is true of the base layer itself, for as long as it is wrapped."""
        base = self.base_layer
        if self.quantization_backend is not None:
            return f"the base weight is quantised ({self.quantization_backend.backend_name})"
        if type(base) is not nn.Linear and type(base) is not Conv1D:
            return f"the base layer is a {type(base).__name__} with a forward pass of its own"
        return None

    def _why_additive(self, adapter_name: str) -> str | None:
        """Why merged mode is not valid at this moment, or None. Called in every forward pass: cheap checks only."""
        if self.diablo_mode[adapter_name] == "additive":
            return "asked for"
        if torch.compiler.is_compiling():
            return "torch.compile is at work, which fuses plain operations"
        base = self.base_layer
        # torch's mark on what FSDP (1 and 2) manages. The weight alone does not tell: for the forward pass it is whole
        # and plain, and the mode has to be the one that mode() says between passes.
        if "_is_fsdp_managed_module" in base.__dict__:
            return "the base weight is sharded (FSDP)"
        if reason := self._why_never_merged():
            return reason
        weight = base.weight
        if reason := _why_not_plain(base):
            return reason
        if isinstance(self.diablo_dropout[adapter_name], nn.Dropout):
            return "dropout acts on the adapter's input alone"
        if type(weight) not in (nn.Parameter, Tensor):
            return f"the base weight is a {type(weight).__name__} (sharded, or another kind of tensor)"
        if weight.requires_grad:
            return "the base weight is trained too"
        if weight.is_meta or weight.device != self.diablo_blocks[adapter_name].device:
            return "base weight and adapter are not on one real device"
        if weight.is_inference() or (weight.is_cpu and weight.untyped_storage().is_shared()):
            return "the base weight must not be written to (shared between processes, or an inference tensor)"
        return None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """D as a dense matrix in the orientation of the base weight, in the adapter's dtype."""
        blocks, tail = self.parts(adapter)
        dense = self.diablo_layout[adapter].scatter(blocks.detach(), None if tail is None else tail.detach())
        return dense if self._writer.inputs_first else dense.T

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
                with self._writer.lock:
                    self._merge_quantised(name) if self.quantization_backend else self._merge(name)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._writer.lock:
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
        done = len(self._undo)
        self._undo.append((name, kept))
        if norm == 0:  # rounding the weight again would change it for nothing
            return
        try:  # interrupted anywhere, the weight and the record of it agree
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
        finally:
            self._undo.pop()

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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """DiaBlo adds a matrix to the weight, so peft can approximate it by a LoRA."""
        return True

    def extra_repr(self) -> str:
        """Blocks, their size and the mode with its reason, for ``print(model)``."""
        lines = []
        for name, layout in self.diablo_layout.items():
            mode, reason = self.mode(name)
            size = f"block={layout.block_rows}x{layout.block_cols}, tail={layout.tail}"
            lines.append(f"{name}: num_blocks={layout.num_blocks}, {size}, mode={mode} ({reason})")
        if self.quantization_backend is not None:
            lines.append(f"quantization_backend={self.quantization_backend.backend_name!r}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"diablo.{super().__repr__()}"


def features(layer: nn.Module, *, quantised: bool) -> tuple[int, int]:
    """The sizes m1 and m2 of a layer that can be adapted.

    Raises:
        TypeError: If the layer is of a kind that cannot.
    """
    if isinstance(layer, Conv1D):
        m1, m2 = layer.weight.shape
        return int(m1), int(m2)
    if isinstance(layer, nn.Linear) or quantised:
        sizes: Any = layer.in_features, layer.out_features
        return sizes
    raise TypeError(
        f"is of type {type(layer).__name__}; "
        "DiaBlo adapts torch.nn.Linear and transformers' Conv1D, plain or quantised"
    )


def _finite_sum(old: Tensor, new: Tensor) -> bool:
    """Whether ``old + new`` is finite in the dtype of ``old``; without adding where the largest entries tell."""
    largest = sum(max(-float(low), float(high)) for low, high in (torch.aminmax(old), torch.aminmax(new)))
    if largest < torch.finfo(old.dtype).max:  # false for NaN
        return True
    return bool(torch.isfinite((old + new).to(old.dtype)).all())


def _why_not_plain(base: nn.Module) -> str | None:
    """Why somebody may be watching what a base layer returns, or returning something else."""
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base layer has hooks, which must see its own output"
    if "forward" in base.__dict__:
        return "the base layer's forward method was replaced (offloading, for example)"
    return None


def _autocasts(x: Tensor) -> bool:
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What autocast would compute a product in, where it is on; otherwise ``dtype``."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else dtype
