"""What collected runs say: scores over all seeds, and paired differences between experiments that may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.intervals import Estimate, mean_score, paired_difference, score
from diablo_theory.reporting.published import AVERAGE
from diablo_theory.reporting.suites import HANDLING, Suites, config_keys, metrics_of

#: Keys that do not make two runs different experiments.
IRRELEVANT = ("seed", "evaluate_on", *HANDLING)
#: Keys that may differ between experiments that are compared: the table they belong to, the method, how it is set.
METHOD = ("suite", "method", "num_blocks", "learning_rate", "rank", "alpha")
#: Published training examples of what the efficiency suite trains on.
EPOCHS = {"commonsense_170k": 170_420}
#: The method that the others are compared with.
REFERENCE = "diablo"


def experiments(suites: Suites) -> pd.DataFrame:
    """Runs that differ in nothing but the seed, as one experiment.

    Returns:
        A row a run: run_id, experiment (a number), and alike: experiments of the same number there differ in the
        method and how it is set alone (model, data, base, number of steps, ... are the same), so that they may be
        compared.
    """
    configs = suites.configs
    # The weights themselves, since a name or a folder may stand for others on another day.
    keys = [key for key in config_keys(configs) if key not in IRRELEVANT] + ["model_sha256"]
    text = configs[keys].astype(str)
    shared = [key for key in keys if key not in METHOD]
    named = pd.DataFrame(
        {
            "run_id": configs["run_id"],
            "experiment": text.groupby(keys, sort=False, dropna=False).ngroup(),
            "alike": text.groupby(shared, sort=False, dropna=False).ngroup(),
        }
    )
    runs = named.merge(configs, on="run_id")
    finished, digests = runs[runs["state"] == "finished"], _digests(runs)
    _require_one(finished, ["experiment"], "conditions", "were scored under different conditions")
    _require_one(digests.dropna(), ["alike", "task"], "digest", "were not scored on the same problems")
    _require_one(digests, ["experiment", "task", "seed"], "run_id", "are the same experiment with the same seed")
    return named


def _require_one(runs: pd.DataFrame, same: list[str], column: str, what: str) -> None:
    """Refuse to put runs together that differ in something which their configuration does not say.

    Args:
        runs: With run_id.
        same: Columns by which runs belong together.
        column: What must be one thing in all of those.
        what: Two runs that break this, in words.
    """
    for _, group in runs.groupby(same, sort=False):
        one_each = group.assign(**{column: group[column].astype(str)}).drop_duplicates(column)
        if len(one_each) > 1:
            first, second = one_each.iloc[0], one_each.iloc[1]
            on = f" ({second['task']})" if "task" in same else ""
            raise ResultsError(
                f"{first['run_id']} and {second['run_id']} {what}{on}: move one of them away, or do it again"
            )


def _digests(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a run and task: the digest of the problems that it was scored on; None where it diverged."""
    rows = []
    for run in runs.to_dict("records"):
        finished = run["state"] == "finished"
        scored = json.loads(run["data"]) if finished else dict.fromkeys(json.loads(run["evaluate_on"]))
        same = {key: run[key] for key in ("run_id", "experiment", "alike", "seed")}
        rows += [same | {"task": task, "digest": digest} for task, digest in scored.items() if task != "train"]
    return pd.DataFrame(rows, columns=["run_id", "experiment", "alike", "seed", "task", "digest"])


def scores(suites: Suites) -> pd.DataFrame:
    """Every experiment's scores over all its seeds.

    Returns:
        A row an experiment, task and metric, and where its runs have several tasks their plain mean as a further task,
        ``average``, of the metrics in per cent: suite, task, model, method, label, setting, experiment, alike, metric,
        value, low, high (95%), n, seeds, diverged (further seeds that training did not survive; where none did, a row
        of NaN), trainable_params, scale, base (how the base's weights are kept), and the
        configuration's learning_rate, num_blocks.
    """
    named = experiments(suites).merge(suites.configs, on="run_id")
    setting = suites.rows.drop_duplicates("run_id").set_index("run_id")["setting"]
    bases = [_base(*pair) for pair in zip(named["quantise"], named["dtype"], strict=True)]
    about = named.assign(setting=named["run_id"].map(setting), base=bases)
    # A finished run knows more of itself than one that diverged.
    about = about.sort_values("state", ascending=False, kind="stable").drop_duplicates("experiment")
    kept = ["suite", "model", "method", "label", "setting", "alike", "scale", "trainable_params"]
    kept += ["learning_rate", "num_blocks", "base"]
    known = about.set_index("experiment")[kept].to_dict("index")
    diverged = named[named["state"] == "diverged"]["experiment"].value_counts()
    rows = []
    outcomes = suites.outcomes.merge(named[["run_id", "experiment"]], on="run_id")
    for (experiment, task), items in outcomes.groupby(["experiment", "task"], sort=False):
        same = {"experiment": experiment, "task": task, "diverged": diverged.get(experiment, 0)} | known[experiment]
        rows += [same | {"metric": metric} | _interval(score(items, metric)) for metric in metrics_of(items)]
    lists = named[named["state"] == "finished"].groupby("experiment")["evaluate_on"].agg(["first", "nunique"])
    for experiment, tasks in lists.loc[lists["nunique"] == 1, "first"].map(json.loads).items():
        same = {"experiment": experiment, "task": AVERAGE, "diverged": diverged.get(experiment, 0)} | known[experiment]
        for metric, found in _averages(outcomes[outcomes["experiment"] == experiment], tasks):
            rows.append(same | {"metric": metric} | _interval(found))
    nothing = dict.fromkeys(("value", "low", "high"), float("nan")) | {"metric": "loss_per_token", "n": 0, "seeds": 0}
    for experiment in diverged.index.difference(pd.Index(outcomes["experiment"])):
        for task in json.loads(about.set_index("experiment").loc[experiment, "evaluate_on"]):
            same = {"experiment": experiment, "task": task, "diverged": diverged[experiment]} | known[experiment]
            rows.append(same | nothing)
    return pd.DataFrame(rows)


def _averages(items: pd.DataFrame, tasks: list[str]) -> Iterator[tuple[str, Estimate]]:
    """Means over several tasks, of the metrics in per cent that all of them have."""
    parts = [items[items["task"] == task] for task in tasks]
    if len(parts) > 1:
        first, *others = (metrics_of(part) for part in parts)
        for metric in first:
            if metric != "loss_per_token" and all(metric in other for other in others):
                yield metric, mean_score(parts, metric)


def _interval(found: Estimate) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("value", "low", "high", "n", "seeds")}


def costs(suites: Suites) -> pd.DataFrame:
    """What training cost in the suite that measures it.

    Returns:
        A row an experiment of the suite ``efficiency`` that finished, by its number: seconds_per_step, the mean over
        seeds; peak_memory_mib, the largest (NaN on a CPU, where none is measured); minutes_per_epoch, of as many steps
        as the published number of training examples takes.
    """
    runs = experiments(suites).merge(suites.configs, on="run_id")
    runs = runs[(runs["suite"] == "efficiency") & (runs["state"] == "finished")]
    runs = runs.assign(seconds_per_step=runs["train_seconds"] / runs["steps_done"])
    steps = runs["train_on"].map(EPOCHS) / runs["batch_size"]
    runs = runs.assign(minutes_per_epoch=runs["seconds_per_step"] * steps / 60)
    of_each = {"seconds_per_step": "mean", "peak_memory_mib": "max", "minutes_per_epoch": "mean"}
    return runs.groupby("experiment").agg(of_each)


def _base(quantise: object, dtype: str) -> str:
    """The base of a configuration in words, from the JSON of its key ``quantise``."""
    if not isinstance(quantise, str):
        return dtype
    found = json.loads(quantise)
    groups = f", groups of {found['group_size']}" if found.get("group_size") else ""
    return f"{found['bits']} bits, {found['method']}{groups}"


def differences(suites: Suites) -> pd.DataFrame:
    """Every experiment's scores minus DiaBlo's, over the problems and seeds that both have.

    DiaBlo's is the one experiment with it that is alike in all but the method; of several (other N, other learning
    rates) the one in the suite that is named after the task. The untouched model is the same for every seed.

    Returns:
        A row a pair, task and metric: experiment, reference, task, metric, value, low, high (95%), n, seeds.

    Raises:
        ResultsError: If two of one seed were not trained on the same examples or scored on the same problems.
    """
    named = experiments(suites)
    outcomes = suites.outcomes.merge(named, on="run_id")
    about = named.merge(suites.configs, on="run_id").drop_duplicates("experiment").set_index("experiment")
    untouched = set(about.index[about["method"] == "none"])
    rows = []
    for (_, task), group in outcomes.groupby(["alike", "task"], sort=False):
        reference = _reference(about.loc[group["experiment"].unique()], str(task))
        if reference is None:
            continue
        second = group[group["experiment"] == reference]
        for experiment, first in group.groupby("experiment", sort=False):
            if experiment in untouched and len(set(first["seed"])) == 1:
                first = pd.concat([first.assign(seed=seed) for seed in second["seed"].unique()])
            if experiment != reference and set(first["seed"]) & set(second["seed"]):
                _require_same_training(suites.configs, first, second)
                pair = {"experiment": experiment, "reference": reference, "task": task}
                rows += [pair | found for found in _paired(first, second)]
    columns = ["experiment", "reference", "task", "metric", "value", "low", "high", "n", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def _reference(group: pd.DataFrame, task: str) -> Any:
    candidates = group[group["method"] == REFERENCE]
    if len(candidates) > 1:
        candidates = candidates[candidates["suite"] == task]
    return candidates.index[0] if len(candidates) == 1 else None


def _require_same_training(configs: pd.DataFrame, first: pd.DataFrame, second: pd.DataFrame) -> None:
    data = configs[configs["method"] != "none"].set_index("run_id")["train_data"]
    one, two = (
        side.drop_duplicates("seed").set_index("seed")["run_id"].map(data).dropna() for side in (first, second)
    )
    for seed in one.index.intersection(two.index):
        if one[seed] != two[seed]:
            labels = f"{first['label'].iloc[0]} and {second['label'].iloc[0]}"
            raise ResultsError(f"{labels} of seed {seed} were not trained on the same examples: they do not compare")


def _paired(first: pd.DataFrame, second: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for metric in metrics_of(first):
        found = paired_difference(first, second, metric)
        yield {"metric": metric, "value": found.value, "low": found.low, "high": found.high} | {
            "n": found.n,
            "seeds": found.seeds,
        }
