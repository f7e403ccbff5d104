"""Scores of a run: predictions by task, written as they are made, and their means."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from diablo_theory.errors import NonFiniteError, ResultsError
from diablo_theory.files import write_with
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.evaluate import evaluate
from diablo_theory.finetune.setup import Board, Problems, Setup
from diablo_theory.finetune.tasks import TASKS, Example
from diablo_theory.records import PREDICTIONS, TEXT, read_predictions


def score_tasks(
    config: RunConfig, folder: Path, board: Board, setup: Setup, problems: Problems
) -> dict[str, dict[str, Any]]:
    """The scores of a run on each of its tasks; what is scored already is read.

    Raises:
        NonFiniteError: If a loss is not finite.
        ResultsError: If predictions are damaged.
    """
    scores = {}
    for name, examples in problems.score.items():
        file = folder / PREDICTIONS / f"{name}.csv"
        with board.piece(f"score {setup.prepared.label} on {name}", len(examples)) as advance:
            if file.is_file():
                items = read_predictions(file)
                advance(len(examples))
            else:
                items = _predictions(config, name, examples, setup, advance)
                _require_finite(items, f"{config.eval_split} problem", name)
                if PartialState().is_main_process:
                    _write_predictions(file, items)
        if len(items) != len(examples):
            raise ResultsError(f"{file} holds {len(items)} of {len(examples)} problems: delete it and run again")
        scores[name] = summary(items, name)
    return scores


def _write_predictions(file: Path, items: pd.DataFrame) -> None:
    # All text quoted: a model may write a bare carriage return, which would otherwise end the row for a reader.
    write_with(file, lambda path: items.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC))


def _predictions(
    config: RunConfig,
    name: str,
    examples: Sequence[Example],
    setup: Setup,
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """One row a problem; of several processes each answers its share."""
    rank, processes = PartialState().process_index, PartialState().num_processes
    casts = config.dtype != config.adapter_dtype
    with torch.autocast(setup.loaded.model.device.type, getattr(torch, config.dtype)) if casts else nullcontext():
        items = evaluate(
            setup.prepared.model,
            setup.loaded.tokenizer,
            TASKS[name],
            examples[rank::processes],
            config.eval_batch_size,
            advance,
            protocol=config.protocol,
            seed=config.seed,
        )
    if processes == 1:
        return items
    rows = gather_object([row | {"item": row["item"] * processes + rank} for row in items.to_dict("records")])
    return pd.DataFrame(rows).sort_values("item", ignore_index=True)


def _require_finite(items: pd.DataFrame, what: str, task: str) -> None:
    if not (finite := items["loss_sum"].map(math.isfinite)).all():
        item = int(items.loc[~finite, "item"].iloc[0])
        raise NonFiniteError(f"the loss of {what} {item} ({task}) is not finite: the model holds NaN?")


def summary(items: pd.DataFrame, task: str) -> dict[str, Any]:
    """Count, mean of each metric (0 to 1) and loss in nats per answer token."""
    measured = [name for name in items.columns if name not in {"item", "loss_sum", "tokens", *TEXT}]
    return {
        "n": len(items),
        **{name: float(items[name].mean()) for name in measured},
        "loss_per_token": float(items["loss_sum"].sum() / items["tokens"].sum()),
        "means": dict(TASKS[task].metrics),
    }
