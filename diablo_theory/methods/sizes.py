"""The size of a method on given layers, and the name that tables give to both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diablo_theory.errors import ConfigError
from diablo_theory.methods.families import FAMILIES, Family
from diablo_theory.methods.places import block_parameters

_LABELS = {"none": "Untouched model", "full": "Full fine-tuning"}


def nearest_knob(family: Family, layers: Sequence[Any], budget: int) -> int:
    """The knob, one for all layers, whose parameter count is nearest to a budget (the smaller on a tie).

    DEVIATION(lora-budget): the paper compares configurations whose rounded percentages are near; here DiaBlo's count
    decides, and all counts are printed.

    Args:
        family: The adapter.
        layers: The adapted layers, each with ``in_features`` and ``out_features``.
        budget: Trainable parameters to come close to.

    Returns:
        At least 1 (a rank, a block size), at most the smallest size of a layer.

    Raises:
        ConfigError: If no knob fits all layers.
    """
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    knobs = [k for k in range(1, min(map(min, sizes)) + 1) if all(family.fits(k, *size) for size in sizes)]
    if not knobs:
        raise ConfigError(f"target_modules: no {family.label.format('...')} fits all of the matrices")
    return min(knobs, key=lambda knob: abs(sum(family.count(knob, *size) for size in sizes) - budget))


def knob_of(method: str, targets: Mapping[str, Any], num_blocks: int, rank: int | None = None) -> int | None:
    """The size of a known method, one for all layers.

    Args:
        method: As :func:`prepare` takes it.
        targets: Full name to layer, each with ``in_features`` and ``out_features``.
        num_blocks: DiaBlo's N.
        rank: The size that is asked for.

    Returns:
        The rank, block size or N; None for ``none`` and ``full``.

    Raises:
        ConfigError: If the method has no rank to choose, or a layer cannot have this one.
        ValueError: If num_blocks does not fit.
    """
    family = FAMILIES.get(method)
    if rank is not None and (family is None or family.sized_by_blocks):
        instead = "num_blocks gives its size" if family else "it has no size to choose"
        raise ConfigError(f"rank={rank} does not go with method {method}: {instead}")
    if family is None:
        return None
    layers = list(targets.values())
    budget = sum(block_parameters(num_blocks, layer.in_features, layer.out_features) for layer in layers)
    if family.sized_by_blocks:
        return num_blocks
    if rank is None:
        return nearest_knob(family, layers, budget)
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    for name, layer in targets.items():
        if not family.fits(rank, layer.in_features, layer.out_features):
            size = f"{layer.in_features} x {layer.out_features}"
            raise ConfigError(f"rank={rank} is not possible with method {method} for {name} ({size})")
    return rank


def label_of(method: str, knob: int | None) -> str:
    """A method's name in tables, with its size where it has one."""
    return _LABELS[method] if method in _LABELS else FAMILIES[method].label.format(knob)
