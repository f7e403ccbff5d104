"""Collections of several machines and days as one: which runs they hold, and what they make together."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.suites import (
    CONFIGS,
    HANDLING,
    Suites,
    as_text,
    collect_suites,
    config_keys,
    read_suites,
    suites_of,
)

#: Beside a run's handling, keys in which a run file's runs may differ: models have names, and machines memory.
_OTHERWISE = ("model", "seed", "micro_batch_size", "gradient_checkpointing")


def gather(sources: Sequence[Path], *, replace: bool = False) -> Suites:
    """Runs from several places as one collection.

    Args:
        sources: Folders of runs, as for :func:`~.suites.collect_suites`, and collections, as for
            :func:`~.suites.read_suites`.
        replace: Of a run that two sources have with another configuration or other outcomes, the first one's is taken.

    Returns:
        Each run once, from the first source that has it; the runs in the order of their names.

    Raises:
        ResultsError: If a source cannot be read, or without ``replace`` two of them disagree on a run.
    """
    parts = [read_suites(source) if is_collection(source) else collect_suites(source) for source in sources]
    taken: dict[str, int] = {}
    contents = [_contents(part) for part in parts]
    for place, content in enumerate(contents):
        for run_id, found in content.items():
            first = taken.setdefault(run_id, place)
            if contents[first][run_id] != found and not replace:
                raise ResultsError(
                    f"{run_id} is in {sources[first]} and, with another configuration or other outcomes, in "
                    f"{sources[place]}: leave one of them out, or take the first one's with --replace"
                )
    return _joined([_only(part, {run for run in taken if taken[run] == n}) for n, part in enumerate(parts)])


def is_collection(folder: Path) -> bool:
    """Whether a folder is one that :func:`~.suites.save_suites` wrote, rather than holding runs."""
    return (folder / CONFIGS).is_file()


def collected(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Which of some runs a collection holds with just these configurations.

    Args:
        folder: The collection.
        configs: For each run, by its name there, what makes it this run; other keys that the collection has, such as
            where it was done, tell none from another.

    Raises:
        ResultsError: If the collection cannot be read.
    """
    kept = read_suites(folder).configs
    keys = config_keys(kept)
    known = {str(run["run_id"]): {key: run[key] for key in keys} for run in kept.to_dict("records")}
    return {name for name, config in configs.items() if name in known and _agree(known[name], config)}


def made_from(configs: pd.DataFrame, stated: Mapping[str, Any]) -> pd.DataFrame:
    """Runs of a collection that are what a run file says.

    Args:
        configs: A row a run, of a collection.
        stated: The file's keys, over those of the defaults. A model is known by the last part of its name, which a
            local folder has, too; the seed and keys of how a run is done alone tell none from another.
    """
    keys = [key for key in config_keys(configs) if key not in {*_OTHERWISE, *HANDLING}]
    wanted = {key: stated[key] for key in keys if key in stated}
    records = configs[keys].to_dict("records")
    same = [_agree({str(key): value for key, value in run.items()}, wanted) for run in records]
    models = configs["model"].map(lambda model: Path(model).name.casefold())
    return configs[pd.Series(same, index=configs.index) & (models == Path(stated["model"]).name.casefold())]


def _agree(kept: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return all(key in kept and _same(kept[key], value) for key, value in config.items())


def _same(cell: Any, value: Any) -> bool:
    """Whether a cell of a collection has a value; of a mapping at least those keys that the value has."""
    if value is None:
        return bool(pd.isna(cell))
    if isinstance(value, dict):
        return isinstance(cell, str) and value.items() <= json.loads(cell).items()
    if isinstance(value, list):
        return isinstance(cell, str) and bool(json.loads(cell) == value)
    return bool(cell == value)


def _contents(suites: Suites) -> dict[str, str]:
    """For each run what it is and what came of it, without when, where and how fast."""
    keys = [*config_keys(suites.configs), "state"]
    configs = suites.configs.set_index("run_id", drop=False)[keys]
    found = {str(run_id): row.dropna().to_json() for run_id, row in configs.iterrows()}
    for run_id, items in suites.outcomes.groupby("run_id"):
        found[str(run_id)] += items.dropna(axis="columns", how="all").sort_index(axis="columns").to_csv(index=False)
    return found


def _only(suites: Suites, runs: set[str]) -> dict[str, pd.DataFrame]:
    return {name: frame[frame["run_id"].isin(runs)] for name, frame in suites.frames().items()}


def _joined(parts: Sequence[Mapping[str, pd.DataFrame]]) -> Suites:
    """Frames one below the other, as text, so that it does not matter which part has gaps in which column."""
    texts = {}
    for name in parts[0]:
        pieces = [
            pd.read_csv(io.StringIO(as_text(name, part[name])), dtype=str, keep_default_na=False) for part in parts
        ]
        whole = pd.concat(pieces, ignore_index=True)
        texts[name] = whole.sort_values("run_id", key=_in_order, kind="stable").to_csv(index=False)
    return suites_of(texts)


def _in_order(run_ids: pd.Series) -> pd.Series:
    """The order of folders: part by part, unlike that of their names as strings."""
    return run_ids.map(lambda run_id: run_id.replace("/", "\0"))
