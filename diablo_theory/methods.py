"""Every compared method, by name and parameter budget. DiaBlo's budget sets LoRA's rank."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import peft
import torch
from torch import nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.tuner.model import add_diablo, target_layers

Method = Literal["none", "full", "lora", "diablo"]

#: Column suffix of the gradient norms -> how a parameter of that group is recognised in its name.
GRADIENT_GROUPS: dict[Method, dict[str, str]] = {
    "none": {},
    "full": {"W": ".weight"},
    "lora": {"A": ".lora_A.", "B": ".lora_B."},
    "diablo": {"D": ".diablo_"},
}


@dataclass(frozen=True)
class Prepared:
    """A model ready to train: what is trainable, and what to call the method in tables.

    Attributes:
        model: The model to train and evaluate (peft's wrapper for LoRA).
        label: Such as ``"LoRA r=5"``.
        trainable_params: Number of trainable entries.
        total_params: Entries of the untouched model; the denominator of every percentage, as in the paper.
    """

    model: nn.Module
    label: str
    trainable_params: int
    total_params: int


def nearest_lora_rank(layers: Sequence[nn.Linear], budget: int) -> int:
    """The LoRA rank, one for all layers, whose parameter count is nearest to a budget (the smaller on a tie).

    DEVIATION(lora-budget): the paper compares configurations whose rounded percentages are near; here DiaBlo's count
    decides, and both counts are printed.

    Args:
        layers: The adapted layers; rank r costs r (m1 + m2) on each.
        budget: Trainable parameters to come close to.

    Returns:
        At least 1.
    """
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    below = max(1, budget // per_rank)
    return min((below, below + 1), key=lambda rank: abs(rank * per_rank - budget))


def prepare(model: nn.Module, method: Method, num_blocks: int, target_modules: Sequence[str], seed: int) -> Prepared:
    """Make exactly the parameters of one method trainable, in place.

    DEVIATION(full-targets): full fine-tuning trains the same matrices that the adapters touch, so that the methods
    differ in how they change a matrix and in nothing else.
    DEVIATION(no-dropout): the authors' scripts drop 5% of the adapter's input; here no method has dropout.

    Args:
        model: A freshly loaded model.
        method: ``none`` (nothing), ``full`` (the weights of the targets), ``lora`` (peft's own, alpha = 2 r, no
            dropout, rank nearest to DiaBlo's count), ``diablo``.
        num_blocks: DiaBlo's N; it sets LoRA's budget too.
        target_modules: The adapted matrices, the same for all methods.
        seed: Of LoRA's random A.

    Returns:
        The prepared model with its counts.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    targets = target_layers(model, target_modules)
    model.requires_grad_(False)
    label = "Untouched model"
    if method == "full":
        for layer in targets.values():
            layer.weight.requires_grad_(True)
        label = "Full fine-tuning"
    elif method == "lora":
        budget = sum(BlockLayout(x.in_features, x.out_features, num_blocks).num_parameters for x in targets.values())
        rank = nearest_lora_rank(list(targets.values()), budget)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=list(target_modules),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for a property by its old name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            torch.manual_seed(seed)
            model = peft.get_peft_model(model, config)
        label = f"LoRA r={rank}"
    elif method == "diablo":
        add_diablo(model, num_blocks, target_modules)
        label = f"DiaBlo N={num_blocks}"
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Prepared(model, label, trainable, total)


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters by full name, as contiguous tensors on the CPU: all that a run changes."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`trainable_state` returned.

    Raises:
        ValueError: If names or shapes are not exactly those of the model's trainable parameters.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if parameters.keys() != state.keys():
        odd = sorted(parameters.keys() ^ state.keys())[0]
        raise ValueError(f"saved parameters do not belong to this model: {odd!r} is on one side only")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(state[name])
