"""The report's tables: numeric frames to compute with, and the same in words to read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory.files import write_text, write_with
from diablo_theory.reporting.intervals import Estimate, paired_difference, score, time_ratio
from diablo_theory.reporting.results import ResultsData, by_method, full_label

COMPARED = ("diablo", "lora", "full")  # differences are written earlier - later
TASK_NAMES = {
    "boolq": "BoolQ",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "gsm8k": "GSM8K",
    "gsm8k_metamath": "GSM8K",
    "gsm8k_math10k": "GSM8K",
    "math": "MATH",
    "piqa": "PIQA",
    "social_i_qa": "SIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "openbookqa": "OBQA",
    "svamp": "SVAMP",
    "mawps": "MAWPS",
    "aqua": "AQuA",
    "humaneval": "HumanEval",
    "hex_phi": "HEx-PHI",
    "hexphi": "HEx-PHI",
    "wikitext2": "WikiText2",
    "c4": "C4",
}


@dataclass(frozen=True)
class Tables:
    """Every table of the report, as numbers; :func:`readable` turns one into words.

    Attributes:
        verdicts: A line per check, statement and role.
        results: A line per task and method.
        differences: A line per task, pair of methods and metric.
        costs: A line per method.
        learning_rates: A line per task, method and learning rate.
    """

    verdicts: pd.DataFrame
    results: pd.DataFrame
    differences: pd.DataFrame
    costs: pd.DataFrame
    learning_rates: pd.DataFrame


def build(data: ResultsData) -> Tables:
    """Compute every table from a results folder."""
    return Tables(_verdicts(data), _results(data), _differences(data), _costs(data), _learning_rates(data))


def task_name(task: str) -> str:
    """A task's name as a reader would write it."""
    return TASK_NAMES.get(task, task.replace("_", " ").capitalize())


def interval(value: Any, low: Any, high: Any, digits: int = 1, *, unit: str = "", sign: bool = False) -> str:
    """Write ``value unit (low to high)``, or an em dash if it was not measured."""
    if pd.isna(value):
        return "—"
    spec = f"{'+' if sign else ''}.{digits}f"
    text = f"{value:{spec}}{unit}"
    return (text if pd.isna(low) else f"{text} ({low:{spec}} to {high:{spec}})").replace("-", "−")


def readable(tables: Tables) -> dict[str, pd.DataFrame]:
    """Write each table that has lines in words, rounded, with its units in the headings."""
    made = {
        "verdicts": _readable_verdicts(tables.verdicts),
        "results": _readable_results(tables.results),
        "differences": _readable_differences(tables.differences),
        "costs": _readable_costs(tables.costs),
        "learning_rates": _readable_rates(tables.learning_rates),
    }
    return {name: frame for name, frame in made.items() if not frame.empty}


def write_tables(tables: Tables, folder: Path) -> list[Path]:
    """Write each table that has lines as ``<name>.csv`` (numbers) and, in words, as :func:`write_words` does.

    Args:
        tables: What :func:`build` returned.
        folder: Where the files go; it is made if need be.

    Returns:
        The files written.
    """
    words = readable(tables)
    written = []
    for name in (f.name for f in fields(tables)):
        if name in words:
            frame: pd.DataFrame = getattr(tables, name)
            write_with(folder / f"{name}.csv", partial(frame.to_csv, index=False))
            written += [folder / f"{name}.csv", *write_words(words[name], folder, name)]
    return written


def write_all(frame: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write a table of words as CSV, too; arguments and files are otherwise those of :func:`write_words`."""
    write_with(folder / f"{name}.csv", partial(frame.to_csv, index=False))
    return [folder / f"{name}.csv", *write_words(frame, folder, name)]


def write_words(frame: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write a table of words as Markdown, LaTeX (booktabs) and HTML.

    Args:
        frame: Words alone.
        folder: Where the files go; it is made if need be.
        name: Of the files, without suffix.

    Returns:
        The files written.
    """
    contents = {".md": markdown(frame), ".tex": latex(frame), ".html": html(frame)}
    for suffix, content in contents.items():
        write_text(folder / f"{name}{suffix}", content)
    return [folder / f"{name}{suffix}" for suffix in contents]


#: Signs of the longest cell that is kept on one line in LaTeX.
_SHORT = 40
#: Signs that LaTeX's text fonts lack.
_IN_LATEX = str.maketrans(
    {"<": "$<$", ">": "$>$", "|": "$|$", "−": "$-$", "±": "$\\pm$", "→": "$\\to$", "—": "---", "`": ""}
)


def latex(frame: pd.DataFrame) -> str:
    """A frame of words as a LaTeX table with booktabs' rules; signs that text fonts lack are written out."""
    columns = _latex_columns([max([len(str(name)), *frame[name].astype(str).str.len()]) for name in frame.columns])
    escaped = frame.style.hide(axis="index").format(escape="latex").format_index(axis="columns", escape="latex")
    text = str(escaped.to_latex(hrules=True, column_format=columns))
    return text.translate(_IN_LATEX)


def _latex_columns(longest: list[int]) -> str:
    """Columns that break their lines where they are long, all together no wider than a page.

    Args:
        longest: Signs of each column's longest cell.
    """
    left = max(0.3, 0.95 - 0.012 * sum(length for length in longest if length <= _SHORT))
    wanted = [min(0.4, length / 200) for length in longest if length > _SHORT]
    scale = min(1.0, left / sum(wanted)) if wanted else 1.0
    # Rounded down, so that they fit.
    shares = (int(100 * scale * share) / 100 for share in wanted)
    return "".join(f"p{{{next(shares):.2f}\\linewidth}}" if length > _SHORT else "l" for length in longest)


def html(frame: pd.DataFrame) -> str:
    """A frame of words as an HTML table."""
    return str(frame.to_html(index=False, border=0, justify="left")) + "\n"


def markdown(frame: pd.DataFrame) -> str:
    """A frame of words as a Markdown table."""
    escaped = frame.map(lambda cell: str(cell).replace("|", "\\|"))
    return escaped.to_markdown(index=False, disable_numparse=True) + "\n"


def _verdicts(data: ResultsData) -> pd.DataFrame:
    if data.verdicts.empty:
        return pd.DataFrame()
    lines = []
    for (check, statement, role), same in data.verdicts.groupby(["check", "statement", "role"], sort=False):
        margins = same["claim_margin"]
        worst = margins.min() if role == "claim" else margins.max()  # a control should miss the claim
        lines.append(
            {
                "check": check,
                "role": role,
                "statement": statement,
                "passed": int(same["passed"].sum()),
                "total": len(same),
                "worst_claim_margin": worst,
                "worst_premise_margin": same["premise_margin"].min()
                if role == "claim"
                else same["premise_margin"].max(),
                "tolerance": same["tolerance"].max(),
            }
        )
    return pd.DataFrame(lines)


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _results(data: ResultsData) -> pd.DataFrame:
    lines = []
    for task, runs in data.runs.groupby("task"):
        for label, method in by_method(runs):
            same = runs[runs["label"] == label]
            items = data.items[(data.items["task"] == task) & (data.items["label"] == label)]
            exact = score(items, "exact_match")
            lines.append(
                {"task": task, "label": label, "method": method, "seeds": exact.seeds, "n": exact.n}
                | {"clusters": items["cluster"].nunique(), "exact_means": same["exact_means"].iloc[0]}
                | _spread("exact_match", exact)
                | _spread("lenient_match", score(items, "lenient_match"))
                | _spread("loss_per_token", score(items, "loss_per_token"))
                | {
                    name: same[name].iloc[0]
                    for name in ("trainable_params", "trainable_pct", "learning_rate", "steps")
                }
                | {"train_seconds": same["train_seconds"].mean()}
            )
    return pd.DataFrame(lines)


def _differences(data: ResultsData) -> pd.DataFrame:
    lines = []
    for task, runs in data.runs.groupby("task"):
        items = dict(list(data.items[data.items["task"] == task].groupby("label")))
        compared = [pair for pair in by_method(runs) if pair[1] in COMPARED]
        compared.sort(key=lambda pair: COMPARED.index(pair[1]))
        for (first, kind1), (second, kind2) in combinations(compared, 2):
            if kind1 == kind2 or not set(items[first]["seed"]) & set(items[second]["seed"]):
                continue
            for metric in ("exact_match", "loss_per_token"):
                found = paired_difference(items[first], items[second], metric)
                line = {"task": task, "first": first, "second": second, "metric": metric, "n": found.n}
                verdict = {"seeds": found.seeds, "seen": not found.contains_zero}
                lines.append(line | verdict | _spread("difference", found))
    return pd.DataFrame(lines)


def _costs(data: ResultsData) -> pd.DataFrame:
    trained = data.runs[data.runs["method"] != "none"]
    methods = dict(by_method(trained))
    for frame in (data.step_times, data.memory):
        if not frame.empty:
            methods |= {label: methods.get(label, "") for label in frame["method"]}
    lines = []
    for label, method in methods.items():
        same = trained[trained["label"] == label]
        line: dict[str, Any] = {"label": label, "method": method}
        line |= {name: same[name].iloc[0] if len(same) else None for name in ("trainable_params", "trainable_pct")}
        empty = Estimate(float("nan"), float("nan"), float("nan"), float("nan"), 0)
        ratio = empty if data.step_times.empty else time_ratio(data.step_times, label, full_label(data))
        line |= _spread("step_ratio", ratio)
        memory = data.memory[data.memory["method"] == label] if not data.memory.empty else data.memory
        line |= {name: memory[name].iloc[0] if len(memory) else None for name in ("static_mib", "step_peak_mib")}
        lines.append(line)
    numeric = ["trainable_params", "trainable_pct", "static_mib", "step_peak_mib"]
    if not lines:
        return pd.DataFrame()
    frame = pd.DataFrame(lines).astype(dict.fromkeys(numeric, float))
    return frame.assign(peak_mib=frame["static_mib"] + frame["step_peak_mib"])


def _learning_rates(data: ResultsData) -> pd.DataFrame:
    if data.learning_rates.empty:
        return pd.DataFrame()
    grouped = data.learning_rates.groupby(["task", "label", "method", "learning_rate"], as_index=False)
    means = dict.fromkeys(("valid_loss", "loss_low", "loss_high", "exact"), "mean")
    return grouped.agg(means | {"chosen": "max", "seed": "nunique"})


def _readable_verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        return frame
    return pd.DataFrame(
        {
            "Check": frame["check"],
            "Role": frame["role"],
            "Statement": frame["statement"],
            "Passed": [f"{p} of {t}" for p, t in zip(frame["passed"], frame["total"], strict=True)],
            "Worst claim margin, decades": frame["worst_claim_margin"].map(_short),
            "Worst premise margin": frame["worst_premise_margin"].map(_short),
            "Tolerance": frame["tolerance"].map(_short),
        }
    )


def _readable_results(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        return frame
    table = pd.DataFrame({"Task": frame["task"].map(task_name), "Method": frame["label"]})
    table["Exact match, %"] = _intervals(frame, "exact_match")
    if frame["lenient_match"].notna().any():
        table["Last number right, %"] = _intervals(frame, "lenient_match")
    table["Held-out loss, nats/token"] = _intervals(frame, "loss_per_token", 4)
    table["Trainable parameters"] = [
        f"{int(p):,} ({q:.3g}%)" for p, q in zip(frame["trainable_params"], frame["trainable_pct"], strict=True)
    ]
    table["Learning rate"] = frame["learning_rate"].map(_short)
    table["Steps"] = frame["steps"].map(lambda steps: "—" if pd.isna(steps) else f"{int(steps)}")
    table["Problems"] = [f"{n} ({c} clusters)" for n, c in zip(frame["n"], frame["clusters"], strict=True)]
    table["Seeds"] = frame["seeds"].map(str)
    return table


def _readable_differences(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        return frame
    lines = []
    for row in frame.to_dict("records"):
        exact = row["metric"] == "exact_match"
        written = interval(
            row["difference"], row["difference_low"], row["difference_high"], 1 if exact else 4, sign=True
        )
        higher = f"{row['first']} {'higher' if row['difference'] > 0 else 'lower'}"
        lines.append(
            {
                "Task": task_name(row["task"]),
                "Difference": f"{row['first']} − {row['second']}",
                "In": "exact match, points" if exact else "held-out loss, nats/token",
                "Value (95% interval)": written,
                "Reading": higher if row["seen"] else "no difference seen",
                "Problems": str(row["n"]),
                "Seeds": str(row["seeds"]),
            }
        )
    return pd.DataFrame(lines)


def _readable_costs(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        return frame
    return pd.DataFrame(
        {
            "Method": frame["label"],
            "Trainable parameters": frame["trainable_params"].map(whole),
            "Share, %": frame["trainable_pct"].map(_short),
            "Step time / full": _intervals(frame, "step_ratio", 2),
            "Memory at rest, MiB": frame["static_mib"].map(whole),
            "Added by a step, MiB": frame["step_peak_mib"].map(whole),
            "Peak, MiB": frame["peak_mib"].map(whole),
        }
    )


def _readable_rates(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        return frame
    table = pd.DataFrame({"Task": frame["task"].map(task_name), "Method": frame["label"]})
    table["Learning rate"] = frame["learning_rate"].map(_short)
    losses = zip(frame["valid_loss"], frame["loss_low"], frame["loss_high"], strict=True)
    table["Validation loss, nats/token"] = [interval(*numbers, 4) for numbers in losses]
    table["Exact match, %"] = frame["exact"].map(lambda share: interval(100 * share, float("nan"), float("nan")))
    table["Seeds"] = frame["seed"].map(str)
    table["Chosen"] = frame["chosen"].map(lambda chosen: "yes" if chosen else "")
    return table


def _intervals(frame: pd.DataFrame, name: str, digits: int = 1) -> list[str]:
    numbers = zip(frame[name], frame[f"{name}_low"], frame[f"{name}_high"], strict=True)
    return [interval(*triple, digits) for triple in numbers]


def _short(value: float) -> str:
    return "—" if pd.isna(value) else f"{value:.3g}".replace("-", "−")


def whole(value: float) -> str:
    """Write a number without its decimals, or an em dash if it was not measured."""
    return "—" if pd.isna(value) else f"{value:,.0f}"
