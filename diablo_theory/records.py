"""What a run leaves behind, and how it is read back: by the run that goes on, and by the tables made of it.

Files may have been cut short, edited, or written by another version, so nothing is taken over unchecked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diablo_theory.errors import ResultsError, brief, refusal
from diablo_theory.files import AGAIN, read_json

CONFIG, METRICS, FAILED, ERROR = "config.json", "metrics.json", "failed.json", "error.txt"
LOG, PREDICTIONS = "log.csv", "predictions"
#: Columns of predictions that hold text, which pandas must not take for numbers or missing values.
TEXT = ("cluster", "prompt", "answer", "gold", "completion")
#: Columns of a log, beside ``grad_norm/PART`` for each part of what trains.
LOGGED = ("step", "loss", "learning_rate", "grad_norm", "seconds")
_MOST = sys.float_info.max

Count = Annotated[int, Field(strict=True, ge=0)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Score(BaseModel):
    """The scores on one task; all that is not named here is a metric, from 0 to 1."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Real] = Field(init=False)

    n: Annotated[Count, Field(ge=1)]
    loss_per_token: Real
    means: dict[str, str] = {}


class Metrics(BaseModel):
    """What is read of metrics.json; there may be more."""

    label: str
    trainable_params: Count
    trainable_pct: Annotated[Real, Field(ge=0, le=100)]
    steps: Count
    train_seconds: Annotated[Real, Field(ge=0)] | None
    scores: dict[str, Score]
    data: dict[str, Any] = {}
    conditions: dict[str, Any] = {}


def read_checked(path: Path, kind: type[BaseModel], advice: str = AGAIN) -> dict[str, Any]:
    """A JSON file that holds what a model says, whole.

    Args:
        path: The file.
        kind: What must be in it.
        advice: What to do if it is not.

    Raises:
        ResultsError: If it is damaged, or lacks or has something that the model does not allow.
    """
    found = read_json(path, advice)
    try:
        kind.model_validate(found)
    except ValidationError as error:
        raise ResultsError(f"{path} was edited, or is of another version: {refusal(error, kind)}. {advice}") from None
    return found


def read_csv(file: Path, advice: str = AGAIN, **options: Any) -> pd.DataFrame:
    """A CSV file.

    Args:
        file: The file.
        advice: What to do if it is damaged.
        options: Those of :func:`pandas.read_csv`.

    Raises:
        ResultsError: If pandas cannot read it; what that says is told in one line.
    """
    try:
        frame: pd.DataFrame = pd.read_csv(file, **options)
    except (ValueError, OSError) as error:  # pandas' own parser errors are ValueErrors
        raise ResultsError(f"{file} cannot be read ({brief(error)}). {advice}") from error
    return frame


def read_predictions(file: Path, advice: str = AGAIN) -> pd.DataFrame:
    """What a run has answered on one task.

    Args:
        file: A CSV file of the folder ``predictions``.
        advice: What to do if it is damaged.

    Returns:
        A row a problem: item, cluster, prompt, answer, gold, completion, metrics (0 to 1), loss_sum (nats), tokens.

    Raises:
        ResultsError: If the file cannot be read, lacks a column, holds a problem twice, or a number that cannot be.
    """
    items = read_csv(file, advice, keep_default_na=False, dtype=dict.fromkeys(TEXT, str))
    numbers = ("item", "loss_sum", "tokens")
    if missing := [name for name in (*numbers, *TEXT) if name not in items]:
        raise ResultsError(f"{file} lacks the column(s) {', '.join(missing)}. {advice}")
    ranges = {name: (0.0, 1.0, "a number from 0 to 1") for name in items if name not in (*numbers, *TEXT)}
    ranges |= {"loss_sum": (0.0, _MOST, "a number of nats, 0 or more"), "tokens": (1.0, _MOST, "a number, 1 or more")}
    ranges |= {"item": (0.0, _MOST, "a number, 0 or more")}
    for name, (low, high, allowed) in ranges.items():
        values = pd.to_numeric(items[name], errors="coerce")
        if (bad := ~values.between(low, high)).any():  # NaN lies between nothing
            row = int(bad.to_numpy().argmax())
            raise ResultsError(
                f"{file}: {name} of problem {items['item'][row]} (row {row + 1}) is {items[name].tolist()[row]!r}; "
                f"allowed: {allowed}. {advice}"
            )
        items[name] = values
    if (twice := items["item"].duplicated()).any():
        raise ResultsError(f"{file} holds problem {items.loc[twice, 'item'].iloc[0]} twice. {advice}")
    return items


def read_log(file: Path, steps: int | None, advice: str = AGAIN) -> pd.DataFrame:
    """The course of a training.

    Args:
        file: log.csv of a run.
        steps: Those that it has to hold; None for a training that diverged, of which any number may be there.
        advice: What to do if it is damaged.

    Returns:
        A row a step: ``LOGGED``, and grad_norm/PART of each part of what trains.

    Raises:
        ResultsError: If it cannot be read, lacks a column or a number, or holds other steps.
    """
    log = read_csv(file, advice)
    # A step that a loss scaler skipped has no norm.
    lost = [name for name in LOGGED if name not in log or not is_numeric_dtype(log[name])]
    lost += [name for name in ("step", "loss", "seconds") if name not in lost and log[name].isna().any()]
    if lost:
        raise ResultsError(f"{file} has no whole column {lost[0]}. {advice}")
    count = len(log) if steps is None else steps
    if len(log) != count or log["step"].tolist() != list(range(1, count + 1)):
        raise ResultsError(f"{file} does not hold the steps 1 to {count}. {advice}")
    return log
