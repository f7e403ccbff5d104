"""Scores of runs as commands print them, with the intervals that `collect` gives, from the saved predictions."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diablo_theory.cli.common import working
from diablo_theory.errors import ResultsError
from diablo_theory.files import cache_folder, read_json, write_json
from diablo_theory.records import PREDICTIONS
from diablo_theory.reporting import intervals
from diablo_theory.reporting.ended_runs import read_outcomes, rescored
from diablo_theory.reporting.intervals import METRICS, METRICS_OF_SOME, Estimate
from diablo_theory.reporting.suites import metrics_of
from diablo_theory.reporting.tables import interval


def score_lines(runs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """Every finished run's scores in words.

    Args:
        runs: Folder to metrics and split of its run, as :func:`diablo_theory.finetune.folder.state` gives them.

    Returns:
        For each, ``word_problems (n=300): exact 53.0% (40.6 to 64.7), ..., 0.3962 nats/token (0.3134 to 0.4940)``,
        tasks one after another, with the split unless it is the test's. Where predictions are gone or damaged, it
        says so in place of intervals.
    """
    pairs = [(task, folder) for folder, found in runs.items() for task in found["metrics"]["scores"]]
    told = {}
    with working("score"):
        # A task's runs one after another: what takes longest is drawing resamples, and those are shared.
        for task, folder in sorted(pairs):
            told[folder, task] = _line(folder, task, runs[folder])
    return {
        folder: "; ".join(told[folder, task] for task in found["metrics"]["scores"]) for folder, found in runs.items()
    }


def _line(folder: Path, task: str, found: Mapping[str, Any]) -> str:
    scores, split = found["metrics"]["scores"][task], found["split"]
    estimates: dict[str, Estimate] = {}
    note = ""
    try:
        estimates = score_intervals(folder / PREDICTIONS / f"{task}.csv", scores)
    except ResultsError as error:
        note = f" [no intervals: {error}]"
    where = "" if split in ("", "test") else f", {split}"
    shares = [name for name in scores if name not in ("n", "means", "loss_per_token")]
    parts = [f"{name} {_with_ends(100 * scores[name], estimates.get(name), 1, '%')}" for name in shares]
    parts.append(_with_ends(scores["loss_per_token"], estimates.get("loss_per_token"), 4, " nats/token"))
    return f"{task} (n={scores['n']}{where}): {', '.join(parts)}{note}"


def _with_ends(value: float, estimate: Estimate | None, digits: int, unit: str) -> str:
    if estimate is None:
        return interval(value, None, None, digits, unit=unit)
    return interval(estimate.value, estimate.low, estimate.high, digits, unit=unit)


def score_intervals(file: Path, scores: dict[str, Any]) -> dict[str, Estimate]:
    """Scores of one run on one task, with the intervals that a collection has of them.

    Kept in the cache folder by contents: resampling the largest test sets takes seconds, and who looks at a run
    writes nothing into its folder.

    Args:
        file: The predictions.
        scores: What metrics.json says of the task.

    Returns:
        Name in ``scores`` to its estimate, in per cent or nats per token; without those that the schema does not know.

    Raises:
        ResultsError: If the predictions are gone, damaged, or do not give these scores.
    """
    kept = cache_folder() / "intervals" / f"{_key(file, scores)}.json"
    if kept.is_file():
        with suppress(ResultsError, TypeError):
            return {name: Estimate(**found) for name, found in read_json(kept).items()}
    items = read_outcomes(file, scores).assign(seed=0)
    columns = {name: column for name, (column, bottom, _) in (METRICS | METRICS_OF_SOME).items() if bottom is None}
    found = {columns.get(metric, metric): intervals.score(items, metric) for metric in metrics_of(items)}
    with suppress(OSError):  # a cache that cannot be written is none
        write_json(kept, {name: asdict(estimate) for name, estimate in found.items()})
    return found


def _key(file: Path, scores: dict[str, Any]) -> str:
    """A name for all that intervals depend on."""
    try:
        whole = hashlib.sha256(file.read_bytes())
    except OSError as error:
        raise ResultsError(f"{file} cannot be read ({error.strerror}). {rescored(file.parents[1])}") from error
    made_by = [inspect.getsource(intervals), version("numpy"), version("scipy")]
    whole.update(json.dumps([scores, made_by]).encode())
    return whole.hexdigest()[:24]
