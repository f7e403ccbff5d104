"""Published numbers: read and checked, held against themselves, and against each other."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pandas as pd

from diablo_theory.errors import ResultsError
from diablo_theory.records import read_csv
from diablo_theory.reporting.names import PUBLISHED, known
from diablo_theory.reporting.results import COLUMNS, KEY, PERCENT_METRICS, refuse_cell, validate_rows

#: Metrics that only published rows have, with their units.
OTHER_METRICS = {
    "perplexity": "",
    "trainable_pct": "%",
    "minutes": "minutes",
    "minutes_per_epoch": "minutes",
    "hours": "hours",
    "time_ratio_to_lora": "times LoRA's",
    "memory_saved_pct": "%",
}
#: Methods as tables print them, by their names in the rows.
METHOD_NAMES = {
    "none": "the untouched model",
    "full": "full fine-tuning",
    "diablo": "DiaBlo",
    "lora": "LoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "milora": "MiLoRA",
    "smt": "SMT",
    "s2ft": "S2FT",
    "lori": "LoRI",
    "miss": "MiSS",
    "c3a": "C3A",
    "qlora": "QLoRA",
    "gptq-lora": "GPTQ-LoRA",
    "loftq": "LoftQ",
    "apiq": "ApiQ",
    "lora-fa": "LoRA-FA",
    "random-blocks": "random blocks",
    "random-entries": "random entries",
    "random-rows": "random rows",
    "random-columns": "random columns",
    "floor": "the frozen floor",
    "einsum": "the authors' einsum layer",
    "sketchtune": "SketchTune",
    "prefix": "prefix tuning",
    "series-adapter": "series adapters",
    "parallel-adapter": "parallel adapters",
    "lora-plus": "LoRA+",
    "rslora": "rsLoRA",
    "lora-ga": "LoRA-GA",
    "adalora": "AdaLoRA",
    "svd-principal": "principal singular components",
    "svd-minor": "minor singular components",
    "svd-random": "random singular components",
    "qpissa": "QPiSSA",
    "zero-shot": "the model asked without examples",
    "rtn": "rounding to nearest",
    "optq": "OPTQ",
    "omniquant": "OmniQuant",
    "magr": "MagR",
    "magr-rtn": "MagR with rounding to nearest",
    "magr-optq": "MagR with OPTQ",
    "magr-optq-cd": "MagR with OPTQ and coordinate descent",
}
#: Name of a mean over the other tasks of the same row of a table.
AVERAGE = "average"
#: Figures with a suite's published numbers, which may show what was reproduced beside them.
PUBLISHED_FIGURES = {
    "commonsense": ("published_commonsense",),
    "arithmetic": ("published_arithmetic",),
    "quantised": ("published_quantised",),
    "patterns": ("published_patterns",),
    "efficiency": ("time_memory",),
}
#: Half of the last digit of tables that print one decimal.
ROUNDING = 0.05

_TEXT = (
    *("source", "suite", "table", "model", "method", "setting", "metric", "run_id", "scale", "note"),
    *("certainty", "origin"),
)
#: Quoted shares of parameters of one setting are apart by less than this factor, by ways of counting.
SHARES = 1.5
#: What of a setting makes two of them different, by the words that it is printed with.
_KNOBS = (r"\br=(\d+)", r"\bN=(\d+)", r"([\d.]+)[- ]bits?\b", r"\bW(\d)A16", r"\blr=([\de.-]+)", r"\bg(\d+)")


def read_published(folder: Path) -> pd.DataFrame:
    """All published numbers, in the tidy schema.

    Args:
        folder: Holds one CSV file a table, with every column of the schema.

    Returns:
        Their rows, file by file in the order of names, with the name of the file's stem as a further column, ``file``.

    Raises:
        ResultsError: If there is no file, one cannot be read, or a row does not fit; it names the file and the row.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ResultsError(f"{folder} holds no published numbers: no CSV file")
    rows = pd.concat([_read(file).assign(file=file.stem) for file in files], ignore_index=True)
    again = rows.duplicated(subset=list(KEY), keep=False)  # no number twice, whichever files they are in
    if again.any():
        _, same = next(iter(rows[again].groupby(list(KEY), dropna=False, sort=False)))
        where, row = " and ".join(f"{name}.csv" for name in same["file"]), same.iloc[0]
        raise ResultsError(f"{folder}: {where} have the same number of {row['setting']} on {row['table']}")
    return rows


def _read(file: Path) -> pd.DataFrame:
    advice = "It was transcribed by hand: put it back as it was."
    rows = read_csv(file, advice, dtype=dict.fromkeys(_TEXT, str))
    for name in set(_TEXT) & set(rows):
        rows[name] = rows[name].fillna("")
    rows.index += 2  # rows are told by their lines, below the heading
    try:
        validate_rows(rows)
        _require_published(rows)
    except ResultsError as error:
        raise ResultsError(f"{file}: {error}") from None
    return rows.reset_index(drop=True)[list(COLUMNS)]


def _require_published(rows: pd.DataFrame) -> None:
    for column, allowed in (("source", "published"), ("scale", "full")):
        refuse_cell(rows, column, rows[column] != allowed, allowed)
    negative = rows["metric"].isin(OTHER_METRICS) & (rows["value"] < 0)
    refuse_cell(rows, "value", negative, "nought or more")
    for line, suite, table, method, metric in rows[["suite", "table", "method", "metric"]].itertuples(name=None):
        try:
            known("suite", suite, PUBLISHED)
            known(f"table of {suite}", table, PUBLISHED[suite])
            known("method", method, METHOD_NAMES)
            known("metric", metric, (*PERCENT_METRICS, *OTHER_METRICS))
        except ResultsError as error:
            raise ResultsError(f"Row {line}: {error}") from None


def odd_averages(rows: pd.DataFrame) -> pd.DataFrame:
    """Printed means that are not those of the printed numbers beside them.

    Each of those is rounded by at most :data:`ROUNDING`, and so is the mean: what is further off is no rounding.

    Returns:
        A row a mean: file, model, setting, printed, mean (of the parts), parts (how many).
    """
    same = ["file", "suite", "model", "method", "setting", "trainable_params", "trainable_pct", "metric"]
    found = []
    for _, group in rows.groupby(same, sort=False, dropna=False):
        parts, averages = group[group["table"] != AVERAGE], group[group["table"] == AVERAGE]
        for row in averages.to_dict("records"):
            mean = parts["value"].mean()
            if len(parts) > 1 and abs(row["value"] - mean) > 2 * ROUNDING + 1e-9:
                named = {key: row[key] for key in ("file", "model", "setting")}
                found.append(named | {"printed": row["value"], "mean": mean, "parts": len(parts)})
    return pd.DataFrame(found, columns=["file", "model", "setting", "printed", "mean", "parts"])


def conflicts(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of tables that ought to be the same, of one method on one model, and are not.

    Where a table does not say how it set a method, its row is held against the nearest one of the other table, if that
    one's nearest is it: so a conflict is one whichever setting was meant. A row that does not say it,
    and has the very numbers of another setting in a further table, is of that setting, and in no conflict.

    Returns:
        A row a pair: suite, model, method; file and setting of each (``file_1``, ...); average of each (its mean over
        tasks as printed, or its only number); numbers (how many both have), differing (how many of them are apart by
        more than the error of reading), largest (difference).
    """
    columns = ["suite", "model", "method", "file_1", "setting_1", "average_1", "file_2", "setting_2", "average_2"]
    columns += ["numbers", "differing", "largest"]
    found = []
    for named, group in rows.groupby(["suite", "model", "method"], sort=False):
        entries = [entry for _, entry in group.groupby(["file", "setting"], sort=False)]
        for first, second in itertools.combinations(entries, 2):
            if first["origin"].iloc[0] == second["origin"].iloc[0]:
                continue
            apart = _apart(first, second)
            differing = _differing(apart)
            same = len(differing) and _are_nearest(first, second, entries)
            if same and _may_be_one_setting(first, second, entries):
                pair = [*named, *_shown(first), *_shown(second)]
                found.append([*pair, len(apart), len(differing), differing["apart"].max()])
    return pd.DataFrame(found, columns=columns)


def _shown(entry: pd.DataFrame) -> tuple[str, str, float]:
    average = entry[entry["table"] == AVERAGE] if len(entry) > 1 else entry
    value = float(average["value"].iloc[0]) if len(average) else float("nan")
    return str(entry["file"].iloc[0]), str(entry["setting"].iloc[0]), value


def _apart(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """For every number that both have: how far apart, and how far the error of reading it off a drawing explains."""
    pairs = first.merge(second, on=["table", "metric"], suffixes=("_1", "_2"))
    errors = [(pairs[f"ci_high_{n}"] - pairs[f"value_{n}"]).fillna(0.0) for n in (1, 2)]
    return pd.DataFrame({"apart": (pairs["value_1"] - pairs["value_2"]).abs(), "error": errors[0] + errors[1]})


def _differing(apart: pd.DataFrame) -> pd.DataFrame:
    return apart[apart["apart"] > apart["error"] + 1e-9]


def _may_be_one_setting(first: pd.DataFrame, second: pd.DataFrame, entries: list[pd.DataFrame]) -> bool:
    return any(
        _may_be_same(one, two) for one, two in itertools.product(_possible(first, entries), _possible(second, entries))
    )


def _possible(entry: pd.DataFrame, entries: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """The entry itself, or those that say their setting and have the very numbers of it."""
    found = []
    for other in entries:
        says = any(re.search(knob, other["setting"].iloc[0]) for knob in _KNOBS)
        if other is not entry and says and _may_be_same(other, entry):
            apart = _apart(other, entry)
            found += [other] if len(apart) and _differing(apart).empty else []
    return found or [entry]


def _are_nearest(first: pd.DataFrame, second: pd.DataFrame, entries: list[pd.DataFrame]) -> bool:
    def distance(one: pd.DataFrame, two: pd.DataFrame) -> float:
        apart = _apart(one, two)["apart"].mean()
        return float(apart) if _may_be_same(one, two) else float("nan")

    def is_nearest(one: pd.DataFrame, two: pd.DataFrame) -> bool:
        others = [entry for entry in entries if entry["file"].iloc[0] == two["file"].iloc[0]]
        return bool(distance(one, two) <= pd.Series([distance(one, other) for other in others]).min())

    return is_nearest(first, second) and is_nearest(second, first)


def _may_be_same(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Whether nothing that is said of two entries makes them different settings of a method."""
    for knob in _KNOBS:
        one, two = (re.search(knob, entry["setting"].iloc[0]) for entry in (first, second))
        if one and two and one[1] != two[1]:
            return False
    shares = [entry["trainable_pct"].iloc[0] for entry in (first, second)]
    return not max(shares) > SHARES * min(shares)  # unknown ones are NaN
