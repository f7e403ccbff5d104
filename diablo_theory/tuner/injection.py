"""What injecting an adapter checks beforehand, and how it is undone when it fails half-way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner.config import DiaBloConfig
from diablo_theory.tuner.layer import DiaBloLinear, features


class Snapshot:
    """The structure of a model and what trains in it, to go back to.

    Tensors are not copied: injection replaces modules and changes flags, it writes into no weight.

    Args:
        model: The model that is about to be changed.
        config: The configuration that injection may fill in.
    """

    def __init__(self, model: nn.Module, config: DiaBloConfig) -> None:
        self._config, self._fields = config, copy.deepcopy(config.__dict__)
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._active = [
            (module, module._active_adapter, module._disable_adapters)
            for module in model.modules()
            if isinstance(module, BaseTunerLayer)
        ]

    def restore(self, adapter_name: str) -> None:
        """Put everything back as it was; nothing of ``adapter_name`` is left."""
        for module, children in self._children:
            for name in [name for name in module._modules if name not in children]:
                del module._modules[name]
            module._modules.update(children)
            if isinstance(module, DiaBloLinear):
                for attribute in module.adapter_layer_names + module.other_param_names:
                    if adapter_name in getattr(module, attribute):
                        del getattr(module, attribute)[adapter_name]
        for layer, active, disabled in self._active:
            layer._active_adapter, layer._disable_adapters = active, disabled
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._config.__dict__.clear()
        self._config.__dict__.update(self._fields)


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """The identity of each parameter and module to all full names that it has in the model."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules(remove_duplicate=False):
        owners.setdefault(id(module), []).append(name)
    return owners


def check_target(target: nn.Module, parent: nn.Module, owners: Mapping[int, list[str]]) -> None:
    """Refuse a layer that an adapter would silently not reach, or reach together with others.

    Args:
        target: The layer to adapt.
        parent: The module that holds it.
        owners: From :func:`owners_of`.

    Raises:
        TypeError: If the layer is of another kind, another tuner's, or part of ``nn.MultiheadAttention``.
        ValueError: If its weight is tied, or its parent reads the weight without calling the layer.
    """
    if isinstance(target, DiaBloLinear):
        return
    if isinstance(target, BaseTunerLayer):
        kind = f"{type(target).__module__.split('.')[-2]}.{type(target).__name__}"
        raise TypeError(f"is already adapted by {kind}; merge that adapter or unload it first")
    _features(target)
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError("nn.MultiheadAttention reads this weight without calling the layer: an adapter has no effect")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            "nn.TransformerEncoderLayer reads this weight without calling the layer in evaluation (its fast path): "
            "call torch.backends.mha.set_fastpath_enabled(False) first"
        )
    names = owners.get(id(target), [])
    if len(names) > 1:
        raise ValueError(f"the same module is used as {' and '.join(names)}: only one of them would be adapted")
    weight = getattr(target, "weight", None)
    tied = [name for name in owners.get(id(weight), []) if name != f"{names[0]}.weight"] if names else []
    if isinstance(weight, nn.Parameter) and tied:
        raise ValueError(f"its weight is tied to {tied[0]} and cannot be adapted alone: untie them first")


def budget_blocks(targets: Mapping[str, nn.Module], config: DiaBloConfig) -> int:
    """The one N for all targets whose trainable entries come nearest to the budget (the larger N on a tie).

    Args:
        targets: Full name to layer.
        config: Holds the budget; targets in its num_blocks_pattern keep their own N, and count.

    Returns:
        N, at least 1 and at most the largest that fits every target.

    Raises:
        ValueError: If there is no target left to choose N for.
    """
    pattern = config.num_blocks_pattern or {}
    budget, sizes = int(config.parameter_budget or 0), []
    for name, layer in targets.items():
        size = _features(layer)
        own: Any = pattern.get(get_pattern_key(list(pattern), name))
        if own is None:
            sizes.append(size)
        else:
            budget -= BlockLayout(*size, own).num_parameters
    if not sizes:
        raise ValueError("parameter_budget: no target is left to choose num_blocks for")

    def distance(num_blocks: int) -> tuple[int, int]:
        total = sum(BlockLayout(m1, m2, num_blocks).num_parameters for m1, m2 in sizes)
        return abs(total - budget), -num_blocks

    return min(range(1, min(max(size) for size in sizes) + 1), key=distance)


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, DiaBloLinear):
        return layer.in_features, layer.out_features
    return features(layer, quantised=hasattr(layer, "in_features"))
