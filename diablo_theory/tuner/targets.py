"""Which layers an adapter is on, under the names of the bare model, and configurations that mean exactly those."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from diablo_theory.tuner.layer import DiaBloLinear, features


def bare(model: nn.Module) -> nn.Module:
    """The model inside peft's wrappers; its module names are those of the model that was wrapped."""
    if isinstance(model, PeftModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def diablo_layers(model: nn.Module, adapter_name: str) -> dict[str, DiaBloLinear]:
    """Name in the bare model to layer, for every layer that a DiaBlo adapter is on.

    Raises:
        ValueError: If the model has no DiaBlo adapter of that name.
    """
    layers = {name: module for name, module in bare(model).named_modules() if isinstance(module, DiaBloLinear)}
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.diablo_layout}
    if not found:
        known = sorted({name for layer in layers.values() for name in layer.diablo_layout})
        raise ValueError(
            f"adapter_name must name a DiaBlo adapter of the model ({', '.join(map(repr, known)) or 'it has none'}), "
            f"got {adapter_name!r}"
        )
    return found


def adaptable_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name in the bare model to (m1, m2), for every layer of a kind that DiaBlo adapts or that is adapted already."""
    sizes, wrapped = {}, set()
    for name, module in bare(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            wrapped.add(f"{name}.base_layer")
        if name and name not in wrapped:
            try:
                sizes[name] = features(module, quantised=hasattr(module, "in_features"))
            except TypeError:
                continue
    return sizes


def exactly(names: Mapping[str, object], model: nn.Module) -> set[str] | str:
    """A ``target_modules`` that means these modules and no other: their names, or a regular expression.

    peft takes a name for the end of any full name, so that "fc" would mean "block.fc" too.
    """
    for name, _ in bare(model).named_modules():
        parts = name.split(".")
        if name not in names and any(".".join(parts[i:]) in names for i in range(1, len(parts))):
            return "|".join(re.escape(name) for name in names)
    return set(names)


def default_and_pattern(numbers: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most frequent number, and a pattern (as peft's rank_pattern) for the modules that have another."""
    default = Counter(numbers.values()).most_common(1)[0][0]
    # ^: without it peft would take the name for the end of longer names, too.
    return default, {f"^{re.escape(name)}": number for name, number in numbers.items() if number != default}


def carried_over(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What a configuration says about the model rather than about the method, for one of another method."""
    config = adapter_config(model, adapter_name)
    kept = ("task_type", "base_model_name_or_path", "revision", "modules_to_save")
    return {name: getattr(config, name, None) for name in kept}


def adapter_config(model: nn.Module, adapter_name: str) -> Any:
    """The configuration of an adapter, or None where the model keeps none."""
    return getattr(model, "peft_config", {}).get(adapter_name)
