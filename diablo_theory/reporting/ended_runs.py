"""What a run folder says of its run, checked before a number is made of it: configuration, metrics, every outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from diablo_theory.errors import ResultsError
from diablo_theory.records import (
    CONFIG,
    ERROR,
    FAILED,
    LOG,
    LOGGED,
    METRICS,
    TEXT,
    Count,
    Metrics,
    Real,
    read_checked,
    read_log,
    read_predictions,
)
from diablo_theory.reporting.names import METHODS, one_of

#: What both files of a finished run say: one that says otherwise has been changed.
_IN_BOTH = ("suite", "method", "model", "seed")
_ADVICE = "Put it back as it was, or move this run out of the folder and do it again."


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Quantise(_Part):
    """How a base is quantised."""

    method: str
    bits: Count


class _Config(_Part):
    """The keys that tables and figures are made from; others differ between versions and are kept as they are."""

    suite: str
    model: str
    method: Annotated[str, one_of("method", METHODS)]
    protocol: str
    dtype: str
    quantise: Quantise | None
    num_blocks: Count
    learning_rate: Real = Field(gt=0)
    evaluate_on: list[str] = Field(min_length=1)
    eval_split: Literal["test", "validation"]
    scale: Literal["small", "full"]
    seed: Count


class _Named(_Part):
    label: str
    model_sha256: str | None
    trainable_params: Count
    trainable_pct: Real = Field(ge=0, le=100)


class _Provenance(_Part):
    """Where a run was done, as :func:`diablo_theory.provenance.provenance` says it; older ones have no date."""

    cpu: str
    device: str
    torch: str
    transformers: str
    peft: str
    commit: str | None
    dirty: bool | None
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None


class _Metrics(Metrics):
    suite: str
    model: str
    method: str
    seed: Count
    model_sha256: str | None
    provenance: _Provenance


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
    config = read_checked(folder / CONFIG, _Config, _ADVICE)
    metrics = read_checked(folder / name, _Metrics if finished else _Named, _ADVICE)
    if finished:
        _require_agreement(folder, config, metrics)
    return Record(config, metrics, finished)


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


def read_outcomes(file: Path, scores: dict[str, Any], advice: str | None = None) -> pd.DataFrame:
    """Every problem's outcome on one task, as :func:`~diablo_theory.records.read_predictions` returns them.

    Args:
        file: The predictions.
        scores: What metrics.json says of the task: n, the mean of each metric, loss_per_token.
        advice: What to do if the file is damaged; left out, :func:`rescored`.

    Raises:
        ResultsError: If the file is missing or damaged, or does not give these scores.
    """
    advice = advice or rescored(file.parents[1])
    items = read_predictions(file, advice)
    metrics = sorted(scores.keys() - {"n", "means", "loss_per_token"})
    if missing := [name for name in metrics if name not in items]:
        raise ResultsError(f"{file} lacks the column(s) {', '.join(missing)}. {advice}")
    if len(items) != scores["n"]:
        raise ResultsError(f"{file} holds {len(items)} problems where {METRICS} says {scores['n']}. {advice}")
    _require_scores(file, items, scores, metrics, advice)
    return items[[name for name in items if name in ("item", *TEXT, "loss_sum", "tokens", *metrics)]]


def rescored(run: Path) -> str:
    """What to do where predictions of a finished run are missing or damaged."""
    return (
        f"Put it back as it was; or move it away, and `diablo-theory evaluate {run}` writes it again if the run has "
        "kept its weights."
    )


def read_training(folder: Path, steps: int | None) -> pd.DataFrame:
    """The course of a run's training without its times and memory; empty of a run that trained nothing.

    Args:
        folder: The run.
        steps: Those that metrics.json says were done; None for a diverged run, which may have logged any number.

    Raises:
        ResultsError: If log.csv is missing or damaged, or does not hold these steps.
    """
    if not (folder / LOG).is_file() and not steps:
        return pd.DataFrame(columns=["step"])
    log = read_log(folder / LOG, steps, _ADVICE)
    return log[[name for name in map(str, log) if name in LOGGED[:-1] or name.startswith("grad_norm/")]]


def _require_scores(file: Path, items: pd.DataFrame, scores: dict[str, Any], metrics: list[str], advice: str) -> None:
    """Refuse outcomes that are not those that were scored when the run finished."""
    found = {name: float(items[name].mean()) for name in metrics}
    found["loss_per_token"] = float(items["loss_sum"].sum() / items["tokens"].sum())
    for name, value in found.items():
        if not math.isclose(value, scores[name], rel_tol=1e-9, abs_tol=1e-12):
            raise ResultsError(f"{file} gives {name}={value:.6g} where {METRICS} says {scores[name]:.6g}. {advice}")
