"""Quantised base weights: reading them, rounding a merged weight to them again, and going back bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn


def backend_of(layer: nn.Module, **kwargs: Any) -> Any:
    """What peft reads and writes the layer's quantised weight with, or None if it is not quantised.

    A torchao weight can be trained on without the recipe that made it, but not merged into.

    Args:
        layer: The base layer.
        **kwargs: What peft found out about the model's quantisation.
    """
    backend = resolve_quantization_backend(layer, **({"get_apply_tensor_subclass": _unknown} | kwargs))
    if getattr(backend, "get_apply_tensor_subclass", None) is _unknown:
        backend.supports_merge = False
    return backend


def _unknown() -> None:
    raise TypeError("how the weight was quantised is not known")


def check_writable(layer: nn.Module, backend: Any) -> None:
    """Raise TypeError if merged weights cannot be written into this layer.

    Args:
        layer: The base layer.
        backend: From :func:`backend_of`.
    """
    if backend is None:
        weight: Any = layer.weight
        if not weight.is_floating_point():
            raise TypeError(
                f"{type(layer).__name__} stores its weight as {weight.dtype}, in a form that peft does not know: "
                "adapters can be trained on it, but not merged into it"
            )
    elif not backend.supports_merge:
        known = getattr(backend, "get_apply_tensor_subclass", None) is not _unknown
        reason = (
            "peft cannot write such weights"
            if known
            else "how it was quantised is only known of a model that transformers loaded with a TorchAoConfig"
        )
        raise TypeError(f"adapters cannot be merged into a weight quantised by {backend.backend_name}: {reason}")


def is_reordered(layer: nn.Module) -> bool:
    """Whether bitsandbytes has reordered a 4-bit weight for inference on this CPU, as its first evaluation does."""
    return bool(getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False))


def dequantised(layer: nn.Module, backend: Any) -> Tensor:
    """What the layer multiplies by, as a dense matrix; the layer is not changed.

    Args:
        layer: The base layer.
        backend: From :func:`backend_of`.

    Raises:
        TypeError: If the quantiser cannot dequantise this weight.
    """
    try:
        weight: Tensor = backend.get_base_weight(_in_order(layer) if is_reordered(layer) else layer)
    except Exception as error:
        raise TypeError(f"{backend.backend_name} cannot dequantise this weight: {error}") from error
    return weight


def _in_order(layer: Any) -> nn.Module:
    """A stand-in for a layer whose 4-bit weight was reordered: the same numbers in the order for dequantising.

    bitsandbytes undoes its order when a state dict is taken. It then rounds the blocks' scales again, or leaves them
    transposed; here they are taken as they are.
    """
    weight, stand_in = copy.copy(layer.weight), copy.copy(layer)
    weight.quant_state = copy.copy(weight.quant_state)
    scales = weight.quant_state.absmax.T.reshape(-1).float()
    stand_in._parameters = {"weight": weight}
    stand_in.state_dict()
    weight.quant_state.absmax, weight.quant_state.nested = scales, False
    return stand_in


def storable(weight: Tensor, backend: Any) -> Tensor:
    """A dense weight in the precision from which the quantiser starts; entries outside its range become infinite.

    Args:
        weight: The merged weight, in the dtype of :func:`dequantised` or a larger one.
        backend: From :func:`backend_of`.
    """
    # bitsandbytes makes 8 bits out of float16, whatever it is given.
    return weight.half() if backend.backend_name == "bnb 8bit" else weight


class Kept:
    """A layer's quantised weight, and what its library keeps beside it, to go back to bit for bit.

    Nothing is copied: quantising again makes new tensors, and only the objects that hold them are changed.

    Args:
        layer: The base layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._names = list(layer._parameters)
        self._weight: Any = layer._parameters.get("weight")
        #: bitsandbytes: the 4-bit state of weight and layer, the 8-bit state that a forward pass moves to the layer.
        self._attributes: dict[str, Any] = {
            name: layer.__dict__[name] for name in ("quant_state", "state") if name in layer.__dict__
        }
        holders = [self._weight, getattr(self._weight, "quant_state", None), *self._attributes.values()]
        self._inside = [(holder, dict(vars(holder))) for holder in holders if hasattr(holder, "__dict__")]

    def restore(self) -> None:
        """Put everything back; done twice, it is as if done once."""
        for holder, inside in self._inside:
            vars(holder).clear()
            vars(holder).update(inside)
        self.layer.__dict__.update(self._attributes)
        if self._weight is not None:
            self.layer.__dict__.pop("weight", None)
            now = self.layer._parameters | {"weight": self._weight}
            self.layer._parameters = {name: now[name] for name in [*self._names, *now] if name in now}

    def is_like(self, layer: nn.Module) -> bool:
        """Whether a layer holds its weight in the same form."""
        return type(layer._parameters.get("weight")) is type(self._weight)


def write(adapted: Any, merged: Tensor, kept: Kept) -> Tensor:
    """Quantise a merged weight into the base layer.

    Args:
        adapted: The adapted layer, which peft's backends change; on an exception it may be left half-way.
        merged: The dense weight.
        kept: What the base layer held before.

    Returns:
        What the base layer now multiplies by.

    Raises:
        TypeError: If the quantiser cannot quantise this weight again.
        ValueError: If an entry is outside its range.
    """
    backend = adapted.quantization_backend
    try:
        adapted.set_base_weight(merged.contiguous())
    except Exception as error:
        raise TypeError(f"{backend.backend_name} cannot quantise the merged weight again: {error}") from error
    if not kept.is_like(adapted.base_layer):
        raise TypeError(f"{backend.backend_name} did not quantise the merged weight again")
    after = dequantised(adapted.base_layer, backend)
    if not torch.isfinite(after).all():
        raise ValueError(f"NaNs detected in the merged weights: they are outside the range of {backend.backend_name}")
    return after
