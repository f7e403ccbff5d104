"""Tables of collected suites: which experiments stand beside each other, as numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from diablo_theory.reporting.comparisons import costs, differences, scores
from diablo_theory.reporting.published import AVERAGE
from diablo_theory.reporting.suites import Suites
from diablo_theory.reporting.tables import interval, markdown, task_name, whole

#: Metrics of a table and of its differences, each with heading and digits.
SHOWN = {
    "exact_match": ("Exact match, %", 1),
    "likelihood": ("By likelihood, %", 1),
    "pass@1": ("pass@1, %", 1),
    "pass@5": ("pass@5, %", 1),
    "pass@10": ("pass@10, %", 1),
    "safe": ("Safe, %", 1),
    "safe_response": ("Safe by the response alone, %", 1),
    "loss_per_token": ("Held-out loss, nats/token", 4),
}
LESS = {
    "exact_match": ("Exact match minus DiaBlo's, points", 1),
    "pass@1": ("pass@1 minus DiaBlo's, points", 1),
    "safe": ("Safe minus DiaBlo's, points", 1),
    "loss_per_token": ("Loss minus DiaBlo's, nats/token", 4),
}
#: What training cost, where a suite measures it: heading, digits.
COSTS = {
    "seconds_per_step": ("Seconds a step", 3),
    "minutes_per_epoch": ("Minutes an epoch", 0),
    "peak_memory_mib": ("Peak memory, MiB", 0),
}
#: What every number of these tables is.
NOTE = (
    "Means over seeds; in parentheses 95% intervals over problems and seeds (of one seed: over problems alone), cut "
    "off where a quantity ends. Differences are to DiaBlo on the same base, paired over the problems and seeds that "
    "both have."
)


@dataclass(frozen=True)
class Section:
    """A table: whole suites, and beside them methods from the suite that is named after the task.

    Attributes:
        title: What is compared.
        suites: Suites that the table holds; none: those named after their tasks.
        beside: Methods of the task's own suite that stand first.
    """

    title: str
    suites: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


SECTIONS = {
    "methods": Section("Methods at equal numbers of trainable parameters"),
    "blocks": Section("Number of blocks", ("blocks",), ("diablo",)),
    "patterns": Section("Sparsity patterns at equal counts", ("patterns",), ("diablo",)),
    "bases": Section("Quantised bases", ("quantised",), ("diablo", "lora")),
    "learning_rates": Section("Learning rates", ("learning_rate",), ("diablo", "lora")),
}


def build_sections(suites: Suites) -> dict[str, pd.DataFrame]:
    """The experiments of every section that has some, as numbers; suites of no section are one each.

    Returns:
        For each section a frame, a row an experiment and task: what :func:`~.comparisons.scores` says of the
        experiment; value, low, high of each metric as ``exact_match``, ``exact_match_low``, ...; and of the difference
        to DiaBlo as ``exact_match_less``, ``exact_match_less_low``, ...
    """
    suites = of_tests(suites)
    if suites.configs.empty:
        return {}
    less = differences(suites).drop(columns=["reference", "n", "seeds"])
    wide = _wide(scores(suites), "").join(_wide(less, "_less")).reset_index()
    if (wide["suite"] == "efficiency").any():
        wide = wide.join(costs(suites), on="experiment")
    own = wide["suite"] == wide["task"]
    found = {}
    for name, section in SECTIONS.items():
        inside = wide["suite"].isin(section.suites) if section.suites else own
        chosen = pd.concat([wide[own & wide["method"].isin(section.beside)], wide[inside]])
        # What stands beside is shown for the tasks that the suites have.
        chosen = chosen[chosen["task"].isin(wide.loc[inside, "task"])]
        if inside.any():
            found[name] = _ordered(chosen.drop_duplicates(["experiment", "task"]))
    named = {suite for section in SECTIONS.values() for suite in section.suites}
    for suite, frame in wide[~own & ~wide["suite"].isin(named)].groupby("suite", sort=False):
        found[str(suite)] = _ordered(frame)
    return found


def title(name: str) -> str:
    """What a section compares."""
    return SECTIONS[name].title if name in SECTIONS else task_name(name)


def of_tests(suites: Suites) -> Suites:
    """Without runs that were scored on validation problems, which chose something and measure nothing."""
    configs = suites.configs[suites.configs["eval_split"] == "test"]
    rows, outcomes = (frame[frame["run_id"].isin(configs["run_id"])] for frame in (suites.rows, suites.outcomes))
    return replace(suites, rows=rows, configs=configs, outcomes=outcomes)


def _wide(long: pd.DataFrame, suffix: str) -> pd.DataFrame:
    """A row an experiment and task: the metrics side by side, and what is the same for all of them."""
    key = ["experiment", "task"]
    # Unlike pivot_table it refuses two values for one place.
    numbers = long.pivot(index=key, columns="metric", values=["value", "low", "high"])  # noqa: PD010
    ends = {"value": "", "low": "_low", "high": "_high"}
    numbers.columns = numbers.columns.map(lambda pair: f"{pair[1]}{suffix}{ends[pair[0]]}")
    same = long.drop(columns=["metric", "value", "low", "high"]).drop_duplicates(key).set_index(key)
    return same.join(numbers)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Models and tasks in order of appearance, averages last.

    Within each the untouched model, full fine-tuning, DiaBlo, LoRA, the others.
    """
    first = {"none": 0, "full": 1, "diablo": 2, "lora": 3}
    tasks = {task: place for place, task in enumerate(dict.fromkeys(frame["task"]))}
    tasks |= {AVERAGE: len(tasks)} if AVERAGE in tasks else {}
    order = frame.assign(
        _model=frame["model"].map({model: place for place, model in enumerate(dict.fromkeys(frame["model"]))}),
        _task=frame["task"].map(tasks),
        _base=frame["base"] != frame["base"].iloc[0],
        _method=frame["method"].map(lambda method: first.get(method, 4)),
    )
    own = ["_model", "_task", "_base", "_method"]
    order = order.sort_values([*own, "method", "num_blocks", "learning_rate"], kind="stable")
    return order.drop(columns=own).reset_index(drop=True)


def readable_section(frame: pd.DataFrame) -> pd.DataFrame:
    """A section in words.

    Args:
        frame: What :func:`build_sections` gave.
    """
    table = pd.DataFrame({"Task": frame["task"].map(task_name), "Method": frame["label"]})
    if len(set(frame["model"])) > 1:
        table.insert(0, "Model", frame["model"])
    if len(set(frame["base"])) > 1:
        table["Base"] = frame["base"]
    if len(set(frame["scale"])) > 1:
        table["Scale"] = frame["scale"]
    table["Trainable"] = frame["trainable_params"].map(whole)
    table["Learning rate"] = [
        "—" if method == "none" else f"{rate:.3g}"
        for method, rate in zip(frame["method"], frame["learning_rate"], strict=True)
    ]
    for metric, (heading, digits) in SHOWN.items():
        if metric in frame and frame[metric].notna().any():
            table[heading] = _intervals(frame, metric, digits)
    for metric, (heading, digits) in LESS.items():
        if f"{metric}_less" in frame and frame[f"{metric}_less"].notna().any():
            table[heading] = _intervals(frame, f"{metric}_less", digits, sign=True)
    for name, (heading, digits) in COSTS.items():
        if name in frame and frame[name].notna().any():
            table[heading] = [interval(value, None, None, digits) for value in frame[name]]
    table["Problems"] = frame["n"].map(str)
    table["Seeds"] = [
        f"{seeds} of {seeds + lost}, {'others' if seeds else 'all'} diverged" if lost else str(seeds)
        for seeds, lost in zip(frame["seeds"], frame["diverged"], strict=True)
    ]
    return table


def _intervals(frame: pd.DataFrame, name: str, digits: int, *, sign: bool = False) -> list[str]:
    numbers = zip(frame[name], frame[f"{name}_low"], frame[f"{name}_high"], strict=True)
    return [interval(*triple, digits, sign=sign) for triple in numbers]


def summary(suites: Suites) -> str:
    """How many runs these are, how long they trained, and where, in a sentence or two."""
    configs = suites.configs
    ended = configs["state"].value_counts()
    lost = f" and {ended['diverged']} that diverged" if "diverged" in ended else ""
    trained = configs["train_seconds"].sum() / 3600
    made = configs[configs["state"] == "finished"]
    scales = " and ".join(sorted(set(configs["scale"])))
    machines = set(zip(made["device"].astype(str), made["cpu"].astype(str), strict=True))
    where = ", ".join(f"{device} ({cpu})" for device, cpu in sorted(machines))
    dates = sorted(str(date) for date in made["date"].dropna())
    when = f" {dates[0]}" if dates and dates[0] == dates[-1] else f" {dates[0]} to {dates[-1]}" if dates else ""
    commits = ", ".join(sorted({str(commit)[:10] for commit in made["commit"]}))
    changed = " (with changes)" if made["dirty"].eq(True).any() else ""
    runs = f"{ended['finished']} runs{lost} at {scales} scale"
    return f"{runs}, {trained:.1f} h of training{when} on {where}; commit {commits}{changed}."


def readable_sections(suites: Suites) -> str:
    """All sections as Markdown: a title and a table each, and what they are made of."""
    parts = [f"**{title(name)}**\n\n{markdown(readable_section(s))}" for name, s in build_sections(suites).items()]
    note = NOTE if parts else "No run here was scored on test problems, so there is no table."
    return "\n".join([*parts, f"{note} {summary(suites)}\n"])
