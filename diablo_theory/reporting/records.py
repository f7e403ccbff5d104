"""What a run folder says of its run, checked before a number is made of it: configuration, metrics, every outcome."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diablo_theory.errors import ResultsError
from diablo_theory.files import read_json
from diablo_theory.reporting.results import ITEM_TEXT

CONFIG, METRICS, FAILED, ERROR = "config.json", "metrics.json", "failed.json", "error.txt"
LOG = "log.csv"
_LOGGED = ["step", "loss", "learning_rate", "grad_norm"]
#: What both files of a finished run say: one that says otherwise has been changed.
_IN_BOTH = ("suite", "method", "model", "seed")
_ADVICE = "Put it back as it was, or move this run out of the folder and do it again."
_MOST = sys.float_info.max

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class _Quantise(_Part):
    method: str
    bits: Count


class _Config(_Part):
    """The keys that tables and figures are made from; others differ between versions and are kept as they are."""

    suite: str
    model: str
    method: str
    protocol: str
    dtype: str
    quantise: _Quantise | None
    num_blocks: Count
    learning_rate: Finite = Field(gt=0)
    evaluate_on: list[str] = Field(min_length=1)
    eval_split: Literal["test", "validation"]
    scale: Literal["small", "full"]
    seed: Count


class _Named(_Part):
    label: str
    model_sha256: str | None
    trainable_params: Count
    trainable_pct: Finite = Field(ge=0, le=100)


class _Score(_Part):
    __pydantic_extra__: dict[str, float]
    n: int = Field(ge=1)
    loss_per_token: float
    means: dict[str, str] = {}


class _Metrics(_Named):
    suite: str
    model: str
    method: str
    seed: Count
    steps: Count
    train_seconds: Finite | None = Field(ge=0)
    scores: dict[str, _Score]
    data: dict[str, str]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A run that has ended.

    Attributes:
        config: What config.json holds.
        metrics: What metrics.json holds; of a diverged run, failed.json.
        finished: Whether it is not a diverged one.
    """

    config: dict[str, Any]
    metrics: dict[str, Any]
    finished: bool


def ended(root: Path) -> list[Path]:
    """Folders of all runs below a folder that have ended: finished ones and diverged ones."""
    return _folders(root, METRICS, FAILED)


def not_ended(root: Path) -> list[Path]:
    """Folders of all runs below a folder that were begun and have neither finished nor diverged."""
    return sorted(set(_folders(root, CONFIG, ERROR)) - set(ended(root)))


def _folders(root: Path, *names: str) -> list[Path]:
    files = [path for name in names for path in root.rglob(name) if path.is_file()]
    return sorted({path.parent for path in files if not path.parent.name.startswith(".")})


def read_record(folder: Path) -> Record:
    """A run that has ended.

    Raises:
        ResultsError: If a file is missing or damaged, a value is none that a run writes, or two files disagree.
    """
    finished = (folder / METRICS).is_file()
    name = METRICS if finished else FAILED
    if not (folder / CONFIG).is_file():
        raise ResultsError(f"{folder} holds {name}, but no {CONFIG} says which run that is. {_ADVICE}")
    config, metrics = (read_json(folder / file, _ADVICE) for file in (CONFIG, name))
    _check(folder / CONFIG, config, _Config)
    _check(folder / name, metrics, _Metrics if finished else _Named)
    if finished:
        _require_agreement(folder, config, metrics)
    return Record(config, metrics, finished)


def _check(path: Path, values: dict[str, Any], kind: type[BaseModel]) -> None:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "missing":
            raise ResultsError(f"{path} lacks {where}. {_ADVICE}") from None
        raise ResultsError(f"{path}: {where}={problem['input']!r} is not allowed: {problem['msg']}") from None


def _require_agreement(folder: Path, config: dict[str, Any], metrics: dict[str, Any]) -> None:
    for key in _IN_BOTH:
        if config[key] != metrics[key]:
            raise ResultsError(
                f"{folder / CONFIG} says {key}={config[key]!r}, {METRICS} beside it {metrics[key]!r}. {_ADVICE}"
            )
    for task in config["evaluate_on"]:
        for part in ("scores", "data"):
            if task not in metrics[part]:
                raise ResultsError(f"{folder / METRICS} has no {part} of {task}, which {CONFIG} lists. {_ADVICE}")


def read_outcomes(file: Path, scores: dict[str, Any]) -> pd.DataFrame:
    """Every problem's outcome on one task, with the texts.

    Args:
        file: The predictions.
        scores: What metrics.json says of the task: n, the mean of each metric, loss_per_token.

    Returns:
        A row a problem: item, cluster, prompt, answer, gold, completion, the metrics (0 to 1), loss_sum, tokens.

    Raises:
        ResultsError: If the file is missing or damaged, or does not give these scores.
    """
    try:
        items: pd.DataFrame = pd.read_csv(file, keep_default_na=False, dtype=dict.fromkeys(ITEM_TEXT, str))
    except (ValueError, OSError) as error:
        raise ResultsError(f"{file} cannot be read ({error}). {_ADVICE}") from error
    metrics = sorted(scores.keys() - {"n", "means", "loss_per_token"})
    needed = ["item", *ITEM_TEXT, "loss_sum", "tokens", *metrics]
    if missing := [name for name in needed if name not in items]:
        raise ResultsError(f"{file} lacks the column(s) {', '.join(missing)}. {_ADVICE}")
    items = items[[name for name in items if name in needed]].copy()
    if len(items) != scores["n"]:
        raise ResultsError(f"{file} holds {len(items)} problems where {METRICS} says {scores['n']}. {_ADVICE}")
    _require_numbers(file, items, metrics)
    _require_scores(file, items, scores, metrics)
    return items


def read_training(folder: Path, steps: int | None) -> pd.DataFrame:
    """The course of a run's training.

    Args:
        folder: The run.
        steps: Those that metrics.json says were done; None for a diverged run, which may have logged any number.

    Returns:
        A row a step: step, loss, learning_rate, grad_norm, grad_norm/PART. None of a run that trained nothing.

    Raises:
        ResultsError: If log.csv is missing or damaged, or does not hold these steps.
    """
    file = folder / LOG
    if not file.is_file() and not steps:
        return pd.DataFrame(columns=_LOGGED)
    try:
        log: pd.DataFrame = pd.read_csv(file)
    except (ValueError, OSError) as error:
        raise ResultsError(f"{file} cannot be read ({error}). {_ADVICE}") from error
    if missing := [name for name in _LOGGED if name not in log]:
        raise ResultsError(f"{file} lacks the column(s) {', '.join(missing)}. {_ADVICE}")
    if steps is not None and log["step"].tolist() != list(range(1, steps + 1)):
        raise ResultsError(f"{file} does not hold the steps 1 to {steps} that {METRICS} says were done. {_ADVICE}")
    return log[[name for name in map(str, log) if name in _LOGGED or name.startswith("grad_norm/")]]


def _require_numbers(file: Path, items: pd.DataFrame, metrics: list[str]) -> None:
    """Turn columns into numbers, each of them where it may be."""
    ranges = dict.fromkeys(metrics, (0.0, 1.0, "a number from 0 to 1"))
    ranges |= {"loss_sum": (0.0, _MOST, "a number of nats, 0 or more"), "tokens": (1.0, _MOST, "a number, 1 or more")}
    ranges |= {"item": (0.0, _MOST, "a number, 0 or more")}
    for name, (low, high, allowed) in ranges.items():
        numbers = pd.to_numeric(items[name], errors="coerce")
        if (bad := ~numbers.between(low, high)).any():  # NaN lies between nothing
            row = int(bad.to_numpy().argmax())
            raise ResultsError(
                f"{file}: {name} of problem {items['item'][row]} (row {row + 1}) is {items[name].tolist()[row]!r}; "
                f"allowed: {allowed}. {_ADVICE}"
            )
        items[name] = numbers
    if (twice := items["item"].duplicated()).any():
        raise ResultsError(f"{file} holds problem {items.loc[twice, 'item'].iloc[0]} twice. {_ADVICE}")


def _require_scores(file: Path, items: pd.DataFrame, scores: dict[str, Any], metrics: list[str]) -> None:
    """Refuse outcomes that are not those that were scored when the run finished."""
    found = {name: float(items[name].mean()) for name in metrics}
    found["loss_per_token"] = float(items["loss_sum"].sum() / items["tokens"].sum())
    for name, value in found.items():
        if not math.isclose(value, scores[name], rel_tol=1e-9, abs_tol=1e-12):
            raise ResultsError(f"{file} gives {name}={value:.6g} where {METRICS} says {scores[name]:.6g}. {_ADVICE}")
