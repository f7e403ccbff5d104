"""What the saved results say, in plain sentences: every number in them is computed from the data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from diablo_theory.reporting.results import ResultsData
from diablo_theory.reporting.tables import Tables, interval, task_name


@dataclass(frozen=True)
class Finding:
    """One sentence of the summary.

    Attributes:
        topic: What it is about, in a word or two.
        text: The sentence.
        alarm: Whether it reports a failure or something unfinished.
    """

    topic: str
    text: str
    alarm: bool = False


def findings(data: ResultsData, tables: Tables) -> list[Finding]:
    """Sum up a results folder.

    Args:
        data: What :func:`diablo_theory.reporting.results.collect` read.
        tables: What :func:`diablo_theory.reporting.tables.build` made of it.

    Returns:
        Sentences: scale, theory, scores before and after, differences, costs, and what is unfinished.
    """
    found = [_scale(data), *_unfinished(data), *_theory(tables.verdicts), *_map(data.gap_map)]
    for task in tables.results["task"].unique() if not tables.results.empty else []:
        found.append(_scores(tables.results[tables.results["task"] == task], task_name(task)))
        if not tables.differences.empty:
            found += _differences(tables.differences[tables.differences["task"] == task], task_name(task))
    return [*found, *_costs(tables.costs)]


def _scale(data: ResultsData) -> Finding:
    model = data.manifest.get("model", {}).get("name", "an unnamed model")
    profile = data.manifest.get("profile", "unknown")
    if data.manifest.get("scale", "small") == "small":
        says = "Its scores say how the methods compare here; they are"
        if profile == "quick":
            says = (
                "Its few steps, at learning rates chosen for more, show that all parts work, not how methods compare; "
                "its scores are"
            )
        whose = "not comparable to the paper's numbers, which are for 7B models and larger."
        return Finding("Scale", f"A small-scale run (profile {profile}) of {model}. {says} {whose}")
    return Finding("Scale", f"A full-scale run (profile {profile}) of {model}.")


def _unfinished(data: ResultsData) -> list[Finding]:
    found = []
    if not data.manifest.get("finished"):
        found.append(
            "The run has not finished, so parts of this report are missing. `diablo-theory reproduce` resumes it."
        )
    if data.unfinished:
        found.append(f"Unfinished and left out: {', '.join(data.unfinished)}.")
    return [Finding("Unfinished", text, alarm=True) for text in found]


def _theory(verdicts: pd.DataFrame) -> list[Finding]:
    if verdicts.empty:
        return []
    claims, controls = (verdicts.loc[verdicts["role"] == role, "total"].sum() for role in ("claim", "control"))
    missed = verdicts[verdicts["passed"] < verdicts["total"]]
    total, checks = verdicts["total"].sum(), verdicts["check"].nunique()
    made = (
        f"{claims} trials of the claims, which must hold, and {controls} controls with the premise broken, where the "
        "claim must fail"
    )
    if missed.empty:
        return [Finding("Theory", f"All {total} verdicts of {checks} checks came out as predicted: {made}.")]
    wrong = (missed["total"] - missed["passed"]).sum()
    lines = missed.to_dict("records")
    where = ", ".join(f"{r['check']} ({r['role']}: {r['total'] - r['passed']} of {r['total']})" for r in lines)
    return [
        Finding("Theory", f"{wrong} of {total} verdicts did not come out as predicted: {where}. ({made}.)", alarm=True)
    ]


def _map(gap_map: pd.DataFrame) -> list[Finding]:
    if gap_map.empty:
        return []
    points = gap_map[(gap_map["rank_x"] > 0) & (gap_map["lora_rank"] > 0)]  # equal parameters need a LoRA to compare
    if points.empty:
        return []
    inside = points[points["in_theorem"].astype(bool)]
    ahead = (points["lora_gap"] - points["diablo_gap"] > 0.01).sum()
    behind = (points["diablo_gap"] - points["lora_gap"] > 0.01).sum()
    text = (
        f"On the map of the linear problem, at equal parameters, DiaBlo misses less of what full fine-tuning captures "
        f"at {ahead} of {len(points)} points, LoRA at {behind}; {len(points) - ahead - behind} are within 1%."
    )
    if len(inside):
        text += f" Inside the theorem's region DiaBlo misses at most {100 * inside['diablo_gap'].max():.2g}%, and so "
        text += f"does LoRA with its A frozen at random ({100 * inside['frozen_gap'].max():.2g}%)."
    return [Finding("Map", text)]


def _scores(results: pd.DataFrame, task: str) -> Finding:
    written = {
        row["label"]: interval(row["exact_match"], row["exact_match_low"], row["exact_match_high"], unit="%")
        for row in results.to_dict("records")
    }
    before = results.loc[results["method"] == "none", "label"]
    after = [f"{label} {score}" for label, score in written.items() if label not in set(before)]
    meaning, n = results["exact_means"].iloc[0], results["n"].iloc[0]
    text = f"Exact match ({meaning}) on {n} unseen problems, with 95% intervals: "
    if len(before):
        text += f"{written[before.iloc[0]]} before training"
        text += "; after training, " if after else "."
    return Finding(task, text + (", ".join(after) + "." if after else ""))


def _differences(differences: pd.DataFrame, task: str) -> list[Finding]:
    found = []
    for (first, second), same in differences.groupby(["first", "second"], sort=False):
        parts = [_difference(row) for row in same.to_dict("records") if pd.notna(row["difference"])]
        found.append(Finding(task, f"{first} against {second}: {'; '.join(parts)}."))
    return found


def _difference(row: dict[Hashable, Any]) -> str:
    exact = row["metric"] == "exact_match"
    what, unit, digits = ("exact match", " points", 1) if exact else ("held-out loss", " nats per token", 4)
    ends = (row["difference"], row["difference_low"], row["difference_high"])
    size = interval(*ends, digits, unit=unit, sign=True)
    if not row["seen"]:
        return f"{what}, no difference seen, {size}"
    better = (row["difference"] > 0) == exact
    side = "higher" if row["difference"] > 0 else "lower"
    return f"{what} {side} ({'better' if better else 'worse'}), {size}"


def _costs(costs: pd.DataFrame) -> list[Finding]:
    found = []
    for row in costs.to_dict("records"):
        if row["method"] == "full" or pd.isna(row["step_ratio"]):
            continue
        ratio = interval(row["step_ratio"], row["step_ratio_low"], row["step_ratio_high"], 2)
        trained = f", training {row['trainable_pct']:.3g}% of the parameters" if pd.notna(row["trainable_pct"]) else ""
        found.append(Finding("Cost", f"A {row['label']} step took {ratio} times as long as a full one{trained}."))
    return found
