"""Trainable parameters that papers quote, counted again on the models' true shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory import methods
from diablo_theory.errors import ConfigError, ResultsError
from diablo_theory.finetune.planning import KNOWN, PAPER_TARGETS, Trained, Work, model_shapes, trained
from diablo_theory.finetune.planning.shapes import MATRICES
from diablo_theory.reporting.parameters import COUNTS
from diablo_theory.reporting.published import read_published

#: The matrices that each suite's runs adapt: the set that makes DiaBlo's quoted numbers come out, on some reading.
#: Source: the authors' scripts (five), and for code and safety LoRI's, whose tables those rows come from (all seven).
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("commonsense", "arithmetic", "math_10k", "quantised", "parameters"), PAPER_TARGETS),
    **dict.fromkeys(("code", "safety"), MATRICES),
}
#: Methods with LoRA's two factors, which differ from it in where they start or what they stand on.
_AS_LORA = ("milora", "qlora", "gptq-lora", "apiq", "loftq")
_KNOB = re.compile(r"\b[rN]=(\d+)")


def count_published(folder: Path) -> pd.DataFrame:
    """Every published method that is known here by its count, with what it says of its parameters and what is true.

    Args:
        folder: Published numbers, as :func:`~diablo_theory.reporting.published.read_published` takes them.

    Returns:
        A row a quoted count, in the columns of :data:`~diablo_theory.reporting.parameters.COUNTS`.

    Raises:
        ResultsError: If the folder cannot be read, or holds no such row, or one whose size its model does not have.
    """
    rows = read_published(folder)
    quoted = rows[
        rows[["trainable_pct", "trainable_params"]].notna().any(axis=1) & ~rows["method"].isin(["none", "full"])
    ]
    about = ["suite", "model", "method", "setting", "trainable_pct", "trainable_params"]
    counted = [_counted(row) for row in quoted.drop_duplicates(about).to_dict("records") if _is_known(row)]
    if not counted:
        raise ResultsError(f"{folder} quotes no count of a method that is known here")
    return pd.DataFrame(counted, columns=list(COUNTS)).sort_values(["model", "method", "setting"], ignore_index=True)


def _is_known(row: Mapping[Any, Any]) -> bool:
    of_method = (row["method"] in methods.FAMILIES or row["method"] in _AS_LORA) and row["suite"] in TARGETS
    return of_method and row["model"] in KNOWN and _knob(row) is not None


def _knob(row: Mapping[Any, Any]) -> int | None:
    """The rank or N that a setting is printed with."""
    found = _KNOB.search(row["setting"])
    return int(found[1]) if found else None


def _counted(row: Mapping[Any, Any]) -> dict[str, Any]:
    try:
        found, whole = _trained(row, "lora" if row["method"] in _AS_LORA else row["method"])
        # Papers quote DoRA with LoRA's count, too.
        bare = _trained(row, "lora")[0] if row["method"] == "dora" else None
    except ConfigError as error:
        where = f"{row['file']}.csv, {row['setting']} on {row['model']}, table {row['table']} of {row['suite']}"
        raise ResultsError(f"{where}: this cannot be counted: {error}") from error
    return {
        **{key: row[key] for key in ("suite", "model", "method", "setting", "file")},
        "matrices": ",".join(name.removesuffix("_proj") for name in TARGETS[row["suite"]]),
        "quoted_pct": row["trainable_pct"],
        "quoted_params": row["trainable_params"],
        "params": found.parameters,
        "pct": found.percent,
        "pct_wide_kv": found.quoted_percent,
        "pct_of_all": 100 * found.parameters / (whole + found.parameters),
        "pct_bare": bare.percent if bare else None,
        "pct_bare_wide_kv": bare.quoted_percent if bare else None,
    }


def _trained(row: Mapping[Any, Any], method: str) -> tuple[Trained, int]:
    """What a method of a row's size trains, and the parameters of the model itself."""
    knob = _knob(row)
    size: dict[str, Any] = {"num_blocks": knob} if method == "diablo" else {"rank": knob}
    least: dict[str, Any] = {"examples": 1, "prompt_tokens": 1, "answer_tokens": 1, "batch_size": 1}
    work = Work(model=row["model"], method=method, target_modules=TARGETS[row["suite"]], **least, **size)
    shapes = model_shapes(row["model"])
    return trained(shapes, work), shapes.parameters
