"""L4 and L6: DiaBlo, LoRA and LoRA with a frozen A at equal parameters."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima, oracles, parametrisations
from diablo_theory.theory.arithmetic import Arithmetic, gaussian, wide
from diablo_theory.theory.column_space import column_space
from diablo_theory.theory.instances import LARGEST_CONDITION, clear_problem
from diablo_theory.theory.measures import (
    diablo_excesses,
    frozen_excesses,
    linearity,
    lora_excesses,
    midpoint_excess,
    rank_margin,
    rank_premise,
)
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.starts import usual_start
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe

# b, m2, N, rank X (even), with m1 = N rank X: wide, ragged outputs, fewer outputs than the rank
_BUDGETS = ((40, 18, 3, 6), (40, 11, 4, 4), (40, 4, 3, 8))


def budget(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L4: at ``m2 r`` parameters DiaBlo reaches the full optimum, and LoRA of that budget loses a known tail.

    Four statements, each with its control. Premise margins: for DiaBlo as in L2 (at most -1 if the blocks do not hold
    exactly m2 r parameters); for LoRA a count of ranks, ``min(r, m2) - rho`` where it is to lose (cut at 1, and at 0
    if the budget's rank is not the largest that fits), ``rho - min(r, m2)`` where it is to win, ``-|rho - budget's
    rank|`` for the tail's value, each shifted by half a rank so that its sign decides. Claim margins: decades from
    the tolerance; for the tail's value, of the relative difference between the minimiser's evaluated loss and
    singular values of LAPACK's projection.

    Args:
        generator: Where the instances come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Four claims and four controls for each size.

    Source: arXiv 2506.03230v2, comparison with LoRA at equal parameters; theory.md, L4.
    """
    verdicts = []
    for b, m2, n, r in _BUDGETS:
        layout = BlockLayout(n * r, m2, n)
        problem = clear_problem(layout, b, r, generator, arithmetic)
        trial = Trial("L4", number, describe(b, n * r, m2, n, r))
        halved = dataclasses.replace(problem, layout=BlockLayout(n * r, m2, 2 * n))
        premise = rank_premise(problem)
        if layout.num_parameters != m2 * r:
            premise = Premise(False, min(premise.margin, -1.0))
        for role, instance, met in (("claim", problem, premise), ("control", halved, rank_premise(halved))):
            statement = "DiaBlo reaches the full optimum with blocks of rank X rows (control: half as tall)"
            lost = max(diablo_excesses(instance))
            verdicts.append(trial.vanishes(role, statement, met, lost, tolerance("gap", arithmetic.dtype)))
        verdicts += _lora_verdicts(trial, problem, min(r, m2), arithmetic.dtype)
    return verdicts


def _lora_verdicts(trial: Trial, problem: LinearProblem, enough: int, dtype: torch.dtype) -> list[Verdict]:
    """LoRA below the rank that it needs loses exactly the tail; at that rank it loses nothing."""
    verdicts, gap = [], tolerance("gap", dtype)
    at_budget, per_rank = optima.lora_rank_at_budget(problem.layout), sum(problem.W0.shape)
    fits = at_budget * per_rank <= problem.layout.num_parameters < (at_budget + 1) * per_rank
    for role, rho in (("claim", at_budget), ("control", enough)):
        premise = Premise(fits and rho < enough, min(enough - rho, 1 if fits else 0) - 0.5)
        statement = "LoRA at DiaBlo's budget has a positive gap (control: at rank min(r, m2))"
        verdicts.append(trial.stays_positive(role, statement, premise, lora_excesses(problem, rho)[1], gap))
    for role, rho in (("claim", enough), ("control", enough - 1)):
        premise = Premise(rho >= enough, rho - enough + 0.5)
        statement = "LoRA of rank min(r, m2), with r (m1 + m2) parameters, has gap 0 (control: one rank less)"
        verdicts.append(trial.vanishes(role, statement, premise, lora_excesses(problem, rho)[1], gap))
    predicted = oracles.relative_tails(problem)[at_budget]
    for role, rho in (("claim", at_budget), ("control", at_budget + 1)):
        off = max(abs(answer / predicted - 1) for answer in lora_excesses(problem, rho))
        premise = Premise(rho == at_budget, 0.5 - abs(rho - at_budget))
        statement = "LoRA's gap is the tail of the singular values of P_X R at its rank (control: another rank)"
        verdicts.append(trial.vanishes(role, statement, premise, off, tolerance("loss", dtype)))
    return verdicts


def frozen_factor(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L6 [beyond the paper]: LoRA with a frozen generic A of rank X does all that DiaBlo does, at its parameters.

    - A frozen A with rank XA = rank X reaches every target: a generic one, and X itself, whose columns span col X.
      Premise margin: decades of sigma_r(XA), r = rank X, above the cutoff. Controls: A of rank r - 1, and A of rank r
      with one column that X does not see. Measured is the larger of the closed form's relative gap and the
      minimiser's, evaluated after projecting it onto col A.
    - Side by side at m2 r parameters, with N = m1/r: DiaBlo and the frozen A lose nothing, LoRA with both factors
      does. Premise: rank X <= r and rank P_X R > LoRA's rank; margin, the smaller difference, shifted by half a rank
      (-1 at most where the parameters are not equal). Controls: rank X = r + 1 for the first two, a rank-one target
      for LoRA.
    - It is convex: L1's midpoint, with LoRA of both factors as the control.

    Args:
        generator: Where the instances come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Nine claims and eight controls for each size.

    Source: theory.md, L6.
    """
    verdicts = []
    for b, m2, n, r in _BUDGETS:
        layout = BlockLayout(n * r, m2, n)
        problem = clear_problem(layout, b, r, generator, arithmetic)
        A = _generic_factor(problem, r, generator, arithmetic)
        trial = Trial("L6", number, describe(b, n * r, m2, n, r))
        beyond = clear_problem(layout, b, r + 1, generator, arithmetic)
        low = clear_problem(layout, b, r, generator, arithmetic, target="low-rank")
        verdicts += _reach_verdicts(trial, problem, A)
        for instance, rank, target, roles in (
            (problem, r, "generic", ("claim", "claim", "claim")),
            (beyond, r + 1, "generic", ("control", "control", "claim")),
            (low, r, "low-rank", ("claim", "claim", "control")),
        ):
            described = Trial("L6", number, describe(b, n * r, m2, n, rank) + f" target={target}")
            own = _generic_factor(instance, r, generator, arithmetic)
            verdicts += _side_by_side(described, instance, own, roles)
        verdicts += _convex(trial, problem, A, generator)
    return verdicts


def _generic_factor(problem: LinearProblem, rho: int, generator: torch.Generator, arithmetic: Arithmetic) -> Tensor:
    """The usual A, drawn until XA has as clear a rank as the instances' X."""
    m1, m2 = problem.W0.shape
    while True:
        A = arithmetic.place(usual_start(m1, m2, rho, generator).A)
        if _relative_spectrum(problem.X, A)[-1] * LARGEST_CONDITION >= 1:
            return A


def _relative_spectrum(X: Tensor, A: Tensor) -> Float[Tensor, " k"]:
    """Singular values of XA, relative to ``||X|| ||A||``."""
    X, A = wide(X), wide(A)
    scale = torch.linalg.matrix_norm(X, 2) * torch.linalg.matrix_norm(A, 2)
    relative: Tensor = torch.linalg.svdvals(X @ A) / scale
    return relative


def _reach_premise(X: Tensor, A: Tensor) -> Premise:
    """``rank XA = rank X``."""
    margin = rank_margin(_relative_spectrum(X, A), int(column_space(X).rank), X.dtype)
    return Premise(margin > 0, margin)


def _reach_verdicts(trial: Trial, problem: LinearProblem, A: Tensor) -> list[Verdict]:
    X, blind = problem.X, A.clone()
    seen = torch.linalg.pinv(wide(X), rtol=tolerance("rank", X.dtype).value) @ wide(X)
    column = wide(A[:, -1:])
    blind[:, -1:] = (column - seen @ column).to(A)
    everything = LinearProblem(X, X.new_zeros(X.shape[1], X.shape[1]), X, BlockLayout(X.shape[1], X.shape[1], 1))
    verdicts = []
    for target, instance in (("a generic target", problem), ("X itself", everything)):
        for role, factor, what in (
            ("claim", A, "of rank X"),
            ("control", A[:, :-1], "one rank less"),
            ("control", blind, "with a column that X does not see"),
        ):
            statement = f"LoRA with a frozen A {what} reaches {target}"
            lost = max(frozen_excesses(instance, factor))
            premise = _reach_premise(instance.X, factor)
            verdicts.append(trial.vanishes(role, statement, premise, lost, tolerance("gap", X.dtype)))
    return verdicts


def _side_by_side(trial: Trial, problem: LinearProblem, A: Tensor, roles: tuple[str, str, str]) -> list[Verdict]:
    """The three methods at DiaBlo's parameters, each with its role; the premise is measured by ranks."""
    layout, gap = problem.layout, tolerance("gap", problem.X.dtype)
    rho, r = optima.lora_rank_at_budget(layout), layout.block_rows
    m2, rank = layout.out_features, int(column_space(problem.X).rank)
    target_rank = sum(tail > gap.value for tail in oracles.relative_tails(problem))
    equal = layout.num_parameters == m2 * r == m2 * A.shape[1] and rho * sum(problem.W0.shape) <= m2 * r
    verdicts = []
    measured = (
        ("DiaBlo", max(diablo_excesses(problem)), r - rank),
        ("LoRA with a frozen A", max(frozen_excesses(problem, A)), r - rank),
        ("LoRA", min(lora_excesses(problem, rho)), target_rank - rho - 1),
    )
    for role, (name, lost, room_left) in zip(roles, measured, strict=True):
        margin = min(room_left + 0.5, 1.0 if equal else -1.0)
        premise = Premise(margin > 0, margin)
        if name == "LoRA":
            statement = "at m2 r parameters LoRA with both factors loses (control: a rank-one target)"
            verdicts.append(trial.stays_positive(role, statement, premise, lost, gap))
        else:
            statement = f"at m2 r parameters {name} loses nothing (control: rank X = r + 1)"
            verdicts.append(trial.vanishes(role, statement, premise, lost, gap))
    return verdicts


def _convex(trial: Trial, given: LinearProblem, A: Tensor, generator: torch.Generator) -> list[Verdict]:
    problem, dtype = oracles.widened(given), given.X.dtype
    frozen = parametrisations.frozen_lora(problem, wide(A))
    both = parametrisations.lora(
        problem, usual_start(given.layout.in_features, given.layout.out_features, 1, generator)
    )
    ends, best = gaussian(2, frozen.size, generator), wide(parametrisations.best_factors(given, 1))
    statement = "LoRA with a frozen A has no midpoint above the mean of its ends (control: both factors trained)"
    return [
        trial.vanishes(
            role,
            statement,
            linearity(method, a, b, dtype),
            midpoint_excess(method, a, b),
            tolerance("convexity", dtype),
        )
        for role, method, a, b in (("claim", frozen, ends[0], ends[1]), ("control", both, best, -best))
    ]
