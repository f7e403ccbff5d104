"""Quantised bases of runs: made once for a model, a way and a text, and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch
from torch import Tensor, nn

from diablo_theory import __version__
from diablo_theory.files import atomic_folder, cache_folder, read_tensors, write_json, write_tensors
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.data import encode
from diablo_theory.finetune.tasks import TASKS, Wanted
from diablo_theory.quantise import QuantiseConfig, quantise, segments

WEIGHTS, REPORT, RECORD = "weights.safetensors", "layers.csv", "made_by.json"


def layers_of(model: Any) -> list[str]:
    """Full names of all linear layers of a language model but its output matrix."""
    output = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if type(part) is nn.Linear and part is not output]


def quantised_base(
    model: Any, tokenizer: Any, config: RunConfig, how: QuantiseConfig, progress: Callable[[int], None]
) -> pd.DataFrame:
    """Quantise every layer of :func:`layers_of` in place; the same base for every method and seed.

    MagR and OPTQ take minutes to hours, and runs share their bases: they are kept in the cache folder, under
    a name that depends on the weights, the way and the text. Delete ``quantised`` there to make them anew.

    DEVIATION(calibration-text): the text is the training set's, in the order of seed 0; the quantisers' own scripts
    take WikiText2.

    DEVIATION(qlora-base): for QLoRA's base, which is NF4, the run files take rounding to nearest on an even grid.

    Args:
        model: A freshly loaded model.
        tokenizer: Its tokenizer.
        config: Says which text.
        how: The way.
        progress: Told the number of layers that are finished.

    Returns:
        A row a layer, as in :class:`diablo_theory.quantise.QuantisedReport`.

    Raises:
        ConfigError: If the way does not fit a layer, torchao is missing, or the training text is too short.
        NonFiniteError: If a weight or an input is not finite.
    """
    layers = layers_of(model)
    if not how.needs_calibration:  # a matter of seconds
        return quantise(model, layers, how, None, progress).layers
    tokens = calibration_text(config, how, tokenizer)
    folder = cache_folder() / "quantised" / _key(model, layers, how, tokens)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):  # side by side, the second run waits for the first one's
        if not (folder / RECORD).is_file():
            report = quantise(model, layers, how, segments(tokens, how), progress)
            _keep(folder, model, layers, report.layers, how)
            return report.layers
    _put(model, read_tensors(folder / WEIGHTS, f"Delete {folder} and run the same command again."))
    progress(len(layers))
    return pd.read_csv(folder / REPORT)


def calibration_text(config: RunConfig, how: QuantiseConfig, tokenizer: Any) -> Tensor:
    """Token ids of training examples one after another, enough of them for the sequences that are drawn."""
    most = 4 * how.items * how.length // 64  # examples are longer than 16 tokens
    wanted = Wanted("train", most, protocol=config.protocol, data_root=config.data_root)
    encoded = encode(TASKS[config.train_on].examples(wanted), tokenizer)
    parts = [torch.from_numpy(part) for example in encoded for part in (example["prompt_ids"], example["answer_ids"])]
    return torch.cat(parts).long()


def _key(model: Any, layers: list[str], how: QuantiseConfig, tokens: Tensor) -> str:
    """A name for what the result depends on."""
    whole = hashlib.sha256(f"{__version__}\n{how.model_dump_json()}\n{layers}\n".encode())
    whole.update(tokens.numpy().tobytes())
    for name, parameter in model.named_parameters():
        whole.update(f"{name} {parameter.dtype}".encode())
        whole.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()[:24]


def _keep(folder: Path, model: Any, layers: list[str], report: pd.DataFrame, how: QuantiseConfig) -> None:
    with atomic_folder(folder) as aside:
        weights = {name: model.get_submodule(name).weight.detach().cpu().contiguous() for name in layers}
        write_tensors(aside / WEIGHTS, weights)
        report.to_csv(aside / REPORT, index=False)
        write_json(aside / RECORD, {"package_version": __version__, "quantise": how.model_dump(mode="json")})


def _put(model: Any, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        layer.weight.requires_grad_(False).copy_(weight)
