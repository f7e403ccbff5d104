"""Quantise chosen layers of a model in place, and say of each what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from diablo_theory.errors import ConfigError, NonFiniteError
from diablo_theory.quantise.calibration import Batch, gram_matrices
from diablo_theory.quantise.config import QuantiseConfig
from diablo_theory.quantise.grid import Rule, round_to_nearest
from diablo_theory.quantise.magr import magr
from diablo_theory.quantise.maintained import quantisation, quantise_with_torchao
from diablo_theory.quantise.optq import descend, optq
from diablo_theory.quantise.walking import walk
from diablo_theory.theory.recording import linear_layers


@dataclass(frozen=True, eq=False)
class QuantisedReport:
    """What was quantised, how, and how well.

    Attributes:
        config: As it was given.
        layers: A row a layer, in the order in which they were quantised: layer, in_features, out_features,
            output_error (``||X W - X W0|| / ||X W0||`` over the calibration text, X as the layer met it; missing
            without text), weight_error (``||W - W0|| / ||W0||``), magr_error (the output error of MagR alone, 0
            without it), largest_before and largest_after (max |W0|, and the same after MagR), bits_per_weight (scales
            and zeros included; for simulated methods what a packed weight would take).
    """

    config: QuantiseConfig
    layers: pd.DataFrame

    @property
    def bits_per_weight(self) -> float:
        """The mean over all quantised weights."""
        weights = self.layers["in_features"] * self.layers["out_features"]
        return float((self.layers["bits_per_weight"] * weights).sum() / weights.sum())


def quantise(
    model: Any,
    targets: Sequence[str],
    config: QuantiseConfig,
    batches: Iterable[Batch] | None = None,
    progress: Callable[[int], None] | None = None,
) -> QuantisedReport:
    """Quantise layers of a model in place; they are frozen afterwards. Nothing is saved.

    Own variants leave an ``nn.Linear`` with values of the grid in the dtype that it had; torchao's leave a quantised
    tensor in it. Biases stay as they are. If it fails half-way, the layers before are quantised: load the model again.

    Args:
        model: A language model of transformers, or any module to be called with a batch's entries by name.
        targets: Full names of its ``nn.Linear`` layers.
        config: How.
        batches: Calibration text, such as from :func:`segments`; ``attention_mask`` leaves padding out. Methods that
            need none report no output errors without it.
        progress: Called with the number of layers after each.

    Returns:
        A row a layer.

    Raises:
        ConfigError: If a layer is unknown, shares its weight with another module or is quantised already, a group size
            does not fit torchao, torchao is missing, a method lacks calibration text, or the model's blocks are no
            plain chain (see ``sequential``).
        ValueError: If there is no batch, a mask does not fit, or a layer met no token.
        NonFiniteError: If an input or a weight is not finite; the message names the layer.
    """
    layers = linear_layers(model, targets)
    _check(model, layers, config)
    if batches is None and config.needs_calibration:
        raise ConfigError(f"method {config.method!r} needs calibration text: batches=None is for rtn and torchao-*")
    rows: list[dict[str, Any]] = []
    for grams in _stages(model, list(layers), config, batches):
        for name, gram in grams.items():
            rows.append({"layer": name} | _quantise_layer(layers[name], gram, config))
            if progress is not None:
                progress(len(rows))
    return QuantisedReport(config, pd.DataFrame(rows))


def _stages(
    model: Any, layers: Sequence[str], config: QuantiseConfig, batches: Iterable[Batch] | None
) -> Iterator[Mapping[str, Tensor | None]]:
    """The layers with their sums, those together that are calibrated together."""
    if batches is None:
        yield dict.fromkeys(layers)
    elif config.sequential:
        yield from walk(model, layers, batches)
    else:
        yield gram_matrices(model, layers, batches)


def _check(model: nn.Module, layers: Mapping[str, nn.Linear], config: QuantiseConfig) -> None:
    if not config.is_simulated:
        quantisation()
    parameters = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for name, layer in layers.items():
        if type(layer.weight) is not nn.Parameter or not layer.weight.is_floating_point():
            raise ConfigError(f"layer {name!r} is quantised already: its weight is a {type(layer.weight).__name__}")
        if parameters.count(id(layer.weight)) > 1:
            raise ConfigError(f"layer {name!r} shares its weight with another module: leave it out of targets")
        if not bool(layer.weight.isfinite().all()):
            raise NonFiniteError(f"layer {name!r}: its weight holds a NaN or an infinity")
        config.check_inputs(name, layer.in_features)


@torch.no_grad()
def _quantise_layer(layer: nn.Linear, gram: Tensor | None, config: QuantiseConfig) -> dict[str, Any]:
    """Quantise one layer in place; its row of the report."""
    W0 = layer.weight.detach().mT.double().contiguous()
    if gram is not None:
        gram = gram.to(W0.device)
    W1 = W0
    if config.has_magr and gram is not None:
        # The steps correct their own rounding, so float32 is enough, and takes half the time.
        W1 = magr(W0.float(), gram, config.penalty, config.iterations, config.group_size).double()
    if config.is_simulated:
        rule = Rule(config.bits, config.group_size, config.step_shrink)
        layer.weight.copy_(_on_grid(W0, W1, gram, config, rule).mT)
        weight, bits = layer.weight, rule.bits_per_weight(layer.in_features)
    else:
        weight, bits = quantise_with_torchao(layer, config)
    layer.requires_grad_(False)
    W = weight.mT.double()
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "output_error": _error(W, W0, gram) if gram is not None else float("nan"),
        "weight_error": _error(W, W0),
        "magr_error": _error(W1, W0, gram) if W1 is not W0 else 0.0,
        "largest_before": float(W0.abs().max()),
        "largest_after": float(W1.abs().max()),
        "bits_per_weight": bits,
    }


def _on_grid(W0: Tensor, W1: Tensor, gram: Tensor | None, config: QuantiseConfig, rule: Rule) -> Tensor:
    """Weights on the grid in place of W1, which MagR may have made of W0."""
    if gram is None or not config.method.endswith("optq"):
        return round_to_nearest(W1, rule)
    Q, grids = optq(W1, gram, rule, config.damping)
    return descend(Q, W0, gram, grids, rule, config.descent_sweeps)


def _error(W: Tensor, W0: Tensor, gram: Tensor | None = None) -> float:
    """``||X W - X W0|| / ||X W0||``, or of the weights themselves; 0 for 0/0."""
    change, whole = (float((V * (V if gram is None else gram @ V)).sum().clamp(min=0)) for V in (W - W0, W0))
    return float((change / whole) ** 0.5) if whole else float("inf") if change else 0.0
