"""Questions to the verdicts of the theory checks."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.questions.base import Answer, Check, Outcome, Question

#: Figures beside that of all verdicts which show what some checks are about.
_CHECKS_DRAWN = {"theory_map": {"L5", "L7"}, "convergence": {"D1", "D2"}}
_SIZES = re.compile(r"\b(?:b|m1|m2)=(\d+)|\b(\d+)x(\d+)")


class Verdicts(Question):
    """Whether checks hold in every trial, and their controls fail in every trial.

    With ``statements`` only those of a check's statements count that have one of these words in them, with all
    controls of the check.
    """

    kind: Literal["verdicts"]
    checks: tuple[Check, ...] = Field(min_length=1)
    statements: tuple[str, ...] = ()

    def ask(self, evidence: Evidence) -> Answer:
        """See :class:`Question`."""
        rows = evidence.verdicts[evidence.verdicts["check"].isin(self.checks)]
        asked = (
            rows["statement"].map(lambda said: any(words in said for words in self.statements or ("",))).astype(bool)
        )
        rows = rows[asked | (rows["role"] == "control")]
        for role in _ROLES:  # of no trial at all everything is true
            if unknown := sorted(set(self.checks) - set(rows.loc[rows["role"] == role, "check"])):
                raise NotMadeError(
                    f"no {role} of the check(s) {', '.join(unknown)} is saved", "`diablo-theory reproduce`"
                )
        for words in self.statements:
            if not rows["statement"].str.contains(words, regex=False).any():
                raise ResultsError(f"no statement of {', '.join(self.checks)} has the words {words!r}")
        told = []
        for role, what in _ROLES.items():
            passed = rows.loc[rows["role"] == role, "passed"]
            told.append(f"{passed.sum()} of {len(passed)} {what}")
        drawn = [figure for figure, checks in _CHECKS_DRAWN.items() if checks & set(self.checks)]
        sizes = [int(n) for text in rows["instance"].unique() for found in _SIZES.findall(text) for n in found if n]
        return Answer(
            Outcome.HOLDS if rows["passed"].all() else Outcome.FAILS,
            f"{', '.join(self.checks)}: {' and '.join(told)}",
            f"random problems, no side longer than {max(sizes)}" if sizes else "random problems",
            f"{evidence.results.name}/theory/verdicts.csv",
            rows=tuple(f"check-{check}" for check in self.checks),
            figures=("verdicts", *drawn),
        )


_ROLES = {"claim": "trials hold", "control": "controls fail, as they must"}
