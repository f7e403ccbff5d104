"""L2 and L3: what the blocks can express is decided by the ranks of the column groups."""

from __future__ import annotations

import dataclasses

import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima, oracles
from diablo_theory.theory.arithmetic import Arithmetic
from diablo_theory.theory.column_space import column_space
from diablo_theory.theory.instances import clear_problem
from diablo_theory.theory.measures import diablo_excesses, rank_premise
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe

# rows b, m1, m2, N, rank X: rank exactly d1; below; ragged twice; b < d1; N = 1; N = m1; m2 < N; rank 0
_SUFFICIENT = (
    (48, 24, 18, 4, 6),
    (48, 24, 18, 4, 5),
    (40, 23, 17, 4, 5),
    (40, 17, 23, 3, 4),
    (4, 24, 18, 4, 4),
    (30, 11, 8, 1, 11),
    (30, 12, 10, 12, 1),
    (30, 20, 3, 5, 4),
    (30, 12, 9, 3, 0),
)
# rank d1 + 1; far above; the ragged tail alone too thin; N = m1 with rank 2; m2 < N
_INSUFFICIENT = ((48, 24, 18, 4, 7), (48, 24, 18, 4, 20), (40, 23, 19, 4, 6), (30, 12, 10, 12, 2), (30, 20, 3, 5, 6))


def sufficiency(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L2: ``rank X_i = rank X`` for every i makes DiaBlo's gap zero for every target; controls break the ranks.

    Premise margin: decades between sigma_r(X_i), r = rank X, and the rank cutoff, the smallest over i.
    Claim margin: decades between the relative gap and its tolerance. The gap is the larger of the closed form's and
    the minimiser's own excess; targets are generic and, for claims, also :func:`optima.worst_case_target`.

    Args:
        generator: Where the instances come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Two claims for every sufficient size, one control for every insufficient one and one for duplicated columns.

    Source: arXiv 2506.03230v2, sufficiency of diagonal blocks in the linear problem; theory.md, L2.
    """
    verdicts = []
    for role, sizes in (("claim", _SUFFICIENT), ("control", _INSUFFICIENT)):
        for b, m1, m2, n, rank in sizes:
            problem = clear_problem(BlockLayout(m1, m2, n), b, rank, generator, arithmetic)
            trial = Trial("L2", number, describe(b, m1, m2, n, rank))
            verdicts.append(_gap_verdict(trial, role, "gap 0 for a generic target", problem))
            if role == "claim":
                worst = _with_worst_target(problem)
                verdicts.append(_gap_verdict(trial, role, "gap 0 for the worst-case target", worst))
    problem = _with_duplicates(clear_problem(BlockLayout(24, 18, 4), 48, 5, generator, arithmetic), copies=6)
    trial = Trial("L2", number, describe(48, 24, 18, 4, 5) + " duplicated")
    return [*verdicts, _gap_verdict(trial, "control", "gap 0 with one column repeated in a block", problem)]


def _gap_verdict(trial: Trial, role: str, statement: str, problem: LinearProblem) -> Verdict:
    bound = tolerance("gap", problem.X.dtype)
    return trial.vanishes(role, statement, rank_premise(problem), max(diablo_excesses(problem)), bound)


def _with_worst_target(problem: LinearProblem) -> LinearProblem:
    T = optima.worst_case_target(problem.X, problem.W0, problem.layout, column_space(problem.X))
    return dataclasses.replace(problem, T=T)


def _with_duplicates(problem: LinearProblem, copies: int) -> LinearProblem:
    """Overwrite columns of X, so that its first ``copies`` ones equal the first."""
    X = problem.X.clone()
    X[:, :copies] = X[:, :1]
    return dataclasses.replace(problem, X=X)


def necessity(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L3 [beyond the paper]: where some ``rank X_i < rank X`` there is a target that DiaBlo cannot reach.

    Premise: that of L2 fails; margin, L2's with its sign turned. Claim: at :func:`optima.worst_case_target` the gap is
    positive, the smaller of two answers: the closed form's relative gap, and the excess of masked least squares.
    Control: the premise of L2 holds, and even the worst-case target is reached. With L2 this is an equivalence.

    Args:
        generator: Where the instances come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        A claim for each insufficient size, a control for each sufficient one.

    Source: theory.md, L3.
    """
    verdicts = []
    for role, sizes in (("claim", _INSUFFICIENT), ("control", _SUFFICIENT)):
        for b, m1, m2, n, rank in sizes:
            drawn = clear_problem(BlockLayout(m1, m2, n), b, rank, generator, arithmetic)
            problem = _with_worst_target(drawn)
            premise = rank_premise(problem)
            lost = min(
                float(optima.diablo_optimum(reduce_problem(problem), problem.layout, minimiser=False).relative_gap),
                oracles.relative_excess(problem, oracles.blockwise_projection(problem)),
            )
            verdicts.append(
                Trial("L3", number, describe(b, m1, m2, n, rank)).stays_positive(
                    role,
                    "some target has a positive gap (control: every X_i of the rank of X)",
                    Premise(not premise.holds, -premise.margin),
                    lost,
                    tolerance("gap", problem.X.dtype),
                )
            )
    return verdicts
