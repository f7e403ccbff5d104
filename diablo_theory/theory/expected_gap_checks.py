"""L7: the gap that DiaBlo has on average, where the residual has independent entries."""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima, oracles
from diablo_theory.theory.arithmetic import Arithmetic, wide
from diablo_theory.theory.column_space import column_space, written_groups
from diablo_theory.theory.instances import clear_problem
from diablo_theory.theory.measures import rank_margin
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe

# rows b, m1, m2, N, rank X: one rank too many; four; ragged; m2 < N
_SIZES = ((30, 24, 18, 4, 7), (24, 24, 18, 4, 10), (30, 23, 17, 4, 8), (30, 20, 3, 5, 6))
_DEVIATION = 0.7
_FREEDOM = 10_000


def degrees_of_freedom(layout: BlockLayout, rank: int) -> int:
    """``sum_i cols_i (r - min(r, rows_i))``: how many independent entries of R the gap adds up.

    For N that divides both sizes it is ``m2 (r - min(r, d1))``.

    Args:
        layout: The blocks.
        rank: r, of a generic X.

    Source: theory.md, L7, with ragged sizes.
    """
    sizes = [(layout.rows(i), layout.cols(i)) for i in written_groups(layout)]
    return sum((c.stop - c.start) * (rank - min(rank, r.stop - r.start)) for r, c in sizes)


def expected_gap(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L7 [beyond the paper]: ``E gap = 1/2 s^2 sum_i cols_i (r - min(r, rows_i))`` for generic X, independent R.

    Given X, ``2 gap / s^2`` is a sum of squares of so many independent standard normal numbers: the coordinates of
    each R_i in the complement of col X_i within col X, of dimension ``r - min(r, rows_i)``. Summed over draws it is
    chi-squared with ``k >= 10^4`` degrees of freedom. Measured is ``|chi^2 - k| / sqrt(2 k)``, the larger of two: with
    the closed form's gaps and with those of masked least squares.

    Two premises. Generic X: ``rank X_i = min(r, rows_i)``; margin, decades of the weakest singular value above the
    cutoff. Independent entries: R_i has its share ``1 - rank X_i / b`` of squares outside col X_i; margin, what it
    has of that share, less a half. The smaller margin counts. Controls: groups one rank short, since each repeats one
    of its columns (one more dimension is lost), and every R_i inside col X_i (nothing is).

    Args:
        generator: Where the instances come from.
        number: The trial's number; it picks one of the sizes in turn.
        arithmetic: The precision and device of the instances.

    Returns:
        One claim and two controls.

    Source: theory.md, L7.
    """
    b, m1, m2, n, rank = _SIZES[number % len(_SIZES)]
    layout = BlockLayout(m1, m2, n)
    problem = clear_problem(layout, b, rank, generator, arithmetic)
    freedom = degrees_of_freedom(layout, rank)
    draws = -(-_FREEDOM // freedom)
    noise = torch.randn(draws, b, m2, generator=generator, dtype=torch.float64)
    trial = Trial("L7", number, describe(b, m1, m2, n, rank) + f" draws={draws}")
    cases = (
        ("claim", "mean gap as the degrees of freedom say", problem.X, noise),
        ("control", "mean gap as for a generic X, with groups one rank short", _one_rank_short(problem), noise),
        ("control", "mean gap as for independent entries, with R_i in col X_i", problem.X, _inside(problem, noise)),
    )
    bound = tolerance("chi-squared", problem.X.dtype)
    verdicts = []
    for role, statement, X, R in cases:  # W0 = 0, so that rounding of X W0 does not add to what R is meant to be
        W0 = torch.zeros_like(problem.W0)
        sample = dataclasses.replace(problem, X=X, W0=W0, T=arithmetic.place(_DEVIATION * R))
        surprise = _surprise(sample, draws * freedom)
        verdicts.append(trial.vanishes(role, statement, _premise(sample), surprise, bound))
    return verdicts


def _one_rank_short(problem: LinearProblem) -> Tensor:
    """X with the first column of every group a copy of the group's last."""
    X = problem.X.clone()
    for i in written_groups(problem.layout):
        rows = problem.layout.rows(i)
        X[:, rows.start] = X[:, rows.stop - 1]
    return X


def _side_by_side(problem: LinearProblem, R: Float[Tensor, "draws b m2"], i: int) -> Float[Tensor, "b c"]:
    """All draws of R_i as the columns of one matrix."""
    return R[..., problem.layout.cols(i)].movedim(0, -1).flatten(1)


def _inside(problem: LinearProblem, R: Float[Tensor, "draws b m2"]) -> Float[Tensor, "draws b m2"]:
    """Every R_i projected onto col X_i."""
    inside, (draws, b, _) = torch.zeros_like(R), R.shape
    for i in written_groups(problem.layout):
        fit = oracles.projection(problem.X[:, problem.layout.rows(i)], _side_by_side(problem, R, i))
        inside[..., problem.layout.cols(i)] = fit.reshape(b, -1, draws).movedim(-1, 0)
    return inside


def _surprise(sample: LinearProblem, freedom: int) -> float:
    """Standard deviations between the gaps' sum and what ``freedom`` degrees say, the larger of two answers."""
    closed = optima.diablo_optimum(reduce_problem(sample), sample.layout, minimiser=False).gap.sum()
    evaluated = 0.0
    for i in written_groups(sample.layout):
        R = _side_by_side(sample, sample.R, i)
        missed = oracles.projection(sample.X, R) - oracles.projection(sample.X[:, sample.layout.rows(i)], R)
        evaluated += 0.5 * float(missed.square().sum())
    statistics = (2 * gap / _DEVIATION**2 for gap in (float(closed), evaluated))
    return max(abs(statistic - freedom) for statistic in statistics) / math.sqrt(2 * freedom)


def _premise(sample: LinearProblem) -> Premise:
    largest = float(torch.linalg.matrix_norm(wide(sample.X), 2))
    rank, margins = int(column_space(sample.X).rank), []
    for i in written_groups(sample.layout):
        X, R = wide(sample.X[:, sample.layout.rows(i)]), wide(_side_by_side(sample, sample.R, i))
        sigma = torch.linalg.svdvals(X)[:rank] / largest
        margins.append(rank_margin(sigma, len(sigma), sample.X.dtype))
        outside = float((R - oracles.projection(X, R)).square().sum() / R.square().sum())
        margins.append(outside / (1 - len(sigma) / len(X)) - 0.5)
    return Premise(min(margins) > 0, min(margins))
