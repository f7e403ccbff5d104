"""The file format of DiaBlo's authors: ``adapter.chkpt``, a torch.save'd dictionary of padded blocks.

Each adapted module has one entry, "<full name>.block_A" of shape (N, d1, d2) with d1 = ceil(m1/N) and
d2 = ceil(m2/N): block i reads inputs i d1 .. and writes outputs i d2 .., as in :class:`BlockLayout`.

DEVIATION(ragged-blocks): where N does not divide a size, their matrix is padded with zeros to N d1 x N d2, and blocks
that the edge of the true matrix cuts, or that lie past it, are stored whole. Entries outside the true matrix multiply
padded inputs or give outputs that are cut off, so they never did anything: they are dropped on reading (with a warning
if they are not zero) and written as zeros.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import nearest
from diablo_theory.files import write_with
from diablo_theory.tuner.config import ADAPTER_DTYPES, DiaBloConfig
from diablo_theory.tuner.targets import (
    adaptable_sizes,
    adapter_config,
    default_and_pattern,
    diablo_layers,
    exactly,
)

SUFFIX = ".block_A"

Fitted = dict[str, tuple[BlockLayout, Tensor]]


def save_chkpt(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write a DiaBlo adapter as its authors' code does; the file appears whole or not at all.

    Args:
        model: A model with a DiaBlo adapter.
        path: The file, by custom named ``adapter.chkpt``. Its keys are the names in the model inside peft's wrapper.
        adapter_name: Which adapter.

    Raises:
        ValueError: If there is no such adapter, it trains biases or whole modules (which the format cannot hold), or
            one of its entries is not finite.

    Source: the authors' code for arXiv 2506.03230v2 (parameter ``block_A``, file ``adapter.chkpt``).
    """
    config = adapter_config(model, adapter_name)
    for field, empty in (("bias", "none"), ("modules_to_save", None)):
        value = getattr(config, field, None) or empty
        if value != empty:
            raise ValueError(f"the format holds blocks only, and adapter {adapter_name!r} has {field}={value!r}")
    state = {}
    for name, layer in diablo_layers(model, adapter_name).items():
        blocks, tail = (None if part is None else part.detach().cpu() for part in layer.parts(adapter_name))
        assert blocks is not None
        state[name + SUFFIX] = padded(layer.diablo_layout[adapter_name], blocks, tail)
        if not torch.isfinite(state[name + SUFFIX]).all():
            raise ValueError(f"{name}: adapter {adapter_name!r} has entries that are not finite")
    write_with(Path(path), lambda aside: _save(state, aside))


def load_chkpt(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", **options: Any
) -> nn.Module:
    """Read an ``adapter.chkpt`` into a model: into a DiaBlo adapter that it has, or into a new one.

    A new adapter has the file's layers, blocks and dtype. One that exists must have the same layers and blocks; its
    dtype stays. A key names the module whose full name it ends in, the longest if several do, so that prefixes such as
    "model.", "base_model.model." or "module." do no harm; it may also lack the first parts of that name if only one
    module fits.

    Args:
        model: A plain model, or one with DiaBlo adapters.
        path: The file. It is read without running code from it (``weights_only``).
        adapter_name: Name of the adapter to fill or create.
        **options: Further fields of a new adapter's :class:`DiaBloConfig`, such as ``task_type`` or ``mode``.

    Returns:
        The model wrapped by peft; the model itself where it had adapters already.

    Raises:
        ValueError: If the file is truncated or holds anything but floating, finite blocks that fit the model; the
            message names file, key and what is needed. The model is then as it was before.
        TypeError: If a module that the file names cannot be adapted. The model is then as it was before.
        OSError: If the file cannot be opened.
    """
    path = Path(path)
    tensors = read_chkpt(path)
    if any(adapter_name in getattr(module, "diablo_layout", {}) for module in model.modules()):
        if options:
            raise ValueError(f"{', '.join(options)}: only for a new adapter, and the model has an {adapter_name!r}")
        _fill(model, path, tensors, adapter_name)
        return model
    fitted = _fit(path, tensors, adaptable_sizes(model), {})
    config = _config(model, fitted, options)
    _require_range(path, fitted, dict.fromkeys(fitted, config.dtype or torch.float32))
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name)
    _copy(model, adapter_name, fitted)
    return model


def read_chkpt(path: Path) -> dict[str, Float[Tensor, "n d1 d2"]]:
    """The blocks in a file by their keys without ``.block_A``, on the CPU, checked as far as possible without a model.

    Raises:
        ValueError: As :func:`load_chkpt`.
        OSError: If the file cannot be opened.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and pickle raise half a dozen kinds for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is truncated, is not a file of torch.save, or holds more than tensors ({reason})"
        ) from None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} must hold a dictionary of tensors named '...{SUFFIX}', got {_kind(state)}")
    for key, value in state.items():
        if not isinstance(key, str) or not key.endswith(SUFFIX):
            raise ValueError(f"{path}: unknown key {key!r}; every key must end in {SUFFIX!r}")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.ndim != 3:
            raise ValueError(
                f"{path}: {key!r} must be a tensor of shape (blocks, inputs, outputs), got {_kind(value)}"
            )
        if str(value.dtype).removeprefix("torch.") not in ADAPTER_DTYPES:
            raise ValueError(f"{path}: {key!r} must be one of {', '.join(ADAPTER_DTYPES)}, got {value.dtype}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: {key!r} has entries that are not finite; every entry must be")
    return {key.removesuffix(SUFFIX): value for key, value in state.items()}


def padded(
    layout: BlockLayout, blocks: Float[Tensor, "k d1 d2"], tail: Float[Tensor, "r c"] | None
) -> Float[Tensor, "n d1 d2"]:
    """All N blocks at their full size: what lies outside the matrix is zero."""
    whole = blocks.new_zeros(layout.num_blocks, layout.block_rows, layout.block_cols)
    whole[: layout.complete] = blocks
    if tail is not None:
        whole[layout.complete, : tail.shape[0], : tail.shape[1]] = tail
    return whole


def trimmed(
    layout: BlockLayout, whole: Float[Tensor, "n d1 d2"]
) -> tuple[Float[Tensor, "k d1 d2"], Float[Tensor, "r c"] | None]:
    """The complete blocks and the tail, as views of the padded blocks; the rest is left out."""
    k = layout.complete
    return whole[:k], whole[k, : layout.tail[0], : layout.tail[1]] if layout.tail else None


def _save(state: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:  # given a name, torch would write the temporary one into the archive
        torch.save(state, file)


def _config(model: nn.Module, fitted: Fitted, options: dict[str, Any]) -> DiaBloConfig:
    num_blocks, pattern = default_and_pattern({name: layout.num_blocks for name, (layout, _) in fitted.items()})
    dtype = functools.reduce(torch.promote_types, (whole.dtype for _, whole in fitted.values()))  # loses nothing
    decided: dict[str, Any] = {
        "num_blocks": num_blocks,
        "num_blocks_pattern": pattern or None,
        "target_modules": exactly(fitted, model),
    }
    for name in decided:
        if name in options:
            raise ValueError(f"{name} cannot be given: the file decides it")
    return DiaBloConfig(**{"adapter_dtype": str(dtype).removeprefix("torch."), **decided, **options})


def _fill(model: nn.Module, path: Path, tensors: Mapping[str, Tensor], adapter_name: str) -> None:
    layers = diablo_layers(model, adapter_name)
    if merged := [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise ValueError(f"adapter {adapter_name!r} is merged into {merged[0]}.weight: unmerge it first")
    layouts = {name: layer.diablo_layout[adapter_name] for name, layer in layers.items()}
    sizes = {name: (layout.in_features, layout.out_features) for name, layout in layouts.items()}
    fitted = _fit(path, tensors, sizes, {name: layout.num_blocks for name, layout in layouts.items()})
    if missing := [name for name in layers if name not in fitted]:
        raise ValueError(
            f"{path} holds nothing for {len(missing)} of the {len(layers)} layers that adapter {adapter_name!r} is "
            f"on, such as {missing[0]}: '{missing[0]}{SUFFIX}' is needed"
        )
    _require_range(path, fitted, {name: layer.parts(adapter_name)[0].dtype for name, layer in layers.items()})
    _copy(model, adapter_name, fitted)


def _require_range(path: Path, fitted: Fitted, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, (_, whole) in fitted.items():
        if not torch.isfinite(whole.to(dtypes[name])).all():
            raise ValueError(f"{path}: the blocks of {name} have entries too large for the adapter's {dtypes[name]}")


def _copy(model: nn.Module, adapter_name: str, fitted: Fitted) -> None:
    layers = diablo_layers(model, adapter_name)
    with torch.no_grad():
        for name, (layout, whole) in fitted.items():
            for part, value in zip(layers[name].parts(adapter_name), trimmed(layout, whole), strict=True):
                if part is not None and value is not None:
                    part.copy_(value)


def _fit(
    path: Path, tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], counts: Mapping[str, int]
) -> Fitted:
    """Module name to layout and padded blocks.

    Args:
        path: Of the file, for messages.
        tensors: From :func:`read_chkpt`.
        sizes: Module name to (m1, m2), for every module that a key may name.
        counts: Module name to N, where it is given.
    """
    keys: dict[str, str] = {}
    fitted: Fitted = {}
    outside = 0
    for key, whole in tensors.items():
        name = _module(path, key, sizes)
        if name in keys:
            raise ValueError(f"{path}: '{keys[name]}{SUFFIX}' and '{key}{SUFFIX}' both mean the module {name}")
        keys[name] = key
        try:
            layout = BlockLayout(*sizes[name], counts.get(name, whole.shape[0]))
        except ValueError as error:
            raise ValueError(f"{path}: '{key}{SUFFIX}' has shape {tuple(whole.shape)}: {error}") from None
        expected = (layout.num_blocks, layout.block_rows, layout.block_cols)
        if tuple(whole.shape) != expected:
            raise ValueError(
                f"{path}: '{key}{SUFFIX}' has shape {tuple(whole.shape)}; N={layout.num_blocks} blocks of the "
                f"{layout.in_features} x {layout.out_features} matrix of {name} need {expected}"
            )
        outside += int((whole != padded(layout, *trimmed(layout, whole))).sum())
        fitted[name] = layout, whole
    if outside:
        warnings.warn(
            f"{path}: {outside} entries outside the matrices are not zero; they never had an effect and are dropped",
            stacklevel=4,
        )
    return fitted


def _module(path: Path, key: str, names: Iterable[str]) -> str:
    """The module that a key means."""
    fitting = [name for name in names if f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}")]
    if not fitting:
        raise ValueError(f"{path}: '{key}{SUFFIX}' names no module that could take it.{nearest(key, names)}")

    def shared(name: str) -> tuple[int, bool]:
        return min(name.count("."), key.count(".")), name == key

    best = max(map(shared, fitting))
    chosen = [name for name in fitting if shared(name) == best]
    if len(chosen) > 1:
        raise ValueError(f"{path}: '{key}{SUFFIX}' could mean {' or '.join(chosen)}: it must name one module")
    return chosen[0]


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one of shape {tuple(value.shape)} ({value.layout}, {value.device})"
    return "an empty dictionary" if value == {} else f"a {type(value).__name__}"
