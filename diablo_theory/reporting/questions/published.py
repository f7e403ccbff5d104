"""Questions to published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pandas as pd
from pydantic import Field, model_validator

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.intervals import Estimate, independent_difference
from diablo_theory.reporting.names import PUBLISHED, known
from diablo_theory.reporting.parameters import READINGS, reading
from diablo_theory.reporting.published import AVERAGE, PUBLISHED_FIGURES
from diablo_theory.reporting.questions.base import (
    Answer,
    Metric,
    Outcome,
    PublishedMethod,
    PublishedSuite,
    Question,
    method_name,
)
from diablo_theory.reporting.questions.runs import SUITES, compared, tables_of
from diablo_theory.reporting.tables import task_name

#: Methods that a base of another kind gives their name: what their run files call them.
_STANDS_FOR = {"gptq-lora": "lora"}
#: Within which share of DiaBlo's score another's is the same: of 50 to 90 per cent, half a point to one.
MARGIN = 0.01


class Headline(Question):
    """A comparison of the paper's own numbers: what it prints, what other sources print, and what would decide it.

    Numbers of others are no evidence of one's own: the answer is open until the run files are run at full scale and
    collected. Each method is scored by its own recipe then, as in the paper, so that differences are those of two
    scores, not of pairs; what they say is decided as in :class:`~.runs.Compared`. A method without a run file keeps
    the claim from holding, not from failing.

    Attributes:
        suite: Of the published rows.
        model: As published rows name it.
        tables: Those that are compared; ``average``: the mean of all tasks.
        metric: By what.
        against: Methods that DiaBlo is said to be ahead of, as published rows name them.
        level: Those that it is said to match, or more.
        containing: What settings of the published rows must contain.
        runs: Run files below ``experiments``, of DiaBlo and of those methods that have one.
        also: What the runs need beside hardware and time.
    """

    kind: Literal["headline"]
    suite: PublishedSuite
    model: str
    tables: tuple[str, ...] = Field(default=(AVERAGE,), min_length=1)
    metric: Metric = "exact_match"
    against: tuple[PublishedMethod, ...] = Field(min_length=1)
    level: tuple[PublishedMethod, ...] = ()
    containing: str = ""
    runs: dict[str, str]
    also: str = ""

    @model_validator(mode="after")
    def _files_of_these_methods(self) -> Headline:
        if "diablo" in self.methods:
            raise ValueError("against or level names diablo itself")
        for table in self.tables:
            known(f"table of {self.suite}", table, PUBLISHED[self.suite])
        if twice := [method for method in self.methods if self.methods.count(method) > 1]:
            raise ValueError(f"{twice[0]} is named twice in against and level")
        if "diablo" not in self.runs:
            raise ValueError("runs must name DiaBlo's run file, as diablo")
        if others := self.runs.keys() - {"diablo", *self.methods}:
            raise ValueError(f"runs names {', '.join(sorted(others))}, which DiaBlo is not compared with here")
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """All that DiaBlo is compared with."""
        return self.against + self.level

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        printed = self._printed(evidence)
        scored = self._scored(evidence)
        own, lost = self._own(scored), _lost(scored)
        published, figures = f"published-{self.suite}", PUBLISHED_FIGURES.get(self.suite, ())
        if own.empty and not lost:
            where, text = "the paper's own numbers, not reproduced", printed
            return Answer(Outcome.OPEN, text, where, "published", self._decides(evidence), (published,), figures)
        outcome, text = (Outcome.OPEN, "no pair of scores") if own.empty else compared(own, self.metric, MARGIN)
        missing = [method_name(method) for method in self.methods if method not in set(own["method"])]
        text += f"; not run, or not on all: {', '.join(missing)}" if missing else ""
        text += "".join(f"; of {method_name(method)} {told} diverged" for method, told in lost.items())
        # A training that did not survive is no success, and no comparison.
        outcome = min(outcome, Outcome.OPEN) if missing or lost else outcome
        seeds = int(own["seeds"].min()) if len(own) else 0
        return Answer(
            outcome,
            f"{text}; printed: {printed}",
            f"full scale, {seeds} seed{'' if seeds == 1 else 's'}",
            SUITES,
            self._decides(evidence) if missing or lost else "more seeds of the same runs",
            (*tables_of([self.suite]), published),
            figures,
        )

    def _decides(self, evidence: Evidence) -> str:
        """The command, and what each run needs."""
        files = " ".join(f"experiments/{file}" for file in self.runs.values())
        each = [f"{method_name(method)}: {evidence.needs(file)}" for method, file in self.runs.items()]
        needs = "; ".join([*each, self.also] if self.also else each)
        without = [method_name(method) for method in self.methods if method not in self.runs]
        none = f"; of {', '.join(without)} there is no run file" if without else ""
        return f"`diablo-theory sweep {files}`, then `diablo-theory collect` ({needs}){none}"

    def _scored(self, evidence: Evidence) -> dict[str, pd.DataFrame]:
        """Each method's scores at full scale; nothing while no run is collected."""
        self._require_files(evidence)
        try:
            rows = {method: evidence.of_run(file) for method, file in self.runs.items()}
        except NotMadeError:
            return {}
        return {method: found[found["scale"] == "full"] for method, found in rows.items()}

    def _own(self, scored: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """The methods' scores minus DiaBlo's: what :func:`~.runs.compared` takes."""
        scores = {method: self._estimates(rows) for method, rows in scored.items()}
        diablo = scores.pop("diablo", {})
        rows = []
        for method, found in scores.items():
            if set(self.tables) - (found.keys() & diablo.keys()):
                continue  # by some of the tables alone it would be another claim
            for table in self.tables:
                less = independent_difference(found[table], diablo[table])
                interval = {"value": less.value, "low": less.low, "high": less.high, "seeds": less.seeds}
                about = {"method": method, "label": method_name(method), "task": table}
                rows.append(about | interval | {"diablo": diablo[table].value, "must_lead": method in self.against})
        columns = ["method", "label", "task", "value", "low", "high", "seeds", "diablo", "must_lead"]
        return pd.DataFrame(rows, columns=columns)

    def _require_files(self, evidence: Evidence) -> None:
        """Refuse run files that are of another suite, model or method than is said."""
        model = evidence.stated(self.runs["diablo"])["model"]
        for method, file in self.runs.items():
            stated = evidence.stated(file)
            for key, wanted in (("suite", self.suite), ("model", model), ("method", _STANDS_FOR.get(method, method))):
                if stated[key] != wanted:
                    raise ResultsError(
                        f"a claim about {self.suite} takes {file} for {method}, but its {key} is {stated[key]}; "
                        f"allowed: {wanted}"
                    )

    def _estimates(self, rows: pd.DataFrame) -> dict[str, Estimate]:
        """A method's scores by published table."""
        # Tasks here may be called otherwise than published tables; readers see one name.
        tables = {task_name(table): table for table in self.tables}
        rows = rows[rows["metric"] == self.metric]
        rows = rows.assign(table=rows["task"].map(task_name).map(tables)).dropna(subset="table")
        return {
            row["table"]: Estimate(row["value"], row["low"], row["high"], float("nan"), row["n"], row["seeds"])
            for row in rows.to_dict("records")
        }

    def _printed(self, evidence: Evidence) -> str:
        rows, apart = evidence.published, evidence.conflicts
        rows = rows[rows["suite"] == self.suite]
        known(f"model of the published suite {self.suite}", self.model, set(rows["model"]))
        rows = rows[(rows["model"] == self.model) & (rows["metric"] == self.metric)]
        rows = rows[rows["setting"].str.contains(self.containing, regex=False)]
        return "; ".join(self._margins(rows[rows["table"] == table], apart, table) for table in self.tables)

    def _margins(self, rows: pd.DataFrame, apart: pd.DataFrame, table: str) -> str:
        diablo = self._best(rows, "diablo", table)
        told, not_ahead = [], []
        for method in self.methods:
            best = self._best(rows, method, table)
            also = _elsewhere(apart, best) if table == AVERAGE else []
            told.append(f"{method_name(method)} {_value(best)}" + (f" (elsewhere {', '.join(also)})" if also else ""))
            not_ahead += [method_name(method)] if diablo["value"] <= best["value"] else []
        name = "" if table == AVERAGE else f"{task_name(table)}: "
        order = f"; as printed not ahead of {', '.join(not_ahead)}" if not_ahead else ""
        return f"{name}DiaBlo {_value(diablo)}, {', '.join(told)}{order}"

    def _best(self, rows: pd.DataFrame, method: str, table: str) -> pd.Series:
        """A method's best row in DiaBlo's paper, or where it has none in any other."""
        found = rows[rows["method"] == method]
        if found.empty:
            about = [self.suite, self.model, table, self.metric, *([self.containing] if self.containing else [])]
            raise ResultsError(f"no published number of {method} for {', '.join(about)}")
        quoted = found[found["origin"].str.contains("2506.03230")]
        rows = quoted if len(quoted) else found
        return rows.sort_values("value", kind="stable").iloc[-1]


def _lost(scored: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Methods of which seeds diverged, with how many."""
    found = {}
    for method, rows in scored.items():
        died = rows[rows["diverged"] > 0]
        if len(died):
            lost, seeds = int(died["diverged"].max()), int(died["seeds"].max())
            found[method] = f"{lost} of {lost + seeds} seeds"
    return found


def _value(row: pd.Series) -> str:
    return f"{row['value']:g}" + (" (read off a chart)" if row["certainty"] == "measured" else "")


def _elsewhere(apart: pd.DataFrame, row: pd.Series) -> list[str]:
    """Averages of rows that ought to be the same, as :func:`~diablo_theory.reporting.published.conflicts` says."""
    same = apart[(apart[["suite", "model", "method"]] == row[["suite", "model", "method"]]).all(axis=1)]
    found = set()
    for here, there in (("1", "2"), ("2", "1")):
        own = same[(same[f"file_{here}"] == row["file"]) & (same[f"setting_{here}"] == row["setting"])]
        found |= set(own[f"average_{there}"].dropna()) - {row["value"]}
    return [f"{value:g}" for value in sorted(found)]


class Quotes(Question):
    """Whether quoted shares of trainable parameters are those of the true shapes."""

    kind: Literal["quotes"]
    methods: tuple[PublishedMethod, ...] = Field(min_length=1)

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.counts[evidence.counts["method"].isin(self.methods)]
        if unknown := sorted(set(self.methods) - set(rows["method"])):
            raise ResultsError(
                f"no count of {', '.join(unknown)} is quoted; of {_known(evidence.counts)} there are some"
            )
        ways = [reading(row) for row in rows.to_dict("records")]
        right = ways.count(READINGS["pct"])
        others = {way or "in no way tried": ways.count(way) for way in dict.fromkeys(ways) if way != READINGS["pct"]}
        also = "".join(f"; {number}: {way}" for way, number in others.items())
        text = f"{right} of {len(rows)} quotes are the true count{also}"
        where, figures = "exact counts on the models' shapes", ("published_parameters",)
        outcome = Outcome.HOLDS if right == len(rows) else Outcome.FAILS
        return Answer(outcome, text, where, "counts.csv", rows=("parameters",), figures=figures)


def _known(counts: pd.DataFrame) -> str:
    return ", ".join(sorted(set(counts["method"])))
