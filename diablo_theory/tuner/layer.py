"""The adapted layer: ``nn.Linear`` or transformers' ``Conv1D``, plain or quantised, with any number of adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner.config import DiaBloConfig
from diablo_theory.tuner.merging import Merging
from diablo_theory.tuner.modes import why_additive, why_never_merged, why_not_plain
from diablo_theory.tuner.quantised import backend_of, is_reordered

#: Standard deviation of D with ``init_weights=False``: visible in outputs, small beside a pretrained weight's entries.
RANDOM_STD = 0.02


class DiaBloLinear(Merging, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
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
        self._undo = []
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
        if config.mode == "merged" and (reason := why_never_merged(self.base_layer, self.quantization_backend)):
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
        tail = self.diablo_tail[adapter_name] if self.diablo_layout[adapter_name].tail else None
        return self.diablo_blocks[adapter_name], tail

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output, in the dtype that the base layer returns."""
        if self._disable_adapters and self._undo:
            self.unmerge()
        if self._disable_adapters or self._undo:
            return self.base_layer(x, *args, **kwargs)
        base = self.base_layer  # looked up once: between two products even an attribute has to come from memory
        active = [name for name in self.active_adapters if name in self.diablo_layout]
        if len(active) == 1 and not args and not kwargs:
            (name,) = active
            blocks, tail = self.parts(name)
            if self._why_additive(name, base, blocks) is None:
                weight, autocasts = base.weight, _autocasts(x)
                if autocasts or x.dtype is weight.dtype:
                    inputs = x.to(_product_dtype(x, weight.dtype)) if autocasts else x
                    return ops.merged(inputs, weight, base.bias, blocks, tail, self.diablo_layout[name], self._writer)
                # An input of a wrong dtype is left to the base layer, which says so.
        quantised = self.quantization_backend is not None
        if quantised and x.requires_grad and torch.is_grad_enabled() and is_reordered(base):
            raise RuntimeError(
                "bitsandbytes reordered this 4-bit weight for inference on this CPU when the model was evaluated, and "
                "computes no gradients through it any more: load the model again to train it, or quantise with torchao"
            )
        result = base(x, *args, **kwargs)
        if quantised:
            result = self.quantization_backend.maybe_clone_base_result(result)
        # Nobody else holds what a plain layer returns.
        ours = why_never_merged(base, self.quantization_backend) is None and why_not_plain(base) is None
        for name in active:
            blocks, tail = self.parts(name)
            inputs = self.diablo_dropout[name](self._cast_input_dtype(x, _product_dtype(x, blocks.dtype)))
            result = ops.additive(result, inputs, blocks, tail, self.diablo_layout[name], overwrite=ours)
        return result

    def mode(self, adapter_name: str) -> tuple[str, str]:
        """How an adapter is applied: now if it is active, otherwise as if it were the only one; and why.

        Returns:
            "merged" or "additive", and the reason in words.
        """
        if reason := self._why_additive(adapter_name, self.base_layer, self.diablo_blocks[adapter_name]):
            return "additive", reason
        active = [name for name in self.active_adapters if name in self.diablo_layout]
        if adapter_name in active and len(active) > 1:
            return "additive", "several adapters are active"
        return "merged", "asked for" if self.diablo_mode[adapter_name] == "merged" else "valid for this layer"

    def _why_additive(self, name: str, base: nn.Module, blocks: Tensor) -> str | None:
        if self.diablo_mode[name] == "additive":
            return "asked for"
        return why_additive(base, self.quantization_backend, blocks, self.diablo_dropout[name])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """D as a dense matrix in the orientation of the base weight, in the adapter's dtype."""
        blocks, tail = self.parts(adapter)
        dense = self.diablo_layout[adapter].scatter(blocks.detach(), None if tail is None else tail.detach())
        return dense if self._writer.inputs_first else dense.T

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


def _autocasts(x: Tensor) -> bool:
    return x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What autocast would compute a product in, where it is on; otherwise ``dtype``."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else dtype
