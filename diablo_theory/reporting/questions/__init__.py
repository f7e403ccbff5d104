"""Questions that claims ask of saved results; each answer is computed, with its evidence in a sentence."""

from typing import Annotated

from pydantic import Field

from diablo_theory.reporting.questions.base import Answer, Outcome, Question
from diablo_theory.reporting.questions.costs import Memory, StepRatio
from diablo_theory.reporting.questions.layers import Captures, Premise
from diablo_theory.reporting.questions.published import Headline, Quotes
from diablo_theory.reporting.questions.runs import Compared, GradientNorms
from diablo_theory.reporting.questions.theory import Verdicts

AnyQuestion = Annotated[
    Verdicts | Compared | StepRatio | Memory | Premise | Captures | GradientNorms | Headline | Quotes,
    Field(discriminator="kind"),
]

__all__ = ["Answer", "AnyQuestion", "Outcome", "Question"]
