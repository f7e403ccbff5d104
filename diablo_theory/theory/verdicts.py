"""What a check returns: premise and claim with their margins, the tolerance used and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diablo_theory.theory.arithmetic import Arithmetic
from diablo_theory.theory.tolerances import Tolerance

WIDEST = 16.0
"""Decades at which a margin is cut: float64 resolves no more, and an exact zero has infinitely many."""


@dataclass(frozen=True)
class Verdict:
    """One statement, tried on one instance.

    Args:
        check: The statement's name in theory.md, such as "L2".
        statement: What was tried, one short sentence.
        role: "claim", or "control": an instance that breaks the premise, where the claim must fail.
        trial: The trial's number, from 0.
        instance: The sizes, readable.
        premise_holds: Whether the instance satisfies the premise.
        premise_margin: How clearly; positive where it holds, unit as in the check's docstring.
        claim_holds: Whether the claim came true.
        claim_margin: How clearly, in decades: ``log10(tolerance / measured)`` for a quantity that should vanish (its
            negative for one that should not), cut at 16.
        tolerance: The bound that decided.
        tolerance_reason: Why it has that size.
    """

    check: str
    statement: str
    role: str
    trial: int
    instance: str
    premise_holds: bool
    premise_margin: float
    claim_holds: bool
    claim_margin: float
    tolerance: float
    tolerance_reason: str

    @property
    def passed(self) -> bool:
        """A claim passes when premise and claim hold, a control when neither does."""
        if self.role == "claim":
            return self.premise_holds and self.claim_holds
        return not self.premise_holds and not self.claim_holds


@dataclass(frozen=True)
class Premise:
    """Whether a premise holds, and how clearly: positive margins where it does."""

    holds: bool
    margin: float


@dataclass(frozen=True)
class Check:
    """A check of one statement.

    Args:
        name: Its name in theory.md.
        statement: One line for help texts.
        run: Makes the verdicts of one trial from a generator, the trial's number and the arithmetic of the instances.
    """

    name: str
    statement: str
    run: Callable[[torch.Generator, int, Arithmetic], list[Verdict]]


def room(measured: float, bound: float) -> float:
    """``log10(bound / measured)``, from -16 to 16: positive where ``measured < bound``; NaN and infinity are -16."""
    if not math.isfinite(measured):
        return -WIDEST
    if measured <= 0:
        return WIDEST
    return max(-WIDEST, min(WIDEST, math.log10(bound) - math.log10(measured)))


@dataclass(frozen=True)
class Trial:
    """The part that the verdicts of one instance share.

    Args:
        check: The check's name.
        number: The trial's number.
        instance: The sizes, readable.
    """

    check: str
    number: int
    instance: str

    def vanishes(self, role: str, statement: str, premise: Premise, measured: float, tolerance: Tolerance) -> Verdict:
        """The verdict on a claim that a measured quantity is zero, that is at most the tolerance."""
        margin = room(measured, tolerance.value)
        return self._verdict(role, statement, premise, measured, measured <= tolerance.value, margin, tolerance)

    def stays_positive(
        self, role: str, statement: str, premise: Premise, measured: float, tolerance: Tolerance
    ) -> Verdict:
        """The verdict on a claim that a measured quantity is above zero, that is above the tolerance."""
        margin = -room(measured, tolerance.value)
        return self._verdict(role, statement, premise, measured, measured > tolerance.value, margin, tolerance)

    def _verdict(
        self,
        role: str,
        statement: str,
        premise: Premise,
        measured: float,
        holds: bool,
        margin: float,
        tolerance: Tolerance,
    ) -> Verdict:
        if math.isnan(measured):  # proves nothing: wrong whichever way it should have come out
            holds = role == "control"
            margin = WIDEST if holds else -WIDEST
        return Verdict(
            check=self.check,
            statement=statement,
            role=role,
            trial=self.number,
            instance=self.instance,
            premise_holds=premise.holds,
            premise_margin=premise.margin,
            claim_holds=holds,
            claim_margin=margin,
            tolerance=tolerance.value,
            tolerance_reason=tolerance.reason,
        )


def describe(rows: int, in_features: int, out_features: int, num_blocks: int, rank: int) -> str:
    """The sizes of a linear instance, such as ``b=48 m1=24 m2=18 N=4 rank=6``."""
    return f"b={rows} m1={in_features} m2={out_features} N={num_blocks} rank={rank}"
