"""Questions to the benchmark of whole training steps."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.intervals import Estimate, time_ratio
from diablo_theory.reporting.questions.base import Answer, Contender, Outcome, Pair, method_name
from diablo_theory.reporting.tables import interval

_BENCH = "`diablo-theory bench --out paper_results/steps`"
_MORE = "`diablo-theory bench` with more rounds, on a machine that does nothing else"


class StepRatio(Pair):
    """Whether a whole training step of one method takes at most, or at least, so many times another's."""

    kind: Literal["step_ratio"]
    of: Contender
    over: Contender
    at_most: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    at_least: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _require_a_limit(self) -> StepRatio:
        if self.at_most is None and self.at_least is None:
            raise ValueError("a step_ratio needs at_most or at_least")
        if self.at_most is not None and self.at_least is not None and self.at_most < self.at_least:
            raise ValueError(f"at_most {self.at_most:g} is below at_least {self.at_least:g}")
        return self

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        times, contenders = evidence.steps
        outcomes, told = [], []
        for (workload, count), part in contenders.groupby(["workload", "num_blocks"], sort=False):
            labels = _both(part, self.of, self.over)["method"].astype(str)
            whole = times[
                (times["workload"] == workload) & (times["num_blocks"] == count) & (times["phase"] == "step")
            ]
            ratio = time_ratio(whole, labels[self.of], labels[self.over])
            outcomes.append(self._judged(ratio))
            told.append(f"{interval(ratio.value, ratio.low, ratio.high, 3)} at N = {count}'s budget")
        text = f"a step of {method_name(self.of)} takes {' and '.join(told)} times {method_name(self.over)}'s"
        text += self._asked()
        return Answer(min(outcomes), text, _where(contenders), "steps", _MORE, ("steps",), ("steps",))

    def _asked(self) -> str:
        limits = {"at most": self.at_most, "at least": self.at_least}
        return f" (asked: {' and '.join(f'{how} {limit:g}' for how, limit in limits.items() if limit is not None)})"

    def _judged(self, ratio: Estimate) -> Outcome:
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return {True: Outcome.HOLDS, False: Outcome.FAILS, None: Outcome.OPEN}[ratio.within(low, high)]


class Memory(Pair):
    """Whether a training step of one method needs at most so many times another's memory."""

    kind: Literal["memory"]
    of: Contender
    over: Contender
    at_most: float = Field(gt=0, allow_inf_nan=False)

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        _, contenders = evidence.steps
        ratios, told = [], []
        for (_, count), part in contenders.groupby(["workload", "num_blocks"], sort=False):
            both = _both(part, self.of, self.over)
            peak = both["static_mib"] + both["step_peak_mib"]
            ratios.append(float(peak[self.of] / peak[self.over]))
            told.append(f"{ratios[-1]:.4f} at N = {count}'s budget")
        text = f"{method_name(self.of)}'s peak is {' and '.join(told)} times {method_name(self.over)}'s"
        text += f" (asked: at most {self.at_most:g})"
        outcome = Outcome.HOLDS if max(ratios) <= self.at_most else Outcome.FAILS
        return Answer(outcome, text, _where(contenders), "steps", rows=("steps",), figures=("steps",))


def _both(part: pd.DataFrame, of: str, over: str) -> pd.DataFrame:
    by = part.set_index("name")
    if missing := [name for name in (of, over) if name not in by.index]:
        raise NotMadeError(f"the step benchmark was run without {' and '.join(missing)}", _BENCH)
    return by


def _where(contenders: pd.DataFrame) -> str:
    places = contenders[["workload", "cpu", "threads"]].drop_duplicates().itertuples(index=False)
    return "; ".join(f"{workload}, {cpu}, {threads} threads" for workload, cpu, threads in places)
