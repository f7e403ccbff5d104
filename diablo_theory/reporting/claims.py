"""Claims and what became of them: read from claims.yaml, decided by what has been saved, never by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diablo_theory.errors import ResultsError, refusal
from diablo_theory.reading import read_yaml
from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.questions import Answer, AnyQuestion, Outcome

FILE = "claims.yaml"


class Claim(BaseModel):
    """One claim, as claims.yaml writes it.

    Attributes:
        id: A short name, unique.
        by: Whose: the paper's, or this project's own.
        claim: What is claimed, in this project's words.
        where: Where it is made.
        conditions: What it presupposes; a claim that holds then holds under these.
        asks: Questions that decide it; their worst answer is its outcome.
        note: What a reader should know beside the numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    by: Literal["paper", "ours"]
    claim: str = Field(min_length=1)
    where: str = Field(min_length=1)
    conditions: str = ""
    asks: tuple[AnyQuestion, ...] = Field(min_length=1)
    note: str = ""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    claims: tuple[dict[str, Any], ...] = Field(min_length=1)


_Checked = TypeVar("_Checked", bound=BaseModel)


@dataclass(frozen=True)
class Decided:
    """A claim with its outcome and every answer that made it."""

    claim: Claim
    outcome: Outcome
    answers: tuple[Answer, ...]


def read_claims(file: Path) -> tuple[Claim, ...]:
    """The claims of a file.

    Raises:
        ConfigError: If it is missing or no YAML.
        ResultsError: If a claim or question lacks something, has a key or a name that is none, or an id occurs twice.
    """
    written = _checked(_File, read_yaml(file), str(file)).claims
    claims = tuple(
        _checked(Claim, one, f"{file}, claim {one.get('id', place)}") for place, one in enumerate(written, 1)
    )
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise ResultsError(f"{file}: the id {name!r} occurs twice")
    return claims


def _checked(kind: type[_Checked], written: Any, where: str) -> _Checked:
    try:
        return kind.model_validate(written)
    except ValidationError as error:
        raise ResultsError(f"{where}: {refusal(error, kind)}") from None


def decide(claim: Claim, evidence: Evidence) -> Decided:
    """What saved results make of a claim.

    Raises:
        ResultsError: If some of them are damaged. What was never made leaves a claim open.
    """
    try:
        answers = tuple(_answer(question, evidence) for question in claim.asks)
    except ResultsError as error:
        raise ResultsError(f"claim {claim.id}: {error}") from error
    outcome = min(answer.outcome for answer in answers)
    if outcome == Outcome.HOLDS and claim.conditions:
        outcome = Outcome.CONDITIONAL
    return Decided(claim, outcome, answers)


def _answer(question: AnyQuestion, evidence: Evidence) -> Answer:
    try:
        return question.ask(evidence)
    except NotMadeError as missing:
        return Answer(Outcome.OPEN, str(missing), "—", "—", missing.command)


def readable_claims(decided: list[Decided]) -> pd.DataFrame:
    """Claims in words, a line each."""
    lines = []
    for found in decided:
        claim = found.claim
        evidence = ". ".join(answer.evidence[:1].upper() + answer.evidence[1:] for answer in found.answers)
        decides = [answer.decides for answer in found.answers if answer.outcome == Outcome.OPEN and answer.decides]
        lines.append(
            {
                "Claim": claim.claim + (f" Condition: {claim.conditions}" if claim.conditions else ""),
                "Where": claim.where,
                "Outcome": found.outcome.words,
                "Evidence": f"{evidence}." + (f" {claim.note}" if claim.note else ""),
                "Scale": "; ".join(dict.fromkeys(answer.scale for answer in found.answers)),
                "Would decide it": "; ".join(dict.fromkeys(decides)) or "—",
            }
        )
    return pd.DataFrame(lines)
