"""Questions to collected runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.intervals import mean_ratio
from diablo_theory.reporting.questions.base import (
    Answer,
    Method,
    Metric,
    Outcome,
    Question,
    RunSuite,
    Task,
    method_name,
)
from diablo_theory.reporting.tables import interval, task_name

SUITES = "reproduced/suites"
Scale = Literal["small", "full"]
_KEPT = "paper_results/reproduced/suites"
_SWEEP = (
    f"`diablo-theory sweep experiments/sweeps/small_scale.yaml --collected {_KEPT} --out RUNS`, then "
    f"`diablo-theory collect RUNS {_KEPT} --out {_KEPT}` (minutes a run on two cores)"
)
_RUN = {"small": _SWEEP, "full": "`diablo-theory sweep` of the suite's run files, then `diablo-theory collect`"}
_SEEDS = {
    "small": f"{_SWEEP}, with more seeds in that file",
    "full": "`diablo-theory sweep` of the suite's run files with `--vary seed=...`, then `diablo-theory collect`",
}


class Compared(Question):
    """Whether DiaBlo is at least as good as other methods, by paired differences over problems and seeds.

    It matches where a whole interval lies within the margin. Otherwise it is ahead or behind where the interval leaves
    zero out, and where it does not, the question is open. One method behind on one task is enough for "does not hold".

    Attributes:
        methods: Which; none: all that were run.
        suites: Of which suites; none: those named after their tasks.
        tasks: Those on which every method is needed.
        seeds: How many of them a comparison needs.
        metric: By what.
        margin: Share of DiaBlo's own score.
        scale: Of which runs.
    """

    kind: Literal["compared"]
    methods: tuple[Method, ...] = ()
    suites: tuple[RunSuite, ...] = ()
    tasks: tuple[Task, ...] = Field(min_length=1)
    seeds: int = Field(default=3, ge=1)
    metric: Metric = "loss_per_token"
    margin: float = Field(gt=0, lt=1)
    scale: Scale = "small"

    @field_validator("methods")
    @classmethod
    def _trained(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "none" in value:
            raise ValueError("none is the untouched model, which is compared with nothing")
        return value

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.differences
        own = rows["suite"].isin(self.suites) if self.suites else rows["suite"] == rows["task"]
        rows = rows[own & (rows["metric"] == self.metric) & (rows["scale"] == self.scale)]
        rows = rows[(rows["experiment"] != rows["reference"]) & (rows["method"] != "none")]
        rows = rows[rows["task"].isin(self.tasks)]
        rows = rows[rows["method"].isin(self.methods)] if self.methods else rows
        figures = ("suites_settings" if self.suites else "suites_methods",)
        there = set(rows.loc[rows["seeds"] >= self.seeds, ["method", "task"]].itertuples(index=False, name=None))
        wanted = {(method, task) for method in self.methods or set(rows["method"]) for task in self.tasks}
        if missing := sorted(wanted - there) if wanted else [("any method", task) for task in self.tasks]:
            named = ", ".join(f"{method_name(method)} on {task_name(task)}" for method, task in missing)
            text = f"of {named} fewer than {self.seeds} seeds are collected"
            scale = _scale(self.scale, rows)
            return Answer(Outcome.OPEN, text, scale, SUITES, _RUN[self.scale], tables_of(rows["suite"]), figures)
        rows = rows[rows["seeds"] >= self.seeds]
        if len(set(rows["base"])) > 1:
            rows = rows.assign(label=rows["label"] + " (" + rows["base"] + ")")
        outcome, text = compared(rows, self.metric, self.margin)
        died, without = rows[rows["diverged"] > 0], rows[rows["diablo_diverged"] > 0]
        lost = [f"{label} on {task_name(task)}" for label, task in zip(died["label"], died["task"], strict=True)]
        lost += [f"DiaBlo on {task_name(task)}" for task in dict.fromkeys(without["task"])]
        if lost:
            text += f"; of {', '.join(lost)} some seeds diverged"
        return Answer(
            outcome, text, _scale(self.scale, rows), SUITES, _SEEDS[self.scale], tables_of(rows["suite"]), figures
        )


def _scale(scale: Scale, rows: pd.DataFrame) -> str:
    models = " and ".join(dict.fromkeys(rows["model"]))
    return f"{models}, {scale} scale" if models else f"{scale} scale"


def compared(rows: pd.DataFrame, metric: str, margin: float) -> tuple[Outcome, str]:
    """What differences to DiaBlo say, and the numbers in words.

    Args:
        rows: Others' scores minus DiaBlo's: label, task, value, low, high, diablo (its own score); must_lead where
            DiaBlo has to be ahead of the other, so that a match is no success.
        metric: Of which score.
        margin: Within which share of DiaBlo's score two are the same.
    """
    # Better is less, of a loss; of a share, more. What is told is DiaBlo's lead.
    loss = metric == "loss_per_token"
    unit = "nats/token" if loss else "points"
    sign = 1.0 if loss else -1.0
    ends = np.sort(sign * rows[["low", "high"]].to_numpy(float), axis=1)
    table = rows.assign(lead=sign * rows["value"], low=ends[:, 0], high=ends[:, 1])
    leads = table["must_lead"] if "must_lead" in table else pd.Series(data=False, index=table.index)
    same = table[["low", "high"]].abs().max(axis=1) <= margin * table["diablo"]
    same &= ~(leads & (table["low"] > 0))
    equal, others = table[same], table[~same]
    behind, ahead = others[others["high"] < 0], others[others["low"] > 0]
    wide = others.drop(index=[*behind.index, *ahead.index])
    short, level = equal[leads[equal.index]], equal[~leads[equal.index]]
    parts = [_told(behind, "behind", unit), _told(ahead, "ahead of", unit)]
    parts += [f"no more than level, within {margin:.0%}, with {_names(short)}" if len(short) else ""]
    parts += [f"within {margin:.0%} of {_names(level)}" if len(level) else ""]
    if len(wide):
        most = wide[["low", "high"]].abs().max(axis=1).max()
        parts += [f"not told from {_names(wide)}: intervals reach to {most:.2g} {unit}"]
    outcome = Outcome.FAILS if len(behind) or len(short) else Outcome.OPEN if len(wide) else Outcome.HOLDS
    return outcome, f"DiaBlo is {'; '.join(part for part in parts if part)}"


def _told(rows: pd.DataFrame, how: str, unit: str) -> str:
    told = []
    for row in rows.to_dict("records"):
        low, high = sorted((abs(row["low"]), abs(row["high"])))
        told.append(f"{how} {row['label']} on {task_name(row['task'])} by {interval(abs(row['lead']), low, high, 3)}")
    return f"{', '.join(told)} {unit}" if told else ""


def tables_of(suites: Iterable[str]) -> tuple[str, ...]:
    """Where the report shows suites of collected runs."""
    return tuple(f"suite-{suite}" for suite in dict.fromkeys(suites))


def _names(rows: pd.DataFrame) -> str:
    """``LoRA r=5 on BoolQ and ARC-Easy, DoRA r=5 on BoolQ``."""
    told = []
    for label, same in rows.groupby("label", sort=False):
        tasks = [task_name(task) for task in dict.fromkeys(same["task"])]
        told.append(f"{label} on {' and '.join([', '.join(tasks[:-1]), tasks[-1]] if tasks[:-1] else tasks)}")
    return ", ".join(told)


class GradientNorms(Question):
    """Whether the gradient's norm varies less over training with DiaBlo than with another method.

    By the standard deviation over the mean, of all steps after the warm-up of runs that finished, a norm's decline
    over training included; compared seed by seed on each task, between experiments that differ in the method alone.
    What decides is the 95% interval (Student's) of the ratio of the two, as a geometric mean over these pairs of runs.
    A run of DiaBlo that diverged answers "no".

    Attributes:
        over: The other method.
        after: Step of the last one that does not count.
        pairs: How many of them an answer needs.
        scale: Of which runs.
    """

    kind: Literal["gradient_norms"]
    over: Method
    after: int = Field(ge=0)
    pairs: int = Field(default=6, ge=2)
    scale: Scale = "small"

    @field_validator("over")
    @classmethod
    def _another(cls, value: str) -> str:
        if value == "diablo":
            raise ValueError("over is diablo itself")
        return value

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.training
        rows = rows[(rows["suite"] == rows["train_on"]) & (rows["scale"] == self.scale)]
        rows = rows[rows["method"].isin(["diablo", self.over])]
        lost = sorted(set(rows.loc[(rows["state"] == "diverged") & (rows["method"] == "diablo"), "run_id"]))
        same = ["train_on", "alike", "seed"]
        rows = rows[(rows["state"] == "finished") & (rows["step"] > self.after)]
        # Of several learning rates or sizes of one method none is the one to compare.
        rows = rows[rows.groupby([*same, "method"])["run_id"].transform("nunique") == 1]
        varies = rows.pivot_table(
            index=same, columns="method", values="grad_norm", aggfunc=lambda norms: norms.std() / norms.mean()
        )
        pairs = varies.reindex(columns=["diablo", self.over]).dropna()
        scale, figures = _scale(self.scale, rows), ("gradient_norms",)
        died = f"diverged: {', '.join(lost)}" if lost else "no run of DiaBlo's diverged"
        if len(pairs) < self.pairs:
            text = (
                f"{len(pairs)} pairs of runs of DiaBlo and {method_name(self.over)}; {self.pairs} are needed; {died}"
            )
            return Answer(Outcome.FAILS if lost else Outcome.OPEN, text, scale, SUITES, _RUN[self.scale])
        ratio = mean_ratio(pairs["diablo"], pairs[self.over])
        less = int((pairs["diablo"] < pairs[self.over]).sum())
        tasks = [
            f"{task_name(str(task))} {found['diablo'].mean():.2f} against {found[self.over].mean():.2f}"
            for task, found in pairs.groupby("train_on")
        ]
        text = (
            f"standard deviation over mean, DiaBlo against {method_name(self.over)}: {', '.join(tasks)}; the ratio is "
            f"{interval(ratio.value, ratio.low, ratio.high, 2)}, below 1 in {less} of {len(pairs)} pairs of runs; "
        )
        text += died
        outcome = Outcome.HOLDS if ratio.high < 1 else Outcome.FAILS if ratio.low > 1 else Outcome.OPEN
        tables = tables_of(pairs.index.get_level_values("train_on"))
        return Answer(Outcome.FAILS if lost else outcome, text, scale, SUITES, _SEEDS[self.scale], tables, figures)
