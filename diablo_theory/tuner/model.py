"""Putting DiaBlo into a model and merging it back out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import nearest
from diablo_theory.tuner.layer import DiaBloLinear


def target_layers(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that a list of names means, in the model's order.

    A name matches a module whose full name equals it or ends in a dot and it, as in peft.

    Args:
        model: Any module.
        target_modules: Such as ``["q_proj", "down_proj"]``.

    Returns:
        Full name to layer.

    Raises:
        ValueError: If the list is empty or a name matches nothing; the message names the nearest that would.
        TypeError: If a match is not a plain ``nn.Linear``.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError(f"target_modules must be a non-empty list of module names, got {target_modules!r}")
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, nn.Linear] = {}
    for target in target_modules:
        matches = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matches:
            linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
            raise ValueError(f"target_modules: no module is named {target!r}.{nearest(target, linear)}")
        for name in matches:
            module = modules[name]
            if not isinstance(module, nn.Linear):
                raise TypeError(f"target_modules: {name} is a {type(module).__name__}, not a torch.nn.Linear")
            found[name] = module
    return {name: found[name] for name in modules if name in found}


def add_diablo(model: nn.Module, num_blocks: int, target_modules: Sequence[str]) -> dict[str, DiaBloLinear]:
    """Freeze a model and replace its target layers by DiaBlo layers, in place.

    Every target is checked before the first is replaced, so a bad argument leaves the model as it was.

    Args:
        model: Any module that holds ``nn.Linear`` layers.
        num_blocks: N, the same for every layer.
        target_modules: Names as in :func:`target_layers`.

    Returns:
        Full name to the new layer.

    Raises:
        TypeError: If num_blocks is not an integer, a target is not an ``nn.Linear``, or DiaBlo is already there.
        ValueError: If a name matches nothing, num_blocks does not fit a layer, or a target's weight is shared with
            another module (a tied weight would not see the update).
    """
    if any(isinstance(module, DiaBloLinear) for module in model.modules()):
        raise TypeError("model already has DiaBlo layers: merge them with merge_diablo first")
    targets = target_layers(model, target_modules)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in targets.items():
        shared = [other for other in owners[id(layer.weight)] if other != f"{name}.weight"]
        if shared:
            raise ValueError(
                f"target_modules: the weight of {name} is tied to {shared[0]} and cannot be adapted alone"
            )
        try:
            BlockLayout(layer.in_features, layer.out_features, num_blocks)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    model.requires_grad_(False)
    adapted = {name: DiaBloLinear(layer, num_blocks) for name, layer in targets.items()}
    for name, module in adapted.items():
        model.set_submodule(name, module)
    return adapted


def merge_diablo(model: nn.Module) -> int:
    """Write every DiaBlo update into its layer's weight and put the plain layers back, in place.

    Returns:
        How many layers were merged.

    Raises:
        ValueError: If an update is not finite; that layer and those after it stay as they were.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, DiaBloLinear)}
    for name, module in adapted.items():
        model.set_submodule(name, module.merged())
    return len(adapted)
