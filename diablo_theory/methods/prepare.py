"""Makes exactly the parameters of one method trainable, at DiaBlo's budget or at a size that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn

from diablo_theory.errors import ConfigError, nearest
from diablo_theory.methods.families import FAMILIES, WITHOUT_ADAPTER, Choice, Family, has_adapter
from diablo_theory.methods.optimizers import MakeOptimizer, galore_class, optimizer_of
from diablo_theory.methods.places import PATTERNS
from diablo_theory.methods.sizes import knob_of, label_of
from diablo_theory.methods.starts import Batch, after_injection, before_injection, calibration_batches
from diablo_theory.methods.targets import entries, is_quantised, target_layers

#: Method to the part of the names of an adapter's parameters that stay as they start. Moving AdaLoRA's divisor, the
#: rank as a number, to another dtype makes peft 0.21 train it.
FROZEN = {"lora-fa": ".lora_A.", "adalora": ".ranknum."}
#: The random matrices that VeRA's and RandLoRA's layers share; peft multiplies them with what trains, uncast.
PROJECTIONS = ("vera_A", "vera_B", "randlora_A", "randlora_B")


@dataclass(frozen=True)
class Prepared:
    """A model ready to train: what is trainable, what to call the method in tables, and how to train it.

    Attributes:
        model: The model to train and evaluate (peft's wrapper for what is peft's).
        label: Such as ``"LoRA r=5"``.
        trainable_params: Number of trainable entries.
        total_params: Entries of the untouched model; the denominator of every percentage, as in the paper.
        knob: The rank, block size or N; None for ``none`` and ``full``.
        groups: Column suffix of the gradient norms to how a parameter of that group is recognised in its name.
        optimizer: Called with (learning rate, weight decay, betas); None means plain AdamW.
        after_step: To be called after each ``optimizer.step()``, before gradients are cleared, with the number of
            steps done (1 after the first); None for nothing.
    """

    model: nn.Module
    label: str
    trainable_params: int
    total_params: int
    knob: int | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    optimizer: MakeOptimizer | None = None
    after_step: Callable[[int], None] | None = None


def prepare(
    model: nn.Module,
    method: str,
    num_blocks: int,
    target_modules: Sequence[str],
    seed: int,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype | str | None = None,
    calibration: Callable[[], Iterable[Batch]] | None = None,
    steps: int | None = None,
) -> Prepared:
    """Make exactly the parameters of one method trainable, in place. torch's global random state stays as it is.

    DEVIATION(full-targets): full fine-tuning trains the same matrices that the adapters touch, so that the methods
    differ in how they change a matrix and in nothing else.
    DEVIATION(no-dropout): the authors' scripts drop 5% of the adapter's input; here nothing is dropped unless
    ``dropout`` asks for it.

    Args:
        model: A freshly loaded model, plain or quantised.
        method: ``none`` (nothing), ``full`` (the weights of the targets), or a name in ``FAMILIES``.
        num_blocks: DiaBlo's N; without ``rank`` it sets the others' budget too.
        target_modules: The adapted matrices, the same for all methods.
        seed: Of whatever the method draws.
        rank: The method's knob, instead of the one whose count is nearest to DiaBlo's.
        alpha: Instead of the family's own (see the package's table), where it has one.
        dropout: Probability with which an entry of the adapter's input is dropped in training.
        adapter_dtype: Of what trains, such as ``torch.float32`` or its name; left out, peft's rule: the base's, but
            float32 on a half-precision base.
        calibration: Gives the batches for eva, corda and lora-ga; the same ones at every call.
        steps: Length of the training, for adalora.

    Returns:
        The prepared model with its counts and its way to train.

    Raises:
        ConfigError: If there is no such method, an argument does not go with it, or a quantised base does not.
        ValueError: If a target matches nothing or num_blocks does not fit.
        TypeError: If a target is no linear layer.
    """
    if method not in (known := [*WITHOUT_ADAPTER, *FAMILIES]):
        raise ConfigError(f"method must be one of {', '.join(known)}, got {method!r}.{nearest(method, known)}")
    targets = target_layers(model, target_modules)
    family = FAMILIES.get(method)
    dtype = _dtype(adapter_dtype)
    check_options(method, alpha=alpha, dropout=dropout)
    _check(method, family, targets, dtype)
    knob = knob_of(method, targets, num_blocks, rank)
    total, label = entries(model), label_of(method, knob)
    if family is None or knob is None:
        _without_adapter(model, method, targets)
        return Prepared(model, label, _trainable(model), total, groups=WITHOUT_ADAPTER[method])
    scale = 0.0 if family.alpha is None else family.alpha(knob) if alpha is None else float(alpha)
    choice = Choice(knob, scale, dropout, seed, steps)
    if family.config is not None:
        model = _with_adapter(model, method, family, choice, targets, dtype, calibration)
    elif method in PATTERNS:
        _with_pattern(model, method, choice, targets, dtype)
    else:
        _without_adapter(model, "full", targets)
    optimizer = optimizer_of(method, model, knob, scale)
    after_step = _after_step(model, method)
    return Prepared(model, label, _trainable(model), total, knob, family.groups, optimizer, after_step)


def check_options(method: str, *, alpha: float | None = None, dropout: float = 0.0) -> None:
    """Refuse options that do not go with a known method, whatever the model.

    Args:
        method: As :func:`prepare` takes it.
        alpha: Likewise.
        dropout: Likewise.

    Raises:
        ConfigError: If an option does not go with it.
    """
    family = FAMILIES.get(method)
    if alpha is not None and (family is None or family.alpha is None):
        raise ConfigError(f"alpha={alpha} does not go with method {method}, which has no such factor")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout and (family is None or not family.dropout):
        raise ConfigError(f"dropout={dropout} does not go with method {method}, which has no adapter input to drop")


def _check(method: str, family: Family | None, targets: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """Refuse what does not go together, before anything is changed."""
    if dtype is not None and not has_adapter(method):
        raise ConfigError(f"adapter_dtype={dtype} does not go with method {method}, which has no adapter")
    if method == "galore":
        galore_class()
    for name, layer in targets.items():
        if reason := _why_unquantised(method, family, layer):
            raise ConfigError(f"method {method} cannot serve the quantised layer {name}: {reason}")


def _why_unquantised(method: str, family: Family | None, layer: nn.Module) -> str:
    """Why a method cannot serve a layer because of its quantisation; "" where it can."""
    if method == "none" or not is_quantised(layer):
        return ""
    if method == "dora" and type(layer).__name__ == "Linear8bitLt":
        return "after a step with peft 0.21's DoRA, bitsandbytes 0.50 misses the scales of its 8-bit weight"
    return why_unquantised(method)


def why_unquantised(method: str) -> str:
    """Why a known method cannot serve any base whose weights are stored quantised; "" where it can."""
    if method in FAMILIES:
        return FAMILIES[method].unquantised
    return "" if method == "none" else "it trains the base weight itself"


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"adapter_dtype must be a floating dtype of torch such as float32, got {given!r}")
    return dtype


def _without_adapter(model: nn.Module, method: str, targets: Mapping[str, Any]) -> None:
    """Freeze everything but, for ``full``, the targets' weights."""
    model.requires_grad_(False)
    if method == "full":
        for layer in targets.values():
            layer.weight.requires_grad_(True)


def _with_pattern(
    model: nn.Module, method: str, choice: Choice, targets: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    layers = PATTERNS[method].build(targets, choice.knob, choice.seed, choice.dropout)
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer.train(targets[name].training))
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(key.startswith("pattern_"))
    _cast(model, dtype)


def _with_adapter(
    model: nn.Module,
    method: str,
    family: Family,
    choice: Choice,
    targets: Iterable[str],
    dtype: torch.dtype | None,
    calibration: Callable[[], Iterable[Batch]] | None,
) -> nn.Module:
    assert family.config is not None
    config = family.config(choice)
    config.target_modules = set(targets)
    config.task_type = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    batches = calibration_batches(method, calibration) if family.start else []
    model.requires_grad_(False)
    training = model.training
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for a property by its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        # A hint about memory, not about the result.
        warnings.filterwarnings("ignore", message="lora with eva initialization", category=UserWarning)
        torch.manual_seed(choice.seed)
        before_injection(model, config, batches, family.start)
        adapted: nn.Module = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype is None)
        after_injection(adapted, config, batches, family.start)
    # peft's wrapper and dropout come in training mode, and EVA leaves all of the model as it finds the wrapper.
    adapted.train(training)
    _cast(adapted, dtype)
    for name, parameter in adapted.named_parameters():
        if method in FROZEN and FROZEN[method] in name:
            parameter.requires_grad_(False)
    return adapted


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is None:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            module.to(dtype)


def _after_step(model: Any, method: str) -> Callable[[int], None] | None:
    allocate: Callable[[int], None] | None = model.base_model.update_and_allocate if method == "adalora" else None
    return allocate


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
