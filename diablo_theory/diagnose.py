"""What the theory says of a real model's layers on a real task: ranks, premises, captures and certificates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.data import IGNORED, collate, encode
from diablo_theory.finetune.models import LoadedModel
from diablo_theory.finetune.tasks import Example
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.diagnosis import captures, certificate_row
from diablo_theory.theory.recording import linear_layers, record
from diablo_theory.theory.statistics import LayerStatistics

# of a method and a start, the share that it captures: columns of the summary
_SUMMARY = {
    "capture_diablo": ("diablo", "zero"),
    "capture_lora_set": ("lora", "any"),
    "capture_lora_tangent": ("lora", "usual"),
    "capture_lora_frozen": ("lora-frozen-a", "usual"),
}


def layers_at(model: nn.Module, modules: Sequence[str], depths: int) -> list[str]:
    """Layers by the last part of their name, at evenly spaced depths of the model.

    Args:
        model: A model whose blocks are numbered in the layers' names, such as ``model.layers.7.self_attn.q_proj``.
        modules: Last parts of names, such as ``["q_proj", "down_proj"]``.
        depths: How many blocks to look at, from the first to the last; at least 1.

    Returns:
        Full names, in the model's order.

    Raises:
        ConfigError: If a module occurs in no numbered block, or depths is below 1.
    """
    if depths < 1:
        raise ConfigError(f"depths must be at least 1, got {depths}")
    numbered = {
        name: int(found[1])
        for name in linear_layers(model)
        if name.rpartition(".")[2] in modules and (found := re.search(r"\.(\d+)\.", name))
    }
    if missing := [module for module in modules if not any(name.endswith(f".{module}") for name in numbered)]:
        raise ConfigError(f"no linear layer of a numbered block is called {missing[0]!r}")
    last = max(numbered.values())
    chosen = {round(i * last / max(depths - 1, 1)) for i in range(depths)}
    return [name for name, depth in numbered.items() if depth in chosen]


def record_layers(
    loaded: LoadedModel,
    examples: Sequence[Example],
    layers: Sequence[str],
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LayerStatistics]:
    """Sums of the layers over a task's examples: inputs, and the change of outputs that the task's loss asks for.

    The loss is that of fine-tuning, over answer tokens, summed. Padding does not count.

    Args:
        loaded: The model, left as it was.
        examples: At least one.
        layers: Full names of ``nn.Linear`` layers.
        batch_size: Examples at a time.
        progress: Called with the number of batches after each.

    Returns:
        Sums by layer, with R = -g_Y.

    Raises:
        ConfigError: If a layer is unknown.
        ValueError: If there is no example.
        NonFiniteError: If an activation or a gradient is not finite.
    """
    device = next(loaded.model.parameters()).device
    encoded = encode(examples, loaded.tokenizer)
    parts = [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    batches = (_on(collate(part, loaded.tokenizer.pad_token_id), device) for part in parts)
    loaded.model.eval()
    return record(loaded.model, batches, _answer_loss, layers, keep=_is_token, progress=progress)


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _answer_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum"
    )


def _is_token(batch: dict[str, Any]) -> Tensor:
    mask: Tensor = batch["attention_mask"]
    return mask.bool()


def diagnose_layers(
    sums: Mapping[str, LayerStatistics],
    num_blocks: int,
    model: nn.Module | None = None,
    rtol: float | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of every layer: what each method could capture, and which side of the theorem it is on.

    Args:
        sums: What :func:`record_layers` returned, or a file of them.
        num_blocks: N.
        model: The model whose layers were recorded, for the starts that look at its weights (PiSSA, CorDA); left out
            without it.
        rtol: The rank decision, as in :meth:`LayerStatistics.reduce`.
        seed: Of LoRA's random factors.
        progress: Called with the number of layers after each.

    Returns:
        Captured shares of every layer, method, start and kind, columns layer, in_features, out_features and
        ``CAPTURE_COLUMNS`` (see :func:`theory.diagnosis.captures`); and one row a layer, the columns of
        :func:`theory.diagnosis.certificates`, then ``capture_diablo``, ``capture_lora_set``,
        ``capture_lora_tangent`` (its usual start) and ``capture_lora_frozen``.

    Raises:
        ConfigError: If the model has not all of the layers.
        ValueError: If there is no layer, one has no tokens, or num_blocks, rtol or a weight does not fit one.
        NonFiniteError: If a weight holds a NaN or an infinity.
    """
    if not sums:
        raise ValueError("sums must hold at least one layer's statistics, got none")
    weights = {} if model is None else linear_layers(model, list(sums))
    tables, rows = [], []
    for done, (name, layer) in enumerate(sums.items(), 1):
        problem = layer.reduce(rtol)
        W0 = weights[name].weight.detach().mT if weights else None
        table = captures(problem, [num_blocks], seeded(seed), W0)
        captured = table.set_index(["method", "start"])["capture"]
        row = {"layer": name} | certificate_row(layer, problem, num_blocks)
        rows.append(row | {column: captured[which] for column, which in _SUMMARY.items()})
        for place, column in enumerate(("layer", "in_features", "out_features")):
            table.insert(place, column, row[column])
        tables.append(table)
        if progress is not None:
            progress(done)
    return pd.concat(tables, ignore_index=True), pd.DataFrame(rows)
