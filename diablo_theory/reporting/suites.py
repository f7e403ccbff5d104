"""What sweeps have given: finished runs as tidy rows, the outcome of every problem, and the course of training.

Run folders are large and hold texts that have licences of their own; what is kept of them here is small and free of
both: configurations, scores with intervals, for each problem whether it was solved and at which loss, and for each
training step its loss and gradient norms.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory.errors import ResultsError
from diablo_theory.files import write_with
from diablo_theory.reporting.ended_runs import ended, read_outcomes, read_record, read_training
from diablo_theory.reporting.intervals import METRICS, METRICS_OF_SOME, score
from diablo_theory.reporting.results import COLUMNS, SCHEMA_VERSION, validate_rows

#: Files of a collection.
ROWS, CONFIGS, OUTCOMES, TRAINING = "rows.csv", "configs.csv", "outcomes.csv.gz", "training.csv.gz"


@dataclass(frozen=True)
class Suites:
    """Runs that were collected.

    Attributes:
        rows: In the tidy schema: a row a run, task and metric, with its interval.
        configs: A row a run: its resolved configuration, how it ended (``state``: finished or diverged), what it was
            made from and where it was done.
        outcomes: A row a run, task and problem: metrics, loss_sum, tokens; prompts and answers as short digests.
        training: A row a run and training step: loss, learning_rate, grad_norm, and grad_norm/PART of each part.
    """

    rows: pd.DataFrame
    configs: pd.DataFrame
    outcomes: pd.DataFrame
    training: pd.DataFrame


def collect_suites(root: Path) -> Suites:
    """All runs below a folder that have ended: finished ones, and diverged ones, which have no scores.

    Raises:
        ResultsError: If there is none, a file of one is missing or damaged, or its files disagree.
    """
    if not root.is_dir():
        raise ResultsError(f"{root} is no folder")
    folders = ended(root)
    if not folders:
        raise ResultsError(f"{root} holds no finished runs; `diablo-theory sweep` makes some")
    configs, outcomes, rows, training = [], [], [], []
    for folder in folders:
        run_id = folder.relative_to(root).as_posix()
        record = read_record(folder)
        # Where the data lay says nothing about a run: what they were is in their digests.
        config, metrics = record.config | {"data_root": None}, record.metrics
        about = {"run_id": run_id} | _flat(config) | {"label": metrics["label"]}
        configs.append(about | {"state": "finished" if record.finished else "diverged"} | _flat(_measured(metrics)))
        training.append(read_training(folder, metrics.get("steps") if record.finished else None).assign(run_id=run_id))
        for task in metrics.get("scores", {}):
            items = _outcomes(folder / "predictions" / f"{task}.csv", metrics["scores"][task])
            named = {"run_id": run_id, "task": task, "seed": config["seed"], "label": metrics["label"]}
            outcomes.append(items.assign(**named))
            rows += list(_rows(run_id, task, config, metrics, outcomes[-1]))
    if not outcomes:
        raise ResultsError(f"all {len(folders)} runs below {root} diverged: there is no score to collect")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    outcomes_of_all, steps = (pd.concat(frames, ignore_index=True) for frames in (outcomes, training))
    return Suites(validate_rows(frame), pd.DataFrame(configs), outcomes_of_all, steps)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in values.items()}


def _measured(metrics: dict[str, Any]) -> dict[str, Any]:
    """What is worth a column beside the configuration; a diverged run has little of it."""
    names = ["model_source", "model_sha256", "trainable_params", "trainable_pct", "train_examples", "train_seconds"]
    names += ["peak_memory_mib", "conditions"]
    data = metrics.get("data", {})
    inputs = {"train_data": data.get("train"), "data": data, "steps_done": metrics.get("steps")}
    where = ["date", "package_version", "commit", "dirty", "processes", "cpu", "device"]
    where += ["torch", "peft", "transformers"]
    made = metrics.get("provenance", {})
    return {name: metrics.get(name) for name in names} | inputs | {name: made.get(name) for name in where}


def _outcomes(file: Path, scores: dict[str, Any]) -> pd.DataFrame:
    items = read_outcomes(file, scores)
    for name in ("cluster", "prompt", "answer"):
        items[name] = items[name].map(lambda text: hashlib.sha256(text.encode()).hexdigest()[:12])
    return items.drop(columns=["gold", "completion"])


def _rows(
    run_id: str, task: str, config: dict[str, Any], metrics: dict[str, Any], items: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    same = {
        "source": "reproduced",
        "suite": config["suite"],
        "table": task,
        "model": config["model"],
        "method": config["method"],
        "setting": _setting(config, metrics),
        "trainable_params": metrics["trainable_params"],
        "trainable_pct": metrics["trainable_pct"],
        "seed": config["seed"],
        "run_id": run_id,
        "scale": config["scale"],
        "note": f"{config['protocol']} protocol",
        "schema_version": SCHEMA_VERSION,
    }
    for metric in metrics_of(items):
        found = score(items, metric)
        interval = {"value": found.value, "ci_low": found.low, "ci_high": found.high, "stderr": found.stderr}
        yield same | {"metric": metric, "n": found.n} | interval
    if metrics["train_seconds"] is not None:
        yield same | {"metric": "train_seconds", "value": metrics["train_seconds"]}


def metrics_of(items: pd.DataFrame) -> list[str]:
    """The metrics of the tidy schema that these outcomes have, for all their problems."""
    columns = {name: column for name, (column, *_) in (METRICS | METRICS_OF_SOME).items()}
    return [name for name, column in columns.items() if column in items and items[column].notna().all()]


def _setting(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """What a reader needs to tell this run from others of its table."""
    parts = [str(metrics["label"])]
    if metrics["steps"]:
        parts.append(f"learning rate {config['learning_rate']:g}, {metrics['steps']} steps")
    if quantise := config.get("quantise"):
        parts.append(f"{quantise['bits']} bits by {quantise['method']}")
    if config["eval_split"] != "test":
        parts.append(f"{config['eval_split']} problems")
    return ", ".join(parts)


def save_suites(suites: Suites, out: Path) -> list[Path]:
    """Write a collection, each file whole or not at all."""
    frames = {ROWS: suites.rows, CONFIGS: suites.configs, OUTCOMES: suites.outcomes, TRAINING: suites.training}
    files = [out / name for name in frames]
    for file, (name, frame) in zip(files, frames.items(), strict=True):
        # Six digits of a loss or a norm are more than anybody reads off a curve.
        text = frame.to_csv(index=False, float_format="%.6g" if name == TRAINING else None).encode()
        # Neither the time of day nor a name in the compressed file: the same runs give the same bytes.
        content = gzip.compress(text, mtime=0) if file.suffix == ".gz" else text
        write_with(file, partial(_write_bytes, content))
    return files


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def read_suites(folder: Path) -> Suites:
    """A collection that :func:`save_suites` wrote.

    Raises:
        ResultsError: If a file is missing or damaged, they are not of one collection, or a row is of another schema.
    """
    frames = []
    as_text = dict.fromkeys(("run_id", "task", "label", "cluster", "prompt", "answer"), str)  # a digest may be digits
    for name in (ROWS, CONFIGS, OUTCOMES, TRAINING):
        try:
            frames.append(pd.read_csv(folder / name, dtype=as_text))
        except (ValueError, OSError, EOFError) as error:
            raise ResultsError(
                f"{folder / name} cannot be read ({error}); `diablo-theory collect` writes it"
            ) from error
    rows, configs, outcomes, training = frames
    try:
        rows["note"] = rows["note"].fillna("")
        finished = set(configs.loc[configs["state"] == "finished", "run_id"])
        whole = finished == set(outcomes["run_id"]) == set(rows["run_id"])
        whole = whole and set(training["run_id"]) <= set(configs["run_id"])
    except KeyError as error:
        raise ResultsError(f"a file in {folder} lacks the column {error}; `diablo-theory collect` writes it") from None
    if not whole:
        raise ResultsError(
            f"{ROWS}, {CONFIGS}, {OUTCOMES} and {TRAINING} in {folder} are not of the same runs: collect again"
        )
    return Suites(validate_rows(rows), configs, outcomes, training)
