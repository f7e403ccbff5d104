"""The checks by name, and the run that turns them into one table of verdicts."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import pandas as pd

from diablo_theory.errors import ConfigError, nearest
from diablo_theory.theory import (
    arrival_checks,
    budget_checks,
    certificate_checks,
    convexity_checks,
    crossover_checks,
    expected_gap_checks,
    expressivity_checks,
    gradient_checks,
    rate_checks,
    stationarity_checks,
)
from diablo_theory.theory.arithmetic import FLOAT64, Arithmetic, seeded
from diablo_theory.theory.verdicts import Check, Verdict

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("G1", "The gradient of the blocks is the diagonal blocks of the full one.", gradient_checks.gradient),
        Check("G2", "LoRA starts with grad A = 0, DiaBlo with blocks of the full gradient.", gradient_checks.start),
        Check(
            "L1",
            "The linear DiaBlo problem is convex and splits by blocks; LoRA's is not convex.",
            convexity_checks.convexity,
        ),
        Check("L2", "If every X_i has the rank of X, DiaBlo loses nothing.", expressivity_checks.sufficiency),
        Check("L3", "If some X_i has a smaller rank, DiaBlo loses on some target.", expressivity_checks.necessity),
        Check(
            "L4",
            "At m2 rank X parameters DiaBlo is optimal and, on a generic target, LoRA is not.",
            budget_checks.budget,
        ),
        Check(
            "L5",
            "On a dense update of its rank LoRA is ahead, on a block-aligned one DiaBlo.",
            crossover_checks.crossover,
        ),
        Check(
            "L6",
            "Where DiaBlo loses nothing for any target, nor does LoRA with a frozen A of its size.",
            budget_checks.frozen_factor,
        ),
        Check("L7", "On average DiaBlo loses 1/2 s^2 m2 (r - min(r, d1)).", expected_gap_checks.expected_gap),
        Check("S1", "Under L2's premise a stationary D is stationary in W.", stationarity_checks.stationary),
        Check(
            "S2",
            "The same, if every g_{Y_i} has the rank of g_Y.",
            stationarity_checks.dual_stationary,
        ),
        Check("S3", "Amplification and leak bound the full gradient by the blocks'.", certificate_checks.certified),
        Check(
            "D1",
            "Gradient descent converges at the predicted rate: DiaBlo, frozen-A LoRA, and LoRA near its minimum.",
            rate_checks.rate,
        ),
        Check(
            "D2", "Adam reaches the minimum of the set its start belongs to; the saddle stays.", arrival_checks.arrival
        ),
    )
}
"""Every check, by its name in theory.md."""

COLUMNS: tuple[str, ...] = (*(field.name for field in dataclasses.fields(Verdict)), "passed")
"""Columns of the table of verdicts."""


def run_checks(
    names: Sequence[str] | None = None,
    trials: int = 5,
    seed: int = 0,
    arithmetic: Arithmetic = FLOAT64,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Run checks on random and boundary instances, each claim with its control.

    Instances depend on the seed, the check and the trial only, not on which other checks run.

    Args:
        names: Checks to run, in this order; all of them by default.
        trials: Instances of each, at least 1.
        seed: Where all draws come from.
        arithmetic: The precision and device in which instances are given.
        progress: Called with a short text before each trial.

    Returns:
        One row a verdict; the columns are the fields of :class:`Verdict` and ``passed``.

    Raises:
        ConfigError: If a check is unknown.
        ValueError: If trials is below 1.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    chosen = list(CHECKS) if names is None else list(dict.fromkeys(name.upper() for name in names))
    for name in chosen:
        if name not in CHECKS:
            raise ConfigError(f"unknown check {name!r}.{nearest(name, CHECKS)}")
    verdicts: list[Verdict] = []
    for name in chosen:
        for trial in range(trials):
            if progress is not None:
                progress(f"{name}: trial {trial + 1} of {trials}")
            generator = seeded(zlib.crc32(f"{name}, seed {seed}, trial {trial}".encode()))
            verdicts.extend(CHECKS[name].run(generator, trial, arithmetic))
    rows = [{**dataclasses.asdict(verdict), "passed": verdict.passed} for verdict in verdicts]
    return pd.DataFrame(rows, columns=list(COLUMNS))
