"""Optimizers that belong to a method: LoRA-FA's, LoRA+'s, GaLore's. All others train with plain AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn

from diablo_theory.errors import ConfigError

#: (learning rate, weight decay, (beta1, beta2)) to the optimizer of a prepared model.
MakeOptimizer = Callable[[float, float, tuple[float, float]], torch.optim.Optimizer]
#: B's learning rate over A's. Source: the value that Hayou et al., arXiv 2402.12354, recommend (2^4).
LORA_PLUS_RATIO = 16.0
#: Source: the fine-tuning example of GaLore's authors (their pre-training has 200 and 0.25).
GALORE = {"update_proj_gap": 500, "scale": 4.0, "proj_type": "std"}


def optimizer_of(method: str, model: nn.Module, knob: int, alpha: float) -> MakeOptimizer | None:
    """The optimizer that a method needs, or None for plain AdamW.

    Args:
        method: Its name.
        model: The prepared model.
        knob: Its rank.
        alpha: Its alpha.

    Returns:
        Called with learning rate, weight decay and betas.
    """
    if method == "lora-fa":
        return partial(_lora_fa, model, knob, alpha)
    if method == "lora-plus":
        return partial(_lora_plus, model)
    if method == "galore":
        return partial(_galore, galore_class(), model, knob)
    return None


def _lora_fa(
    model: nn.Module, rank: int, alpha: float, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = create_lorafa_optimizer(model, rank, alpha, lr, weight_decay)
    for group in optimizer.param_groups:
        group["betas"] = betas
    return optimizer


def _lora_plus(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=lr,
        loraplus_lr_ratio=LORA_PLUS_RATIO,
        loraplus_weight_decay=weight_decay,
        betas=betas,
    )
    return optimizer


def galore_class() -> Any:
    """GaLore's AdamW.

    Raises:
        ConfigError: If the package galore-torch is not installed.
    """
    try:
        return import_module("galore_torch").GaLoreAdamW
    except ImportError as error:
        raise ConfigError(f"galore needs the package galore-torch (the extra galore): {error}") from None


def _galore(
    optimizer: Any, model: nn.Module, rank: int, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: torch.optim.Optimizer = optimizer(
        [{"params": weights, "rank": rank, **GALORE}],
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        no_deprecation_warning=True,
    )
    return made


def classes_in_state() -> list[Any]:
    """Classes whose objects an optimizer keeps in its state, which a checkpoint may hold beside tensors."""
    try:
        return [import_module("galore_torch.galore_projector").GaLoreProjector]
    except ImportError:
        return []


def move_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring what torch leaves where a checkpoint was read to where the parameters are.

    torch moves tensors that are kept by parameter. LoRA-FA keeps its own by the names of layers, and GaLore keeps
    projectors, objects that hold a tensor.
    """
    device = optimizer.param_groups[0]["params"][0].device
    entries: dict[Any, dict[str, Any]] = dict(optimizer.state)  # torch's types know parameters as keys alone
    for key, entry in entries.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and not isinstance(key, Tensor):
                entry[name] = value.to(device)
            elif isinstance(matrix := getattr(value, "ortho_matrix", None), Tensor):
                value.ortho_matrix = matrix.to(device)
