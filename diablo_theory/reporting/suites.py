"""What sweeps have given: finished runs as tidy rows, the outcome of every problem, and the course of training.

Run folders are large and hold texts that have licences of their own; what is kept of them here is small and free of
both: configurations, scores with intervals, for each problem whether it was solved and at which loss, and for each
training step its loss and gradient norms.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from diablo_theory.errors import ResultsError, brief
from diablo_theory.files import atomic_path
from diablo_theory.reporting.ended_runs import Quantise, ended, read_outcomes, read_record, read_training
from diablo_theory.reporting.intervals import METRICS, METRICS_OF_SOME, score
from diablo_theory.reporting.names import METHODS, TASKS
from diablo_theory.reporting.results import COLUMNS, SCALES, SCHEMA_VERSION, validate_rows
from diablo_theory.reporting.saved_tables import Kind, require_kinds, require_once

#: Files of a collection.
ROWS, CONFIGS, OUTCOMES, TRAINING = "rows.csv", "configs.csv", "outcomes.csv.gz", "training.csv.gz"
#: Keys of a configuration that say where a run was done and what it kept of itself, and tell none from another.
HANDLING = ("data_root", "device", "eval_batch_size", "save_every", "keep_weights")
#: Digests and names stay text where they look like numbers.
_AS_TEXT = dict.fromkeys(("run_id", "task", "label", "cluster", "prompt", "answer"), str)


@dataclass(frozen=True)
class Suites:
    """Runs that were collected: the same values and types whether just collected or read back.

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

    def frames(self) -> dict[str, pd.DataFrame]:
        """What each file of the collection holds."""
        return {ROWS: self.rows, CONFIGS: self.configs, OUTCOMES: self.outcomes, TRAINING: self.training}


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
    frames = {
        ROWS: validate_rows(pd.DataFrame(rows, columns=list(COLUMNS))),
        CONFIGS: pd.DataFrame(configs),
        OUTCOMES: pd.concat(outcomes, ignore_index=True),
        TRAINING: pd.concat(training, ignore_index=True),
    }
    return suites_of({name: as_text(name, frame) for name, frame in frames.items()})


def as_text(name: str, frame: pd.DataFrame) -> str:
    """What a file of a collection says.

    Args:
        name: The file, such as :data:`ROWS`.
        frame: What it holds.
    """
    # Six digits of a loss or a norm are more than anybody reads off a curve.
    return str(frame.to_csv(index=False, float_format="%.6g" if name == TRAINING else None))


def suites_of(texts: dict[str, str]) -> Suites:
    """A collection from what its four files say; see :func:`as_text`.

    Raises:
        ResultsError: If a row is not of this schema.
    """
    return _suites({name: _parsed(text) for name, text in texts.items()})


def _parsed(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text), dtype=_AS_TEXT)


#: What tables and claims read of a collection, by file; what a configuration is made of stands before ``label``.
_NEEDED = {
    CONFIGS: (
        *("run_id", "suite", "model", "method", "num_blocks", "learning_rate", "train_on", "evaluate_on", "quantise"),
        *("dtype", "eval_split", "seed", "scale", "label", "state", "model_sha256", "trainable_params"),
        *("batch_size", "steps_done", "peak_memory_mib", "train_seconds", "conditions", "train_data", "data", "date"),
        *("commit", "dirty", "cpu", "device"),
        *("torch", "peft", "transformers"),
    ),
    OUTCOMES: (
        *("run_id", "task", "seed", "label", "item", "cluster", "prompt", "answer"),
        *("tokens", "loss_sum"),
    ),
    TRAINING: ("run_id", "step", "loss", "learning_rate", "grad_norm"),
}


#: What cells of a collection hold, where tables and claims calculate with them.
_KINDS: dict[str, dict[str, Kind]] = {
    CONFIGS: {
        "scale": SCALES,
        "state": ("finished", "diverged"),
        "eval_split": ("test", "validation"),
        "method": METHODS,
        **dict.fromkeys(("suite", "model", "label", "train_on", "evaluate_on", "dtype"), "text"),
        **dict.fromkeys(("learning_rate", "num_blocks", "batch_size"), "positive"),
        **dict.fromkeys(("trainable_params", "train_seconds", "steps_done", "peak_memory_mib"), "optional"),
        "seed": "number",
    },
    OUTCOMES: {"task": TASKS, "tokens": "positive", "loss_sum": "number", "seed": "number"},
    TRAINING: {"step": "positive"},
}
#: What finished runs, beside that, say of where they were done.
_MADE: dict[str, Kind] = {**dict.fromkeys(("cpu", "device", "data"), "text"), "dirty": "maybe"}
#: Cells that hold JSON, with what that is.
_JSON: dict[str, tuple[TypeAdapter[Any], str]] = {
    "evaluate_on": (TypeAdapter(list[str]), "a list of tasks"),
    "data": (TypeAdapter(dict[str, str | None]), "digests by task"),
    "quantise": (TypeAdapter(Quantise), "method and bits"),
}
#: By what rows are told apart.
_KEYS = {CONFIGS: ("run_id",), OUTCOMES: ("run_id", "task", "item"), TRAINING: ("run_id", "step")}


def _require_cells(folder: Path, frames: dict[str, pd.DataFrame]) -> None:
    """Raise ResultsError if cells of a collection are none that runs give."""
    for name, kinds in _KINDS.items():
        if len(frames[name]):
            require_kinds(frames[name], kinds, folder / name, "Collect again")
            require_once(frames[name], _KEYS[name], folder / name, "Collect again")
    configs, outcomes = frames[CONFIGS], frames[OUTCOMES]
    require_kinds(configs[configs["state"] == "finished"], _MADE, folder / CONFIGS, "Collect again")
    for column, (kind, allowed) in _JSON.items():
        for value in configs[column].dropna():
            try:
                kind.validate_json(value)
            except (ValueError, TypeError):
                raise ResultsError(f"{CONFIGS}: {column} is {value!r}; allowed: {allowed}, as JSON") from None
    for column in {above for above, below, _ in (METRICS | METRICS_OF_SOME).values() if below is None}:
        if column in outcomes:
            there = outcomes[column].dropna()  # not every task has every metric
            if not pd.to_numeric(there, errors="coerce").between(0, 1).all():
                raise ResultsError(f"{OUTCOMES}: {column} is not a share from 0 to 1 everywhere")
    if (outcomes["loss_sum"] < 0).any():
        raise ResultsError(f"{OUTCOMES}: a loss_sum is below 0")


def _suites(frames: dict[str, pd.DataFrame]) -> Suites:
    for name, columns in _NEEDED.items():
        # Runs that diverged before their first step leave no row of training.
        if missing := [column for column in columns if column not in frames[name] and len(frames[name])]:
            raise ResultsError(f"{name} lacks the column(s) {', '.join(missing)}")
    rows = frames[ROWS]
    rows = rows.assign(note=rows["note"].fillna("")) if "note" in rows else rows
    try:
        rows = validate_rows(rows)
    except ResultsError as error:
        raise ResultsError(f"{ROWS}: {error}") from None
    return Suites(rows, frames[CONFIGS], frames[OUTCOMES], frames[TRAINING])


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
        "certainty": "computed",
        "origin": "",
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


def config_keys(configs: pd.DataFrame) -> list[str]:
    """Columns of the configuration, which stand between run_id and what was measured."""
    return list(configs.columns[1 : configs.columns.get_loc("label")])


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
    """Write a collection: none of its files is replaced before all of them are written whole."""
    with ExitStack() as all_written:
        for name, frame in suites.frames().items():
            text = as_text(name, frame).encode()
            # Neither the time of day nor a name in the compressed file: the same runs give the same bytes.
            content = gzip.compress(text, mtime=0) if name.endswith(".gz") else text
            all_written.enter_context(atomic_path(out / name)).write_bytes(content)
    return [out / name for name in suites.frames()]


def read_suites(folder: Path) -> Suites:
    """A collection that :func:`save_suites` wrote.

    Raises:
        ResultsError: If a file is missing or damaged, they are not of one collection, or a row is of another schema.
    """
    frames = {}
    for name in (ROWS, CONFIGS, OUTCOMES, TRAINING):
        try:
            content = (folder / name).read_bytes()
            frames[name] = _parsed((gzip.decompress(content) if name.endswith(".gz") else content).decode())
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ResultsError(
                f"{folder / name} cannot be read ({brief(error)}); `diablo-theory collect` writes it"
            ) from error
    try:
        suites, configs = _suites(frames), frames[CONFIGS]
        _require_cells(folder, frames)
    except ResultsError as error:
        raise ResultsError(f"{folder}: {error}; `diablo-theory collect` writes it") from None
    finished = set(configs.loc[configs["state"] == "finished", "run_id"])
    whole = finished == set(suites.outcomes["run_id"]) == set(suites.rows["run_id"])
    whole = whole and set(suites.training["run_id"]) <= set(configs["run_id"])
    if not whole:
        raise ResultsError(
            f"{ROWS}, {CONFIGS}, {OUTCOMES} and {TRAINING} in {folder} are not of the same runs: collect again"
        )
    return suites
