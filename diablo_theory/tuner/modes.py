"""When merged mode is valid for a layer, and why not otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D


def why_never_merged(base: nn.Module, backend: Any) -> str | None:
    """What is true of the base layer itself, for as long as it is wrapped.

    Args:
        base: The base layer.
        backend: peft's quantisation backend for it, or None.

    Returns:
        The reason in words, or None where merged mode is possible.
    """
    if backend is not None:
        return f"the base weight is quantised ({backend.backend_name})"
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__} with a forward pass of its own"
    return None


def why_not_plain(base: nn.Module) -> str | None:
    """Why somebody may be watching what a base layer returns, or returning something else; None where nobody is."""
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base layer has hooks, which must see its own output"
    if _has_any_global_hook():
        return "there are hooks on all modules, which must see the base layer's own output"
    if "forward" in base.__dict__:
        return "the base layer's forward method was replaced (offloading, for example)"
    return None


def why_additive(base: Any, backend: Any, blocks: Tensor, dropout: nn.Module) -> str | None:
    """Why merged mode is not valid at this moment, or None. Called in every forward pass: cheap checks only.

    Args:
        base: The base layer.
        backend: peft's quantisation backend for it, or None.
        blocks: The adapter's blocks.
        dropout: What its input goes through.
    """
    if torch.compiler.is_compiling():
        return "torch.compile is at work, which fuses plain operations"
    # torch's mark on what FSDP (1 and 2) manages. The weight alone does not tell: for the forward pass it is whole
    # and plain, and the mode has to be the one that mode() says between passes.
    if "_is_fsdp_managed_module" in base.__dict__:
        return "the base weight is sharded (FSDP)"
    if reason := why_never_merged(base, backend) or why_not_plain(base):
        return reason
    if isinstance(dropout, nn.Dropout):
        return "dropout acts on the adapter's input alone"
    weight = base.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the base weight is a {type(weight).__name__} (sharded, or another kind of tensor)"
    if weight.requires_grad:
        return "the base weight is trained too"
    if weight.is_meta or weight.device != blocks.device:
        return "base weight and adapter are not on one real device"
    if weight.is_neg() or _overlaps(weight):
        return "entries of the base weight share memory (an expanded or a negated view)"
    if weight.is_inference() or (weight.is_cpu and weight.untyped_storage().is_shared()):
        return "the base weight must not be written to (shared between processes, or an inference tensor)"
    return None


def _overlaps(weight: Tensor) -> bool:
    """Whether two entries of a matrix may lie in one place."""
    (far, many), (near, few) = sorted(zip(weight.stride(), weight.shape, strict=True), reverse=True)
    return (few > 1 and near < 1) or (many > 1 and far < near * (few - 1) + 1)
