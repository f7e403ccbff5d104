"""Reading a results folder, and the one tidy schema that every number of this project fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from diablo_theory.errors import ResultsError, nearest
from diablo_theory.files import read_json
from diablo_theory.records import read_checked
from diablo_theory.reporting.ended_runs import read_outcomes
from diablo_theory.reporting.intervals import METRICS, METRICS_OF_SOME, Estimate, score, time_ratio
from diablo_theory.reporting.names import CHECKS, METHODS, TASKS
from diablo_theory.reporting.reproduced_files import Manifest, Run, Scale
from diablo_theory.reporting.saved_tables import Kind, read_table, require_kinds

#: Of results folders. 2: a run may be scored on several tasks, each with predictions and metrics of its own.
LAYOUT_VERSION = 2
#: Of rows. 3: each says how sure its number is, and of a published one where it stands.
SCHEMA_VERSION = 3
SOURCES = ("published", "reproduced")
#: How a number came here: from this project's own runs; read where it was printed; from somebody's note or quotation;
#: off a drawing, where the interval is the error of reading.
CERTAINTIES = ("computed", "printed", "quoted", "measured")
SCALES: tuple[str, ...] = get_args(Scale)
PERCENT_METRICS = ("exact_match", "lenient_match", "passed", "trainable_pct", "memory_saved_pct", *METRICS_OF_SOME)
KEY = ("source", "suite", "table", "model", "method", "setting", "metric", "seed", "run_id", "origin")
COLUMNS = (
    *("source", "suite", "table", "model", "method", "setting", "trainable_params", "trainable_pct", "metric"),
    *("value", "ci_low", "ci_high", "stderr", "n", "seed", "run_id", "scale", "note"),
    *("certainty", "origin", "schema_version"),
)

#: Columns of the tables of a results folder, with what each holds; an infinite margin is one of nothing.
_VERDICTS: dict[str, Kind] = {
    "check": CHECKS,
    "role": ("claim", "control"),
    **dict.fromkeys(("statement", "instance"), "text"),
    **dict.fromkeys(("premise_margin", "claim_margin", "tolerance"), "real"),
    "passed": "flag",
}
_MAP: dict[str, Kind] = {
    **dict.fromkeys(("rank_x", "lora_rank", "diablo_gap", "lora_gap", "frozen_gap"), "number"),
    "num_blocks": "count",
    "in_theorem": "flag",
}
#: A training that diverged has an infinite loss.
_RATES: dict[str, Kind] = {
    "task": TASKS,
    "method": METHODS,
    "label": "text",
    "learning_rate": "positive",
    "exact": "share",
    **dict.fromkeys(("seed", "n"), "number"),
    **dict.fromkeys(("valid_loss", "loss_low", "loss_high"), "real"),
    "chosen": "flag",
}
_LOG: dict[str, Kind] = {"step": "count", "loss": "number", "grad_norm": "optional"}
_STEP_TIMES: dict[str, Kind] = {"round": "number", "method": "text", "seconds": "positive"}
_MEMORY: dict[str, Kind] = {"method": "text", "static_mib": "positive", "step_peak_mib": "positive"}
_RUN_KEYS = ["task", "model", "method", "label", "seed", "trainable_params", "trainable_pct", "n_test"]
_RUN_KEYS += ["scale", "exact_means"]
_RUN_EXTRAS = ["num_blocks", "learning_rate", "steps", "batch_size", "train_seconds", "final_train_loss"]
#: An interval that ends at its own value may miss it by the last bits.
_ROUNDING = 1e-9
FULL_LABEL = "Full fine-tuning"
_METHOD_ORDER = ("none", "full", "diablo", "lora")


@dataclass(frozen=True)
class ResultsData:
    """All that a results folder holds; a part that was never run is an empty frame.

    Attributes:
        path: The folder.
        manifest: What was run where, with which versions.
        verdicts: One row per trial of a theory check.
        gap_map: One row per point (rank of X, number of blocks) of the theory map.
        runs: One row per finished run and task that it was scored on, by task, then method, then seed.
        logs: The training log of each run that trained, by run id.
        items: One row per run and test problem, with the run's ``run_id, task, label, method, seed``.
        step_times: Paired rounds of the step-time measurement.
        memory: Memory per method.
        learning_rates: The learning-rate search.
        unfinished: Run folders without ``metrics.json``.
    """

    path: Path
    manifest: dict[str, Any]
    verdicts: pd.DataFrame = field(default_factory=pd.DataFrame)
    gap_map: pd.DataFrame = field(default_factory=pd.DataFrame)
    runs: pd.DataFrame = field(default_factory=lambda: _runs_table([]))
    logs: dict[str, pd.DataFrame] = field(default_factory=dict)
    items: pd.DataFrame = field(default_factory=pd.DataFrame)
    step_times: pd.DataFrame = field(default_factory=pd.DataFrame)
    memory: pd.DataFrame = field(default_factory=pd.DataFrame)
    learning_rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    unfinished: tuple[str, ...] = ()


def collect(results: Path) -> ResultsData:
    """Read a results folder.

    Args:
        results: The folder that ``diablo-theory reproduce`` wrote.

    Returns:
        Everything in it. Runs without ``metrics.json`` are listed as unfinished and otherwise ignored.

    Raises:
        ResultsError: If it is no results folder, another schema version wrote it, or a file in it is damaged.
    """
    results = Path(results)
    manifest = _read_manifest(results)
    folders = sorted(f for f in (results / "runs").glob("*") if f.is_dir() and not f.name.startswith("."))
    finished = [folder for folder in folders if (folder / "metrics.json").exists()]
    runs = _runs_table([row for folder in finished for row in _read_run(folder)])
    by_id = {folder.name: folder for folder in finished}
    times, memory = _read_bench(results / "bench")
    return ResultsData(
        path=results,
        manifest=manifest,
        verdicts=read_verdicts(results),
        gap_map=_optional(results / "theory" / "map.csv", _MAP),
        runs=runs,
        logs={r: _read_log(f) for r, f in by_id.items() if (f / "log.csv").exists()},
        items=_all_items(runs, by_id),
        step_times=times,
        memory=memory,
        learning_rates=_optional(results / "learning_rates.csv", _RATES, ("task", "label", "learning_rate", "seed")),
        unfinished=tuple(folder.name for folder in folders if folder not in finished),
    )


def read_verdicts(results: Path) -> pd.DataFrame:
    """Trials of the theory checks of a results folder; an empty frame where there are none.

    Raises:
        ResultsError: If their file is damaged, or the folder is of another schema version.
    """
    _read_manifest(results)
    return _optional(results / "theory" / "verdicts.csv", _VERDICTS)


def validate_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Check that a frame fits the tidy schema.

    Args:
        rows: Published or reproduced rows, or both.

    Returns:
        The same frame, with its columns in the schema's order.

    Raises:
        ResultsError: Naming the row, the column, the value and what is allowed.
    """
    if "schema_version" in rows:  # first, since rows of another one may differ in anything
        refuse_cell(rows, "schema_version", rows["schema_version"] != SCHEMA_VERSION, str(SCHEMA_VERSION))
    for column in rows.columns:
        if column not in COLUMNS:
            raise ResultsError(f"Unknown column {column!r} in the result rows.{nearest(str(column), COLUMNS)}")
    missing = [column for column in COLUMNS if column not in rows.columns]
    if missing:
        raise ResultsError(f"The result rows lack the column(s) {', '.join(missing)}; needed: {', '.join(COLUMNS)}.")
    refuse_cell(rows, "source", ~rows["source"].isin(SOURCES), f"one of {', '.join(SOURCES)}")
    refuse_cell(rows, "scale", ~rows["scale"].isin(SCALES), f"one of {', '.join(SCALES)}")
    refuse_cell(rows, "certainty", ~rows["certainty"].isin(CERTAINTIES), f"one of {', '.join(CERTAINTIES)}")
    computed = rows["certainty"] == "computed"
    of_others = CERTAINTIES[1:]
    refuse_cell(rows, "certainty", (rows["source"] == "reproduced") & ~computed, "computed, for a reproduced number")
    refuse_cell(
        rows, "certainty", (rows["source"] == "published") & computed, f"{', '.join(of_others)} for a published one"
    )
    nowhere = rows["origin"].isna() | (rows["origin"] == "")
    refuse_cell(rows, "origin", (rows["source"] == "published") & nowhere, "where a published number stands")
    refuse_cell(rows, "metric", rows["metric"].isna() | (rows["metric"] == ""), "the name of what was measured")
    for column in ("suite", "table"):
        refuse_cell(rows, column, rows[column].isna() | (rows[column] == ""), "a name")
    nameless = rows["model"].isna() | (rows["model"] == "")  # theory rows are of none
    refuse_cell(rows, "model", (rows["source"] == "published") & nameless, "a name")
    for column in ("value", "trainable_params", "trainable_pct", "ci_low", "ci_high", "stderr", "n"):
        number = pd.to_numeric(rows[column], errors="coerce")
        finite = np.isfinite(number.to_numpy(float, na_value=np.nan))
        refuse_cell(rows, column, ~finite & rows[column].notna(), "a number")
    refuse_cell(rows, "value", rows["value"].isna(), "a number")
    refuse_cell(rows, "trainable_pct", _outside(rows["trainable_pct"]), "a percentage from 0 to 100")
    percent = rows["metric"].isin(PERCENT_METRICS)
    refuse_cell(rows, "value", percent & _outside(rows["value"]), "a percentage from 0 to 100")
    value, low, high = (pd.to_numeric(rows[name]) for name in ("value", "ci_low", "ci_high"))
    refuse_cell(rows, "ci_low", low > value + _ROUNDING * value.abs(), "at most the value")
    refuse_cell(rows, "ci_high", high < value - _ROUNDING * value.abs(), "at least the value")
    for column in ("trainable_params", "stderr"):
        refuse_cell(rows, column, pd.to_numeric(rows[column]) < 0, "nought or more")
    refuse_cell(rows, "n", pd.to_numeric(rows["n"]) < 1, "1 or more")
    repeated = rows.duplicated(subset=list(KEY), keep="first")
    if repeated.any():
        row = rows.loc[repeated].iloc[0]
        named = ", ".join(f"{column}={row[column]!r}" for column in KEY)
        raise ResultsError(f"Row {rows.index[repeated][0]} repeats an earlier one ({named}); each may occur once.")
    return rows[list(COLUMNS)]


def tidy_rows(data: ResultsData) -> pd.DataFrame:
    """Write every number of a results folder as rows of the tidy schema.

    Args:
        data: What :func:`collect` read.

    Returns:
        One row per run and metric, per theory check and role, per map point and method, and per measured cost.

    Raises:
        ResultsError: If a row does not fit the schema.
    """
    rows = [*_run_rows(data), *_theory_rows(data), *_cost_rows(data)]
    shared = {"source": "reproduced", "scale": data.manifest["scale"], "note": "", "run_id": ""}
    shared |= {"certainty": "computed", "origin": ""}
    frame = pd.DataFrame([shared | {"schema_version": SCHEMA_VERSION} | row for row in rows], columns=list(COLUMNS))
    return validate_rows(frame)


def full_label(data: ResultsData) -> str:
    """Name under which full fine-tuning stands in this folder's tables."""
    full = data.runs.loc[data.runs["method"] == "full", "label"]
    return str(full.iloc[0]) if len(full) else FULL_LABEL


def by_method(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """List the ``(label, method)`` pairs of some runs: untouched, full, DiaBlo, LoRA, then any other."""
    pairs = runs[["label", "method"]].drop_duplicates().itertuples(index=False)
    return sorted(((str(p.label), str(p.method)) for p in pairs), key=lambda p: (_rank(p[1]), p[0]))


def _numbers(estimate: Estimate) -> dict[str, float]:
    interval = {"ci_low": estimate.low, "ci_high": estimate.high, "stderr": estimate.stderr}
    return {"value": estimate.value, "n": estimate.n} | interval


def _run_rows(data: ResultsData) -> list[dict[str, Any]]:
    rows = []
    for run in data.runs.to_dict("records"):
        items = data.items[data.items["run_id"] == run["run_id"]]
        same = {key: run[key] for key in ("run_id", "model", "method", "seed", "scale")}
        same |= {"trainable_params": run["trainable_params"], "trainable_pct": run["trainable_pct"]}
        same |= {"suite": "finetune", "table": run["task"], "setting": run["label"]}
        rows += [same | {"metric": name} | _numbers(score(items, name)) for name in METRICS]
        rows += [same | {"metric": name, "value": run[name]} for name in ("train_seconds", "final_train_loss")]
    return [row for row in rows if pd.notna(row["value"])]


def _theory_rows(data: ResultsData) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if not data.verdicts.empty:
        for (check, role), same in data.verdicts.groupby(["check", "role"]):
            passed = {"metric": "passed", "value": 100 * same["passed"].mean(), "n": len(same)}
            rows.append({"suite": "theory", "table": "verdicts", "method": check, "setting": role} | passed)
    for point in data.gap_map.to_dict("records"):
        for method, name in (("diablo", "diablo"), ("lora", "lora"), ("frozen", "lora-frozen-a")):
            where = {"method": name, "setting": f"rank X = {point['rank_x']}, N = {point['num_blocks']}"}
            gap = {"metric": "gap", "value": point[f"{method}_gap"], "trainable_params": point.get(f"{method}_params")}
            rows.append({"suite": "theory", "table": "map"} | where | gap)
    return rows


def _cost_rows(data: ResultsData) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    labels: list[str] = [] if data.step_times.empty else list(data.step_times["method"].unique())
    for label in labels:
        ratio = time_ratio(data.step_times, label, full_label(data))
        if ratio.n:
            named = {"table": "step_time", "setting": label, "metric": "step_time_ratio_to_full"}
            rows.append(named | _numbers(ratio))
    for line in data.memory.to_dict("records"):
        for name in ("static_mib", "step_peak_mib"):
            rows.append({"table": "memory", "setting": line["method"], "metric": name, "value": line[name]})
    return [{"suite": "bench"} | row for row in rows if pd.notna(row["value"])]


def _rank(method: str) -> int:
    return _METHOD_ORDER.index(method) if method in _METHOD_ORDER else len(_METHOD_ORDER)


def _outside(values: pd.Series) -> pd.Series:
    number = pd.to_numeric(values, errors="coerce")
    return (number < 0) | (number > 100)


def refuse_cell(rows: pd.DataFrame, column: str, bad: pd.Series, allowed: str) -> None:
    """Raise ResultsError for the first bad row of the tidy schema, with its number, its value and what is allowed."""
    if bad.any():
        row = rows.index[bad][0]
        value = rows[column][bad].tolist()[0]  # Python's own, as a reader knows it
        raise ResultsError(f"Row {row}: {column} is {value!r}; allowed: {allowed}.")


def _read_manifest(results: Path) -> dict[str, Any]:
    path = results / "manifest.json"
    if not path.exists():
        raise ResultsError(
            f"{results} holds no manifest.json, so it is no results folder. `diablo-theory reproduce` makes one."
        )
    manifest = read_json(path, _again(path))
    found = manifest.get("schema_version")
    if found != LAYOUT_VERSION:
        raise ResultsError(
            f"{path} has schema version {found!r}; this version of diablo-theory reads {LAYOUT_VERSION}. Read it with "
            f"diablo-theory {manifest.get('package_version', '(unknown)')}, which wrote it, or run `diablo-theory "
            "reproduce` again into a new folder."
        )
    return read_checked(path, Manifest, _again(path))


def _again(path: Path) -> str:
    return f"Delete {path} and run `diablo-theory reproduce` again."


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ResultsError(f"{path} is missing. {_again(folder)}")
    return read_checked(path, Run, _again(path))


def _read_csv(path: Path, columns: dict[str, Kind], *keys: tuple[str, ...]) -> pd.DataFrame:
    return read_table(path, columns, "diablo-theory reproduce", keys, _again(path))


def _optional(path: Path, columns: dict[str, Kind], *keys: tuple[str, ...]) -> pd.DataFrame:
    return _read_csv(path, columns, *keys) if path.exists() else pd.DataFrame()


def _read_bench(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Times of all methods in every round, and memory of the same methods."""
    files = folder / "step_times.csv", folder / "memory.csv"
    times = _optional(files[0], _STEP_TIMES, ("round", "method"))
    memory = _optional(files[1], _MEMORY, ("method",))
    methods = set(memory.get("method", times.get("method", ())))
    for number, found in times.groupby("round")["method"] if len(times) else ():
        if odd := sorted(methods ^ set(found)):
            raise ResultsError(
                f"{files[0]}, round {number}, is not of the methods of {files[1].name}, or of the other rounds: "
                f"{odd[0]} is in one alone. {_again(folder)}"
            )
    return times, memory


def _read_run(folder: Path) -> list[dict[str, Any]]:
    """A row for each task that a run was scored on."""
    metrics = folder / "metrics.json"
    merged = _read_config(folder) | read_checked(metrics, Run, _again(metrics))
    rows = []
    for task, scores in (merged.get("scores") or {"": {}}).items():
        of_task = {"task": task, "n_test": scores.get("n"), "exact_means": scores.get("means", {}).get("exact")}
        row = {"run_id": folder.name} | {key: (merged | of_task).get(key) for key in [*_RUN_KEYS, *_RUN_EXTRAS]}
        if missing := [key for key in _RUN_KEYS if row[key] in (None, "")]:
            raise ResultsError(f"{folder}: config.json and metrics.json lack {', '.join(missing)}.")
        rows.append(row)
    return rows


def _runs_table(runs: list[dict[str, Any]]) -> pd.DataFrame:
    if not runs:
        return pd.DataFrame(columns=["run_id", *_RUN_KEYS, *_RUN_EXTRAS])
    frame = pd.DataFrame(runs)
    frame[_RUN_EXTRAS] = frame[_RUN_EXTRAS].apply(pd.to_numeric)
    for (task, label, seed), same in frame.groupby(["task", "label", "seed"]):
        if len(same) > 1:
            raise ResultsError(
                f"Runs {', '.join(same['run_id'])} are all {label} on {task} with seed {seed}, so no table can tell "
                "them apart. Move all but one out of the runs folder."
            )
    models = frame[["task", "model"]].drop_duplicates()
    for mixed in models.loc[models["task"].duplicated(), "task"]:
        names = ", ".join(models.loc[models["task"] == mixed, "model"])
        raise ResultsError(f"Runs on {mixed} used different models ({names}); compare one model per folder.")
    frame["rank"] = frame["method"].map(_rank)
    return frame.sort_values(["task", "rank", "label", "seed"], ignore_index=True).drop(columns="rank")


def _read_log(folder: Path) -> pd.DataFrame:
    path = folder / "log.csv"
    log = _read_csv(path, _LOG, ("step",))
    parts = [name for name in map(str, log) if name.startswith("grad_norm/")]
    require_kinds(log, dict.fromkeys(parts, "optional"), path, _again(path))
    return log


def _all_items(runs: pd.DataFrame, folders: dict[str, Path]) -> pd.DataFrame:
    frames = []
    for run in runs.itertuples(index=False):
        path = folders[str(run.run_id)] / "predictions" / f"{run.task}.csv"
        scores = read_json(folders[str(run.run_id)] / "metrics.json")["scores"][run.task]
        frame = read_outcomes(path, scores, _again(folders[str(run.run_id)]))
        if "lenient" not in frame:
            frame["lenient"] = float("nan")
        names = {name: getattr(run, name) for name in ("run_id", "task", "label", "method", "seed")}
        frames.append(frame.assign(**names))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
