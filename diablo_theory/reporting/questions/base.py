"""What a question is, and what an answer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from diablo_theory.reporting import names
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.intervals import METRICS, METRICS_OF_SOME
from diablo_theory.reporting.names import one_of
from diablo_theory.reporting.published import METHOD_NAMES

Method = Annotated[str, one_of("method", names.METHODS)]
Task = Annotated[str, one_of("task", names.TASKS)]
Metric = Annotated[str, one_of("metric", (*METRICS, *METRICS_OF_SOME))]
RunSuite = Annotated[str, AfterValidator(lambda name: names.known("suite", name, names.suites()))]
Check = Annotated[str, one_of("check", names.CHECKS)]
Contender = Annotated[str, one_of("contender of the step benchmark", names.CONTENDERS)]
PublishedMethod = Annotated[str, one_of("published method", METHOD_NAMES)]
PublishedSuite = Annotated[str, one_of("published suite", names.PUBLISHED)]


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
        decides: The command, and the hardware, that would decide it if it stays open; needed then.
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

    def __post_init__(self) -> None:
        """Refuse an open question that does not say what would close it."""
        if self.outcome == Outcome.OPEN and not self.decides:
            raise ValueError(f"an open answer has to say what would decide it: {self.evidence!r}")


class Question(BaseModel):
    """A question, as claims.yaml writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def ask(self, evidence: Evidence) -> Answer:
        """Compute the answer.

        Raises:
            NotMadeError: If what it asks for was never made.
            ResultsError: If that is damaged, or nothing in it is what the question is about.
        """


class Pair(Question):
    """A question about one thing beside another of its kind."""

    of: str
    over: str

    @model_validator(mode="after")
    def _are_two(self) -> Pair:
        if self.of == self.over:
            raise ValueError(f"of and over are both {self.of}")
        return self


def method_name(method: str) -> str:
    """A method as readers see it."""
    return METHOD_NAMES.get(method, method)
