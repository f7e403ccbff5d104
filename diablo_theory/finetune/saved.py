"""Records of a run, read back and held to what their readers need: they may be damaged, edited, or newer than this."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diablo_theory.errors import ConfigError, ResultsError
from diablo_theory.files import read_json
from diablo_theory.finetune.config import RunConfig, validated
from diablo_theory.finetune.reading import refusal

Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]

#: For a file that says what a run is: without it nobody knows.
PUT_BACK = "Put back what was there, or choose another folder."


class _Score(BaseModel):
    """The scores on one task; all that is not named here is a metric."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Real] = Field(init=False)

    n: Count
    loss_per_token: Real
    means: dict[str, str] = {}


class _Metrics(BaseModel):
    """What is read of metrics.json; there may be more."""

    label: str
    trainable_params: Count
    trainable_pct: Real
    steps: Count
    train_seconds: Real | None
    scores: dict[str, _Score]
    data: dict[str, Any] = {}
    conditions: dict[str, Any] = {}


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics of a finished run, whole.

    Raises:
        ResultsError: If they are damaged, or lack what is read of them.
    """
    found = read_json(path)
    try:
        _Metrics.model_validate(found)
    except ValidationError as error:
        raise ResultsError(f"{path} was edited, or is of another version: {refusal(error)}") from None
    return found


def read_config(path: Path) -> RunConfig:
    """The configuration that a run was begun with.

    Raises:
        ResultsError: If it is damaged, or not one of this version.
    """
    found = read_json(path, PUT_BACK)
    try:
        return validated(found)
    except ConfigError as error:
        raise ResultsError(f"{path} was edited, or is of another version: {error}") from None


def read_failure(path: Path) -> str:
    """Why training has diverged.

    Raises:
        ResultsError: If the file is damaged.
    """
    return str(read_json(path).get("error", f"{path} does not say why"))


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The environments of a run's attempts so far.

    Raises:
        ResultsError: If they are damaged, or lack what is read of them.
    """
    attempts: list[dict[str, Any]] = read_json(path).get("attempts", [])
    whole = isinstance(attempts, list) and all(isinstance(each, dict) for each in attempts)
    if not whole or any(name not in each for each in attempts for name in ("commit", "dirty")):
        raise ResultsError(
            f"{path}: attempts must each have commit and dirty. Delete it and run the same command again."
        )
    return attempts


def read_log(path: Path, steps: int) -> pd.DataFrame:
    """The log of a training that has ended.

    Args:
        path: The file.
        steps: Rows that it has to have.

    Raises:
        ResultsError: If it is damaged.
    """
    advice = "delete it and run again, and training goes on from its last checkpoint"
    try:
        log: pd.DataFrame = pd.read_csv(path)
    except ValueError as error:
        raise ResultsError(f"{path} cannot be read ({error}): {advice}") from error
    lost = [name for name in ("step", "loss", "seconds") if name not in log or not _are_numbers(log[name])]
    if lost or len(log) != steps:
        without = f" without {lost[0]}" if lost else ""
        raise ResultsError(f"{path} holds {len(log)} of {steps} steps{without}: {advice}")
    return log


def _are_numbers(column: pd.Series) -> bool:
    return bool(is_numeric_dtype(column) and column.notna().all())
