"""Questions that claims ask of saved results; each answer is computed, with its evidence in a sentence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.intervals import Estimate, time_ratio
from diablo_theory.reporting.parameters import READINGS, reading
from diablo_theory.reporting.published import AVERAGE, METHOD_NAMES, PUBLISHED_FIGURES
from diablo_theory.reporting.tables import interval, task_name


class Outcome(IntEnum):
    """What became of a claim, the worst first: several answers make the worst of theirs."""

    FAILS = 0
    OPEN = 1
    CONDITIONAL = 2
    HOLDS = 3

    @property
    def words(self) -> str:
        """As readers see it."""
        return {
            Outcome.FAILS: "does not hold here",
            Outcome.OPEN: "not decidable here",
            Outcome.CONDITIONAL: "holds under stated conditions",
            Outcome.HOLDS: "holds",
        }[self]


@dataclass(frozen=True)
class Answer:
    """What saved results say to a question.

    Attributes:
        outcome: Whether they bear the claim out.
        evidence: Numbers, in a sentence.
        scale: What they stand for: model, size, machine.
        source: File or folder below the repository that holds them.
        decides: For what stays open: the command, and the hardware, that would decide it.
        rows: Where the report shows these numbers: ids of rows and tables.
        figures: Stems of figures that show them.
    """

    outcome: Outcome
    evidence: str
    scale: str
    source: str
    decides: str = ""
    rows: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()


class Question(BaseModel):
    """A question, as claims.yaml writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def ask(self, evidence: Evidence) -> Answer:
        """Compute the answer.

        Raises:
            NotMadeError: If what it asks for was never made.
            ResultsError: If that is damaged.
        """


class Verdicts(Question):
    """Whether checks hold in every trial, and their controls fail in every trial."""

    kind: Literal["verdicts"]
    checks: tuple[str, ...] = Field(min_length=1)

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.verdicts[evidence.verdicts["check"].isin(self.checks)]
        if unknown := set(self.checks) - set(rows["check"]):
            raise NotMadeError(f"no verdict of the check(s) {', '.join(sorted(unknown))} is saved")
        told = []
        for role, what in _ROLES.items():
            passed = rows.loc[rows["role"] == role, "passed"]
            told.append(f"{passed.sum()} of {len(passed)} {what}")
        outcome = Outcome.HOLDS if rows["passed"].all() else Outcome.FAILS
        text = f"{', '.join(self.checks)}: {' and '.join(told)}"
        drawn = [figure for figure, checks in _CHECKS_DRAWN.items() if checks & set(self.checks)]
        return Answer(
            outcome,
            text,
            "random problems",
            "reproduced/theory/verdicts.csv",
            rows=tuple(f"check-{check}" for check in self.checks),
            figures=("verdicts", *drawn),
        )


#: Figures beside that of all verdicts which show what some checks are about.
_CHECKS_DRAWN = {"theory_map": {"L5", "L7"}, "convergence": {"D1", "D2"}}
_ROLES = {"claim": "trials hold", "control": "controls fail, as they must"}


class Compared(Question):
    """Whether DiaBlo is at least as good as other methods, by paired differences over problems and seeds.

    It is ahead or behind where an interval leaves zero out. It matches where a whole interval lies within the margin.
    Anything else leaves the question open.
    """

    kind: Literal["compared"]
    methods: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    metric: str = "loss_per_token"
    margin: float = Field(gt=0)
    scale: Literal["small", "full"] = "small"

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.differences
        own = rows["suite"].isin(self.suites) if self.suites else rows["suite"] == rows["task"]
        rows = rows[own & (rows["metric"] == self.metric) & (rows["scale"] == self.scale)]
        rows = rows[(rows["experiment"] != rows["reference"]) & (rows["method"] != "none")]
        rows = rows[rows["method"].isin(self.methods)] if self.methods else rows
        missing = ", ".join(sorted(set(self.methods) - set(rows["method"])))
        if missing or rows.empty:  # of nothing everything is true
            text = f"no such comparison{f' with {missing}' if missing else ''} is collected yet"
            return Answer(Outcome.OPEN, text, f"{self.scale} scale", SUITES, "`diablo-theory sweep`, then `collect`")
        # Better is less, of a loss; of a share, more. What is told is DiaBlo's lead.
        sign = 1.0 if self.metric == "loss_per_token" else -1.0
        ends = np.sort(sign * rows[["low", "high"]].to_numpy(float), axis=1)
        table = rows.assign(lead=sign * rows["value"], low=ends[:, 0], high=ends[:, 1])
        behind, ahead = table[table["high"] < 0], table[table["low"] > 0]
        open_ = table[(table["low"] <= 0) & (table["high"] >= 0)]
        equal = open_[open_[["low", "high"]].abs().max(axis=1) <= self.margin]
        outcome = (
            Outcome.FAILS if len(behind) else Outcome.HOLDS if len(ahead) + len(equal) == len(table) else Outcome.OPEN
        )
        wide = open_.drop(index=equal.index)
        parts = [self._told(behind, "behind"), self._told(ahead, "ahead of")]
        parts += [f"within {self.margin:g} of {_names(equal)}" if len(equal) else ""]
        if len(wide):
            most = wide[["low", "high"]].abs().max(axis=1).max()
            parts += [f"no difference seen to {_names(wide)}, within {most:.2g} {self._unit}"]
        text = f"DiaBlo is {'; '.join(part for part in parts if part)}"
        return Answer(
            outcome,
            text,
            f"{self.scale} scale",
            SUITES,
            "more seeds" if outcome == Outcome.OPEN else "",
            _tables(rows["suite"]),
            ("suites_settings" if self.suites else "suites_methods",),
        )

    @property
    def _unit(self) -> str:
        return "nats/token" if self.metric == "loss_per_token" else "points"

    def _told(self, rows: pd.DataFrame, how: str) -> str:
        told = []
        for row in rows.to_dict("records"):
            low, high = sorted((abs(row["low"]), abs(row["high"])))
            by = interval(abs(row["lead"]), low, high, 3)
            told.append(f"{how} {row['label']} on {task_name(row['task'])} by {by}")
        return f"{', '.join(told)} {self._unit}" if told else ""


SUITES = "reproduced/suites"


def _tables(suites: Iterable[str]) -> tuple[str, ...]:
    """Where the report shows suites of collected runs."""
    return tuple(f"suite-{suite}" for suite in dict.fromkeys(suites))


def _names(rows: pd.DataFrame) -> str:
    """``LoRA r=5 on BoolQ and ARC-Easy, DoRA r=5 on BoolQ``."""
    told = []
    for label, same in rows.groupby("label", sort=False):
        tasks = [task_name(task) for task in dict.fromkeys(same["task"])]
        told.append(f"{label} on {' and '.join([', '.join(tasks[:-1]), tasks[-1]] if tasks[:-1] else tasks)}")
    return ", ".join(told)


class StepRatio(Question):
    """Whether a whole training step of one method takes at most, or at least, so many times another's."""

    kind: Literal["step_ratio"]
    of: str
    over: str
    at_most: float | None = None
    at_least: float | None = None

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        times, contenders = evidence.steps
        outcomes, told = [], []
        for count, part in contenders.groupby("num_blocks", sort=False):
            labels = part.set_index("name")["method"].astype(str)
            if not {self.of, self.over} <= set(labels.index):
                raise ResultsError(f"the step benchmark has not both {self.of} and {self.over}")
            whole = times[(times["num_blocks"] == count) & (times["phase"] == "step")]
            ratio = time_ratio(whole, labels[self.of], labels[self.over])
            outcomes.append(self._judged(ratio))
            told.append(f"{interval(ratio.value, ratio.low, ratio.high, 3)} at N = {count}'s budget")
        text = f"a step of {_name(self.of)} takes {' and '.join(told)} times {_name(self.over)}'s"
        return Answer(min(outcomes), text, _where(contenders), "steps", rows=("steps",), figures=("steps",))

    def _judged(self, ratio: Estimate) -> Outcome:
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        if ratio.low >= low and ratio.high <= high:
            return Outcome.HOLDS
        return Outcome.FAILS if ratio.high < low or ratio.low > high else Outcome.OPEN


class Memory(Question):
    """Whether a training step of one method needs at most so many times another's memory."""

    kind: Literal["memory"]
    of: str
    over: str
    at_most: float

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        _, contenders = evidence.steps
        ratios = {}
        for count, part in contenders.groupby("num_blocks", sort=False):
            by = part.set_index("name")
            if not {self.of, self.over} <= set(by.index):
                raise ResultsError(f"the step benchmark has not both {self.of} and {self.over}")
            peak = by["static_mib"] + by["step_peak_mib"]
            ratios[count] = float(peak[self.of] / peak[self.over])
        told = " and ".join(f"{ratio:.4f} at N = {count}'s budget" for count, ratio in ratios.items())
        holds = max(ratios.values()) <= self.at_most
        text = f"{_name(self.of)}'s peak is {told} times {_name(self.over)}'s"
        outcome = Outcome.HOLDS if holds else Outcome.FAILS
        return Answer(outcome, text, _where(contenders), "steps", rows=("steps",), figures=("steps",))


def _name(contender: str) -> str:
    return METHOD_NAMES.get(contender, contender)


def _where(contenders: pd.DataFrame) -> str:
    first = contenders.iloc[0]
    return f"{first['workload']}, {first['cpu']}, {first['threads']} threads"


LAYERS = "diagnosis/layers.csv"


class Premise(Question):
    """In how many of a real model's layers every X_i has the rank of X."""

    kind: Literal["premise"]

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        layers = evidence.layers
        held = int(layers["premise_holds"].sum())
        short, count = layers["energy_rank"] / layers["block_rows"], layers["num_blocks"].iloc[0]
        text = (
            f"in {held} of {len(layers)} layers at N = {count}; 99% of the inputs' energy takes "
            f"{short.min():.2g} to {short.max():.2g} times as many directions as a block has rows"
        )
        all_or_none = {0: Outcome.FAILS, len(layers): Outcome.HOLDS}
        return Answer(all_or_none.get(held, Outcome.CONDITIONAL), text, _model(layers), LAYERS, rows=("layers",))


class Captures(Question):
    """Whether one set of updates captures at least as much as another in more than half of a real model's layers."""

    kind: Literal["captures"]
    of: str
    over: str

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        layers = evidence.layers
        names = [f"capture_{name}" for name in (self.of, self.over)]
        if missing := [name for name in names if name not in layers]:
            raise ResultsError(f"{LAYERS} lacks the column(s) {', '.join(missing)}")
        least, most = layers[names[1]], layers[names[0]]
        wins = int((most >= least).sum())
        text = (
            f"{CAPTURED[self.of]} {100 * most.median():.0f}% of what full fine-tuning does in the median layer, "
            f"{CAPTURED[self.over]} {100 * least.median():.0f}%; the first at least as much in {wins} of {len(layers)}"
        )
        holds = wins > len(layers) / 2
        outcome = Outcome.HOLDS if holds else Outcome.FAILS
        return Answer(outcome, text, _model(layers), LAYERS, rows=("layers",), figures=("captures",))


CAPTURED = {
    "diablo": "DiaBlo captures",
    "lora_set": "the best matrix of LoRA's rank captures",
    "lora_tangent": "LoRA's usual start captures",
    "lora_frozen": "LoRA with a frozen random A captures",
}


def _model(layers: pd.DataFrame) -> str:
    return f"a real model's {len(layers)} layers, {layers['tokens'].iloc[0]:,} tokens"


class GradientNorms(Question):
    """Whether the gradient's norm varies less over training with DiaBlo than with another method.

    By the standard deviation over the mean, of all steps after the warm-up; compared seed by seed on each task.
    """

    kind: Literal["gradient_norms"]
    over: str
    after: int = Field(ge=0)

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.training
        rows = rows[(rows["suite"] == rows["train_on"]) & (rows["step"] > self.after)]
        varies = rows.pivot_table(
            index=["train_on", "seed"],
            columns="method",
            values="grad_norm",
            aggfunc=lambda norms: norms.std() / norms.mean(),
        )
        if not {"diablo", self.over} <= set(varies):
            return Answer(Outcome.OPEN, f"no runs of both DiaBlo and {_name(self.over)}", "small scale", SUITES)
        pairs = varies[["diablo", self.over]].dropna()
        less = int((pairs["diablo"] < pairs[self.over]).sum())
        tasks = [
            f"{task_name(str(task))} {same['diablo'].mean():.2f} against {same[self.over].mean():.2f}"
            for task, same in pairs.groupby("train_on")
        ]
        text = (
            f"standard deviation over mean, DiaBlo against {_name(self.over)}: {', '.join(tasks)}; less in {less} of "
            f"{len(pairs)} pairs of runs"
        )
        outcome = {0: Outcome.FAILS, len(pairs): Outcome.HOLDS}.get(less, Outcome.OPEN)
        decides = "more seeds" if outcome == Outcome.OPEN else ""
        suites = _tables(pairs.index.get_level_values("train_on"))
        return Answer(outcome, text, "small scale", SUITES, decides, suites, ("gradient_norms",))


class Headline(Question):
    """A comparison of the paper's own numbers: what it prints, what other sources print, and what would decide it.

    Numbers of others are no evidence of one's own: the answer is open until runs at full scale are collected.
    """

    kind: Literal["headline"]
    suite: str
    model: str
    tables: tuple[str, ...] = (AVERAGE,)
    metric: str = "exact_match"
    against: tuple[str, ...] = Field(min_length=1)
    containing: str = ""
    run: str
    also: str = ""

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.published
        rows = rows[(rows["suite"] == self.suite) & (rows["model"] == self.model) & (rows["metric"] == self.metric)]
        rows = rows[rows["setting"].str.contains(self.containing, regex=False)]
        told = [self._margins(rows[rows["table"] == table], table) for table in self.tables]
        needs = "; ".join(part for part in (evidence.needs(self.run), self.also) if part)
        return Answer(
            Outcome.OPEN,
            "; ".join(told),
            "the paper's own numbers, not reproduced",
            "published",
            f"`diablo-theory train experiments/{self.run}` and its neighbours ({needs})",
            (f"published-{self.suite}",),
            PUBLISHED_FIGURES.get(self.suite, ()),
        )

    def _margins(self, rows: pd.DataFrame, table: str) -> str:
        own = rows[(rows["method"] == "diablo") & rows["origin"].str.contains("2506.03230")]["value"]
        if own.empty:
            raise ResultsError(f"no published number of DiaBlo for {self.suite}, {self.model}, {table}")
        value, told = own.max(), []
        for method in self.against:
            others = rows[rows["method"] == method]
            if others.empty:
                raise ResultsError(f"no published number of {method} for {self.suite}, {self.model}, {table}")
            quoted = others[others["origin"].str.contains("2506.03230")]["value"]
            best = quoted.max() if len(quoted) else others["value"].max()
            elsewhere = sorted(set(others["value"]) - {best})
            also = f" (elsewhere {', '.join(f'{v:g}' for v in elsewhere)})" if elsewhere else ""
            told.append(f"{_name(method)} {best:g}{also}")
        name = "" if table == AVERAGE else f"{task_name(table)}: "
        return f"{name}DiaBlo {value:g}, {', '.join(told)}"


class Quotes(Question):
    """Whether quoted shares of trainable parameters are those of the true shapes."""

    kind: Literal["quotes"]
    methods: tuple[str, ...] = Field(min_length=1)

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.counts[evidence.counts["method"].isin(self.methods)]
        ways = [reading(row) for row in rows.to_dict("records")]
        right = ways.count(READINGS["pct"])
        others = {way or "in no way tried": ways.count(way) for way in dict.fromkeys(ways) if way != READINGS["pct"]}
        also = "".join(f"; {number}: {way}" for way, number in others.items())
        text = f"{right} of {len(rows)} quotes are the true count{also}"
        outcome = Outcome.HOLDS if right == len(rows) else Outcome.FAILS
        where = "exact counts on the models' shapes"
        return Answer(outcome, text, where, "counts.csv", rows=("parameters",), figures=("published_parameters",))


AnyQuestion = Annotated[
    Verdicts | Compared | StepRatio | Memory | Premise | Captures | GradientNorms | Headline | Quotes,
    Field(discriminator="kind"),
]
