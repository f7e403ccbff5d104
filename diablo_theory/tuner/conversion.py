"""DiaBlo and other adapters of peft: the nearest LoRA of a DiaBlo adapter, and the DiaBlo adapter that a SHiRA is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.tuners.shira import ShiraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo_theory.blocks import BlockLayout
from diablo_theory.files import atomic_folder, write_tensors
from diablo_theory.tuner.config import DiaBloConfig
from diablo_theory.tuner.registration import PREFIX
from diablo_theory.tuner.targets import (
    adapter_config,
    bare,
    carried_over,
    default_and_pattern,
    diablo_layers,
    exactly,
)

#: How peft's wrapper calls the model inside it; the keys of saved adapters begin with it.
INSIDE = "base_model.model."

State = dict[str, Tensor]


def to_lora(model: nn.Module, rank: float, adapter_name: str = "default") -> tuple[LoraConfig, State, pd.DataFrame]:
    """The LoRA adapter nearest to a DiaBlo adapter, layer by layer, and what is lost by it.

    The same as peft's ``convert_to_lora`` for a small part of its cost: D is block-diagonal, so its singular values
    are those of its blocks taken together, and N small decompositions stand in for a large one. The model is not
    changed. The factors are in float32 (float64 for an adapter in float64).

    Args:
        model: A model with a DiaBlo adapter.
        rank: An integer: the rank of every layer's LoRA. A float in (0, 1]: the share of each layer's energy (squared
            Frobenius norm of D) to keep; each layer then has the smallest rank that does.
        adapter_name: Which adapter.

    Returns:
        Configuration and weights, for :func:`save_adapter`, or for ``get_peft_model`` and
        ``set_peft_model_state_dict``; and one row a layer: ``rank`` (of the LoRA), ``rank_of_D``, ``relative_error``
        (Frobenius norm of what is lost over that of D), ``energy_kept``, and the parameters of both. Of D = 0 nothing
        is lost.

    Raises:
        TypeError: If rank is not a number.
        ValueError: If rank is out of range or larger than a layer's smaller size, there is no such adapter, it trains
            biases, or D is not finite.

    Source: Eckart and Young (1936): the largest singular values give the nearest matrix of a rank.
    """
    _require_rank(rank)
    bias = getattr(adapter_config(model, adapter_name), "bias", "none")
    if bias != "none":
        raise ValueError(f"bias must be 'none' for a LoRA of the same effect; adapter {adapter_name!r} has {bias!r}")
    layers = diablo_layers(model, adapter_name)
    ranks, rows, state = {}, [], State()
    for name, layer in layers.items():
        layout = layer.diablo_layout[adapter_name]
        smaller = min(layout.in_features, layout.out_features)
        if isinstance(rank, int) and rank > smaller:
            raise ValueError(
                f"rank must be at most {smaller} for {name} ({layout.in_features} x {layout.out_features}), got {rank}"
            )
        blocks, tail = (None if part is None else _at_least_float32(part) for part in layer.parts(adapter_name))
        assert blocks is not None
        if not torch.isfinite(blocks).all() or (tail is not None and not torch.isfinite(tail).all()):
            raise ValueError(f"{name}: adapter {adapter_name!r} has entries that are not finite")
        factors, values = block_svd(layout, blocks, tail, rank)
        state[f"{INSIDE}{name}.lora_A.weight"], state[f"{INSIDE}{name}.lora_B.weight"] = factors
        ranks[name] = factors[0].shape[0]
        rows.append({"layer": name, **_loss(layout, values, ranks[name])})
    r, pattern = default_and_pattern(ranks)
    config = LoraConfig(
        r=r,
        lora_alpha=r,  # alpha / r = 1: the scale is in the factors
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=exactly(layers, model),
        fan_in_fan_out=all(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        **carried_over(model, adapter_name),
    )
    return config, state | _saved_whole(model, adapter_name), pd.DataFrame(rows)


def block_svd(
    layout: BlockLayout, blocks: Float[Tensor, "k d1 d2"], tail: Float[Tensor, "r c"] | None, rank: float
) -> tuple[tuple[Float[Tensor, "rank m1"], Float[Tensor, "m2 rank"]], Float[Tensor, " s"]]:
    """The best approximation ``x A^T B^T`` of ``x D``, and all singular values that the blocks give.

    Args:
        layout: Of D.
        blocks: Its complete blocks.
        tail: Its tail.
        rank: As in :func:`to_lora`. Beyond the number of singular values A and B are filled with zeros.

    Returns:
        LoRA's A (orthonormal rows) and B, and the singular values in falling order.
    """
    pieces = list(zip(*torch.linalg.svd(blocks, full_matrices=False), strict=True))
    if tail is not None:
        pieces.append(torch.linalg.svd(tail, full_matrices=False))
    values = torch.cat([s for _, s, _ in pieces])
    order = torch.argsort(values, descending=True, stable=True)
    kept = rank if isinstance(rank, int) else _rank_for(values[order], rank)
    a, b = values.new_zeros(kept, layout.in_features), values.new_zeros(layout.out_features, kept)
    places = torch.argsort(order).split([len(s) for _, s, _ in pieces])  # where each value stands in the order
    for i, ((u, s, vh), place) in enumerate(zip(pieces, places, strict=True)):
        large = place < kept
        a[place[large], layout.rows(i)] = u.T[large]
        b[layout.cols(i), place[large]] = (s[:, None] * vh)[large].T
    return (a, b), values[order]


def from_shira(
    model: nn.Module, adapter_name: str = "default", num_blocks: int | None = None
) -> tuple[DiaBloConfig, State]:
    """The DiaBlo adapter with exactly the update of a SHiRA adapter whose masks lie inside diagonal blocks.

    The masks decide, not how far training has gone: a selected entry that is still zero counts. The model is not
    changed.

    Args:
        model: A peft model with a SHiRA adapter.
        adapter_name: Which adapter.
        num_blocks: N for all layers. By default each layer gets the smallest blocks that hold its mask; several N
            may give the same blocks, the smallest of them is taken. N = 1, the whole matrix, holds anything and is
            taken only if it is asked for.

    Returns:
        Configuration and weights, as :func:`to_lora`.

    Raises:
        TypeError: If num_blocks is not an integer.
        ValueError: If there is no such adapter, num_blocks does not fit a layer, an entry is not finite, or entries
            lie outside the blocks: the message says for each such layer how many, and which N fits best.

    Source: Bhardwaj et al., Sparse High Rank Adapters, arXiv 2406.13175, as in peft's ``ShiraConfig``.
    """
    counts, problems, state = {}, [], State()
    for name, layer in _shira_layers(model, adapter_name).items():
        sparse = layer.get_delta_weight(adapter_name).detach().coalesce()
        (cols, rows), values = sparse.indices(), sparse.values()
        if not torch.isfinite(values).all():
            raise ValueError(f"{name}: SHiRA adapter {adapter_name!r} has entries that are not finite")
        found = {layout.num_blocks: _outside(layout, rows, cols) for layout in _layouts(layer)}
        # The fewest entries outside, then the smallest blocks.
        best = min(found, key=lambda number: (found[number], -number), default=1)
        try:
            layout = BlockLayout(layer.in_features, layer.out_features, best if num_blocks is None else num_blocks)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if outside := _outside(layout, rows, cols):
            hint = "" if layout.num_blocks == best else f"; for N={best}, which fits best, {found[best]}"
            problems.append(
                f"  {name}: {outside} of {len(values)} selected entries lie outside for N={layout.num_blocks}"
                f"{hint or ', which fits best'}"
            )
            continue
        counts[name] = layout.num_blocks
        dense = values.new_zeros(layout.in_features, layout.out_features)
        dense[rows, cols] = values
        for kind, part in zip(("blocks", "tail"), layout.gather(dense), strict=True):
            if part is not None:
                state[f"{INSIDE}{name}.{PREFIX}{kind}"] = part
    if problems:
        raise ValueError(
            f"SHiRA adapter {adapter_name!r} is no DiaBlo adapter: entries lie outside the diagonal blocks\n"
            + "\n".join(problems)
        )
    default, pattern = default_and_pattern(counts)
    config = DiaBloConfig(
        num_blocks=default,
        num_blocks_pattern=pattern or None,
        target_modules=exactly(counts, model),
        **carried_over(model, adapter_name),
    )
    return config, state | _saved_whole(model, adapter_name)


def save_adapter(folder: str | os.PathLike[str], config: PeftConfig, state: Mapping[str, Tensor]) -> None:
    """Write a converted adapter as a folder that ``PeftModel.from_pretrained`` reads, whole or not at all.

    Args:
        folder: Must not exist, or be empty.
        config: From :func:`to_lora` or :func:`from_shira`.
        state: From the same.

    Raises:
        ValueError: If something is there already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {folder}, which is there already")
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()
    }
    with atomic_folder(folder) as aside:
        write_tensors(aside / SAFETENSORS_WEIGHTS_NAME, tensors, {"format": "pt"})
        config.save_pretrained(aside)


def _require_rank(rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(f"rank must be an integer or a float, got {rank!r} of type {type(rank).__name__}")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise ValueError(f"rank as a float is a share of energy and must be above 0 and at most 1, got {rank}")


def _at_least_float32(part: Tensor) -> Tensor:
    return part.detach().to(torch.promote_types(part.dtype, torch.float32))


def _rank_for(values: Tensor, share: float) -> int:
    """The fewest of the falling singular values that hold a share of the energy; at least 1."""
    energy = values.double().square().cumsum(0)
    return min(int(torch.searchsorted(energy, share * energy[-1])) + 1, len(values))


def _loss(layout: BlockLayout, values: Tensor, rank: int) -> dict[str, Any]:
    """One row of :func:`to_lora`'s table; values are in falling order."""
    negligible = float(values[0]) * max(layout.in_features, layout.out_features) * torch.finfo(values.dtype).eps
    energy = values.double().square()
    total = float(energy.sum())
    lost = float(energy[rank:].sum()) / total if total else 0.0
    return {
        "in_features": layout.in_features,
        "out_features": layout.out_features,
        "num_blocks": layout.num_blocks,
        "rank": rank,
        "rank_of_D": int((values > negligible).sum()),
        "relative_error": lost**0.5,
        "energy_kept": 1.0 - lost,
        "diablo_parameters": layout.num_parameters,
        "lora_parameters": rank * (layout.in_features + layout.out_features),
    }


def _shira_layers(model: nn.Module, adapter_name: str) -> dict[str, ShiraLayer]:
    layers = {name: module for name, module in bare(model).named_modules() if isinstance(module, ShiraLayer)}
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.shira_indices}
    if not found:
        known = sorted({name for layer in layers.values() for name in layer.shira_indices})
        raise ValueError(
            f"adapter_name must name a SHiRA adapter of the model ({', '.join(map(repr, known)) or 'it has none'}), "
            f"got {adapter_name!r}"
        )
    return found


def _layouts(layer: ShiraLayer) -> list[BlockLayout]:
    """The layouts with different blocks, of those with the same the one with the smallest N; without N = 1."""
    different: dict[tuple[int, int], BlockLayout] = {}
    for number in range(2, max(layer.in_features, layer.out_features) + 1):
        layout = BlockLayout(layer.in_features, layer.out_features, number)
        different.setdefault((layout.block_rows, layout.block_cols), layout)
    return list(different.values())


def _outside(layout: BlockLayout, rows: Int[Tensor, " n"], cols: Int[Tensor, " n"]) -> int:
    return int((rows // layout.block_rows != cols // layout.block_cols).sum())


def _saved_whole(model: nn.Module, adapter_name: str) -> State:
    """The entries of modules that are trained and saved whole beside the adapter."""
    config = adapter_config(model, adapter_name)
    if not getattr(config, "modules_to_save", None):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    whole = {key: value for key, value in state.items() if ".diablo_" not in key and ".shira_" not in key}
    return {INSIDE + key.removeprefix(INSIDE): value for key, value in whole.items()}
