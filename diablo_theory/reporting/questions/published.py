"""Questions to published numbers."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from pydantic import Field

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.parameters import READINGS, reading
from diablo_theory.reporting.published import AVERAGE, PUBLISHED_FIGURES
from diablo_theory.reporting.questions.base import Answer, Outcome, Question, method_name
from diablo_theory.reporting.questions.runs import SUITES, compared, tables_of
from diablo_theory.reporting.tables import task_name

#: Within which share of DiaBlo's score another's is the same: of 50 to 90 per cent, half a point to one.
MARGIN = 0.01


class Headline(Question):
    """A comparison of the paper's own numbers: what it prints, what other sources print, and what would decide it.

    Numbers of others are no evidence of one's own: the answer is open until runs of that suite and model at full scale
    are collected, of all methods; these decide it then, as those of :class:`~.runs.Compared` do.
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
        printed = self._printed(evidence)
        own = self._own(evidence)
        if set(self.against) <= set(own["method"]):
            outcome, text = compared(own, self.metric, MARGIN)
            return Answer(
                outcome,
                f"{text}; printed: {printed}",
                "full scale",
                SUITES,
                "more seeds of the same runs",
                (*tables_of(own["suite"]), f"published-{self.suite}"),
                PUBLISHED_FIGURES.get(self.suite, ()),
            )
        needs = "; ".join(part for part in (evidence.needs(self.run), self.also) if part)
        return Answer(
            Outcome.OPEN,
            printed,
            "the paper's own numbers, not reproduced",
            "published",
            f"`diablo-theory train experiments/{self.run}` and its neighbours ({needs})",
            (f"published-{self.suite}",),
            PUBLISHED_FIGURES.get(self.suite, ()),
        )

    def _own(self, evidence: Evidence) -> pd.DataFrame:
        """This project's differences to DiaBlo of the methods in question, at full scale."""
        try:
            rows = evidence.differences
        except NotMadeError:
            return pd.DataFrame(columns=["method"])
        here = (rows["suite"] == self.suite) & (rows["model"] == evidence.model(self.run)) & (rows["scale"] == "full")
        return rows[here & (rows["metric"] == self.metric) & rows["method"].isin(self.against)]

    def _printed(self, evidence: Evidence) -> str:
        rows, apart = evidence.published, evidence.conflicts
        rows = rows[(rows["suite"] == self.suite) & (rows["model"] == self.model) & (rows["metric"] == self.metric)]
        rows = rows[rows["setting"].str.contains(self.containing, regex=False)]
        return "; ".join(self._margins(rows[rows["table"] == table], apart, table) for table in self.tables)

    def _margins(self, rows: pd.DataFrame, apart: pd.DataFrame, table: str) -> str:
        diablo = self._best(rows, "diablo", table)
        told, not_ahead = [], []
        for method in self.against:
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
            raise ResultsError(f"no published number of {method} for {self.suite}, {self.model}, {table}")
        quoted = found[found["origin"].str.contains("2506.03230")]
        rows = quoted if len(quoted) else found
        return rows.sort_values("value", kind="stable").iloc[-1]


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
    methods: tuple[str, ...] = Field(min_length=1)

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
