"""Choosing each method's learning rate: the same grid for all, on validation problems that no test score uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory.errors import ConfigError, NonFiniteError
from diablo_theory.files import experiments_folder, read_json, write_with
from diablo_theory.finetune import runs
from diablo_theory.finetune.config import overridden, read_run_file
from diablo_theory.finetune.tasks import TASKS
from diablo_theory.methods import Method
from diablo_theory.progress import Board
from diablo_theory.records import FAILED, PREDICTIONS, read_csv, read_predictions
from diablo_theory.reporting.intervals import score

#: A factor of about three between neighbours, wide enough that no method's best is at an edge.
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def tunable() -> list[str]:
    """Tasks that have run files, a method each."""
    return sorted(name for name in TASKS if any((experiments_folder() / name).glob("*.yaml")))


def tune(
    task: str, methods: Sequence[Method], grid: Sequence[float], overrides: dict[str, Any], out: Path, board: Board
) -> pd.DataFrame:
    """Train every method at every rate and mark the one with the lowest validation loss.

    Finished runs in ``out/tuning`` are not done again. A rate at which training diverges gets an infinite loss.

    Args:
        task: One of :func:`tunable`.
        methods: Methods to tune, all over the same grid.
        grid: Learning rates.
        overrides: Keys of a run, the same for all.
        out: Results folder; gets ``tuning/`` and ``learning_rates.csv``.
        board: Shows progress.

    Returns:
        A row a run: task, method, label, learning_rate, seed, steps, n, valid_loss (nats per answer token) with its
        95% interval, exact (share of validation problems), chosen.

    Raises:
        ConfigError: If the task has no run files, or an override is one of the keys that the search sets.
        NonFiniteError: If a method diverges at every rate, or a model cannot be made ready for it.
    """
    if task not in tunable():
        raise ConfigError(
            f"no run files for task {task!r} in experiments/{task}; there are for {', '.join(tunable())}"
        )
    if owned := [
        key
        for key in overrides
        if key in ("train_on", "evaluate_on", "method", "learning_rate", "eval_split", "scale")
    ]:
        raise ConfigError(f"{owned[0]} cannot be set here: the search decides it")
    rows = [
        _row(task, method, rate, overrides, out / "tuning" / f"{task}-{method}-{rate:g}", board)
        for method in methods
        for rate in sorted(grid)
    ]
    table = pd.DataFrame(rows)
    best = table.loc[table.groupby("method")["valid_loss"].idxmin()]
    hopeless = best.loc[best["valid_loss"] == float("inf"), "label"]
    if len(hopeless):
        raise NonFiniteError(f"{hopeless.iloc[0]} on {task} diverges at every learning rate of the grid")
    table["chosen"] = table.index.isin(best.index)
    file = out / "learning_rates.csv"
    if file.is_file():  # other tasks and methods keep their rows
        before = read_csv(file)
        redone = (before["task"] == task) & before["method"].isin(methods)
        table = pd.concat([before[~redone], table], ignore_index=True)
    write_with(file, lambda path: table.to_csv(path, index=False))
    return table


def _row(
    task: str, method: Method, rate: float, overrides: dict[str, Any], folder: Path, board: Board
) -> dict[str, Any]:
    differences = read_run_file(experiments_folder() / task / f"{method}.yaml")
    fixed = {"learning_rate": rate, "eval_split": "validation", "keep_weights": False}
    config = overridden([differences, fixed], overrides)
    row = {"task": task, "method": method, "learning_rate": rate, "seed": config.seed, "steps": config.steps}
    with board.stage(f"{task}, {method}, learning rate {rate:g}"):
        try:
            metrics = runs.execute(config, folder, board)
        except NonFiniteError:
            if not (folder / FAILED).is_file():  # it never trained: no rate would do better
                raise
            label = read_json(folder / FAILED)["label"]
            infinite = dict.fromkeys(("valid_loss", "loss_low", "loss_high"), float("inf"))
            return row | {"label": label, "n": 0, "exact": 0.0} | infinite
    items = read_predictions(folder / PREDICTIONS / f"{task}.csv").assign(seed=config.seed)
    loss = score(items, "loss_per_token")
    return row | {
        "label": metrics["label"],
        "n": len(items),
        "valid_loss": loss.value,
        "loss_low": loss.low,
        "loss_high": loss.high,
        "exact": metrics["scores"][task]["exact"],
    }
