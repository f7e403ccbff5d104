"""A run folder: configuration first, metrics last, and whatever was finished in between is not done again."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import transformers
from safetensors.torch import load_file

from diablo_theory import methods
from diablo_theory.errors import ConfigError, NonFiniteError, ResultsError
from diablo_theory.files import locked, read_json, remove_partial, write_json, write_with
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.data import encode
from diablo_theory.finetune.evaluate import evaluate
from diablo_theory.finetune.models import LoadedModel, load_model, loading
from diablo_theory.finetune.tasks import TASKS
from diablo_theory.finetune.train import WEIGHTS, save_trainable, train
from diablo_theory.provenance import provenance


class Board(Protocol):
    """Where progress is shown."""

    def piece(self, text: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show one piece of work of ``total`` units; yields what to call with each number of finished units."""


def finished(folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run, or None; they are written last."""
    path = folder / "metrics.json"
    return read_json(path) if path.is_file() else None


def check_owner(folder: Path, config: RunConfig) -> None:
    """Raise ResultsError if a folder belongs to a run with another configuration."""
    path = folder / "config.json"
    if not path.is_file():
        if finished(folder):
            raise ResultsError(f"{folder} holds a finished run, but no config.json says which: choose another folder")
        return
    wanted, there = config.model_dump(mode="json"), read_json(path)
    if different := sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key)):
        key = different[0]
        raise ResultsError(
            f"{folder} belongs to a run with {key}={there.get(key)!r}, not {wanted.get(key)!r}: "
            "choose another folder, or move that one away"
        )


def execute(
    config: RunConfig, folder: Path, board: Board, load: Callable[[str, str], LoadedModel] = load_model
) -> dict[str, Any]:
    """Do a run, or what is left of it.

    Args:
        config: The run.
        folder: Its folder; made if need be. Holds config.json, log.csv, trainable.safetensors, items.csv and, when all
            is done, metrics.json.
        board: Shows progress.
        load: Gives the model; called only if there is something left to do.

    Returns:
        The metrics: run_id, task, method, label, model and its source, seed, counts, scores, provenance.

    Raises:
        ResultsError: If the folder belongs to another run, or another process is at work in it.
        ConfigError: If the method does not fit the model (num_blocks, target_modules).
        NonFiniteError: If training diverges, or did so in an earlier attempt.
        ModelUnavailableError: If the model is not to be had.
    """
    with locked(folder):
        check_owner(folder, config)
        remove_partial(folder)
        return finished(folder) or _execute(config, folder, board, load)


def _execute(config: RunConfig, folder: Path, board: Board, load: Callable[[str, str], LoadedModel]) -> dict[str, Any]:
    failed = folder / "failed.json"
    if failed.is_file():
        before = read_json(failed)["error"]
        raise NonFiniteError(f"{before} (In an earlier attempt; delete {failed} to go on from the last checkpoint.)")
    with board.piece(loading(config.model), 1) as advance:
        loaded = load(config.model, config.device)
        advance(1)
    try:
        prepared = methods.prepare(
            loaded.model, config.method, config.num_blocks, config.target_modules, seed=config.seed
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    write_json(folder / "config.json", config.model_dump(mode="json"))  # only a run that can start owns the folder
    try:
        log = None if config.method == "none" else _train(config, folder, board, loaded, prepared)
        items = _evaluate(config, folder, board, loaded, prepared)
    except NonFiniteError as error:
        write_json(failed, {"label": prepared.label, "error": str(error)})
        raise
    metrics = _metrics(config, folder, loaded, prepared, log, items)
    # Before the metrics, so that a run that counts as finished has nothing left to clear.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_json(folder / "metrics.json", metrics)
    if not config.keep_weights:
        (folder / WEIGHTS).unlink(missing_ok=True)
    return metrics


def _metrics(
    config: RunConfig,
    folder: Path,
    loaded: LoadedModel,
    prepared: methods.Prepared,
    log: pd.DataFrame | None,
    items: pd.DataFrame,
) -> dict[str, Any]:
    return {
        "run_id": folder.name,
        "task": config.task,
        "method": config.method,
        "label": prepared.label,
        "model": config.model,
        "model_source": loaded.source,
        "model_sha256": loaded.sha256,
        "seed": config.seed,
        "trainable_params": prepared.trainable_params,
        "trainable_pct": 100 * prepared.trainable_params / prepared.total_params,
        "learning_rate": None if log is None else config.learning_rate,
        "steps": 0 if log is None else config.steps,
        "train_seconds": None if log is None else float(log["seconds"].sum()),
        "final_train_loss": None if log is None else float(log["loss"].iloc[-1]),
        "n_test": len(items),
        "exact": float(items["exact"].mean()),
        "exact_means": TASKS[config.task].exact_means,
        "loss_per_token": float(items["loss_sum"].sum() / items["tokens"].sum()),
        "provenance": provenance(loaded.model.device),
    }


def _train(
    config: RunConfig, folder: Path, board: Board, loaded: LoadedModel, prepared: methods.Prepared
) -> pd.DataFrame:
    log_file, weights = folder / "log.csv", folder / WEIGHTS
    with board.piece(f"train {prepared.label}", config.steps) as advance:
        if log_file.is_file() and weights.is_file():  # training had ended before the interruption
            methods.load_trainable_state(prepared.model, load_file(weights))
            advance(config.steps)
            return pd.read_csv(log_file)
        # Also the seed of anything random that a model does while it trains.
        transformers.set_seed(config.seed)
        examples = TASKS[config.task].examples("train", config.steps * config.batch_size, config.seed)
        data = encode(examples, loaded.tokenizer)
        log = train(prepared.model, data, config, folder, loaded.tokenizer.pad_token_id, advance)
        save_trainable(prepared.model, weights)
        write_with(log_file, lambda path: log.to_csv(path, index=False))
        return log


def _evaluate(
    config: RunConfig, folder: Path, board: Board, loaded: LoadedModel, prepared: methods.Prepared
) -> pd.DataFrame:
    task = TASKS[config.task]
    examples = task.examples(config.eval_split, config.eval_items, config.seed)
    with board.piece(f"evaluate {prepared.label}", len(examples)) as advance:
        items = evaluate(prepared.model, loaded.tokenizer, task, examples, config.eval_batch_size, advance)
    if not (finite := items["loss_sum"].map(math.isfinite)).all():
        item = int(items.loc[~finite, "item"].iloc[0])
        raise NonFiniteError(f"the loss of {config.eval_split} problem {item} is not finite: the model holds NaN?")
    # All text quoted: a model may write a bare carriage return, which would otherwise end the row for a reader.
    write_with(folder / "items.csv", lambda path: items.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC))
    return items
