"""L2 and L4: when DiaBlo reaches the full-fine-tuning minimum, and what LoRA needs for that at equal budget."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diablo_theory import ops
from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima, problems, stationarity
from diablo_theory.theory.arithmetic import Arithmetic, gaussian
from diablo_theory.theory.column_space import column_space
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
_INSUFFICIENT = ((48, 24, 18, 4, 7), (48, 24, 18, 4, 20), (40, 23, 17, 4, 6), (30, 12, 10, 12, 2), (30, 20, 3, 5, 6))
# b, m2, N, rank X (even), with m1 = N rank X: wide, ragged outputs, fewer outputs than the rank
_BUDGETS = ((40, 18, 3, 6), (40, 11, 4, 4), (40, 4, 3, 8))


def relative_excess(problem: LinearProblem, dW: Tensor) -> float:
    """What an update loses against full fine-tuning, by evaluating it: ``||X dW - P_X R||^2 / ||P_X R||^2``.

    P_X R comes from a least-squares driver that shares no code with the closed forms. Where nothing is captured by
    full fine-tuning the excess is ``||X dW||^2 / ||R||^2``.

    Args:
        problem: The linear problem.
        dW: Shape (m1, m2), float64.

    Returns:
        From 0 up, free of scale.
    """
    fitted = projection(problem.X, problem.R)
    total = fitted.square().sum() if bool(fitted.any()) else problem.R.square().sum()
    return float((problem.X @ dW - fitted).square().sum() / total)


def projection(X: Tensor, R: Tensor) -> Tensor:
    """P_X R, shape (b, m2), by LAPACK's least squares (gelsd) at the "rank" tolerance.

    Not gelsy: in torch 2.13 two calls on the same numbers differ in the last digits.
    """
    if not bool(X.any()):
        return torch.zeros_like(R)
    rcond = tolerance("rank", X.dtype).value
    solution: Tensor = torch.linalg.lstsq(X, R, rcond=rcond, driver="gelsd").solution
    return X @ solution


def _diablo_excess(problem: LinearProblem) -> float:
    """The larger of two answers: the closed form's gap, and its minimiser evaluated through the block product."""
    layout = problem.layout
    optimum = optima.diablo_optimum(reduce_problem(problem), layout)
    blocks, tail = layout.gather(optimum.update)
    inside = layout.scatter(blocks, tail)
    fitted = projection(problem.X, problem.R)
    total = fitted.square().sum() if bool(fitted.any()) else problem.R.square().sum()
    evaluated = float((ops.block_product(problem.X, blocks, tail, layout) - fitted).square().sum() / total)
    outside = float((optimum.update - inside).abs().max())
    return max(float(optimum.relative_gap), evaluated) if outside == 0.0 else float("inf")


def _premise(problem: LinearProblem) -> Premise:
    premise = stationarity.rank_premise(problem.X, problem.layout)
    return Premise(premise.holds, premise.margin)


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
            problem = problems.linear_problem(BlockLayout(m1, m2, n), b, rank, generator)
            trial = Trial("L2", number, describe(b, m1, m2, n, rank))
            verdicts.append(_gap_verdict(trial, role, "gap 0 for a generic target", problem))
            if role == "claim":
                T = optima.worst_case_target(problem.X, problem.W0, problem.layout, column_space(problem.X))
                worst = dataclasses.replace(problem, T=T)
                verdicts.append(_gap_verdict(trial, role, "gap 0 for the worst-case target", worst))
    problem = _with_duplicates(problems.linear_problem(BlockLayout(24, 18, 4), 48, 5, generator))
    trial = Trial("L2", number, describe(48, 24, 18, 4, 5) + " duplicated")
    return [*verdicts, _gap_verdict(trial, "control", "gap 0 with one column repeated in a block", problem)]


def _gap_verdict(trial: Trial, role: str, statement: str, problem: LinearProblem) -> Verdict:
    return trial.vanishes(role, statement, _premise(problem), _diablo_excess(problem), tolerance("gap"))


def _with_duplicates(problem: LinearProblem) -> LinearProblem:
    """Overwrite the first block's columns by copies of its first: rank X stays, rank X_1 becomes 1."""
    X, rows = problem.X.clone(), problem.layout.rows(0)
    X[:, rows] = X[:, :1]
    return dataclasses.replace(problem, X=X)


def budget(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L4: at ``m2 r`` parameters DiaBlo reaches the full optimum, and LoRA of that budget loses a known tail.

    Four statements, each with its control. Premise margins: for DiaBlo as in :func:`sufficiency` (at most -1 if the
    blocks do not hold exactly m2 r parameters); for LoRA a count of ranks, ``min(r, m2) - rho`` where it is to lose
    (cut at 1, and at 0 if the budget's rank is not the largest that fits), ``rho - min(r, m2)`` where it is to win,
    ``-|rho - budget's rank|`` for the tail's value, each shifted by half a rank so that its sign decides. Claim
    margins: decades from the tolerance; for the tail's value, of the relative difference between the minimiser's
    evaluated loss and singular values found through a random range finder.

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
        problem = problems.linear_problem(layout, b, r, generator)
        trial = Trial("L4", number, describe(b, n * r, m2, n, r))
        halved = dataclasses.replace(problem, layout=BlockLayout(n * r, m2, 2 * n))
        premise = _premise(problem)
        if layout.num_parameters != m2 * r:
            premise = Premise(False, min(premise.margin, -1.0))
        for role, instance, met in (("claim", problem, premise), ("control", halved, _premise(halved))):
            statement = "DiaBlo reaches the full optimum with blocks of rank X rows (control: half as tall)"
            verdicts.append(trial.vanishes(role, statement, met, _diablo_excess(instance), tolerance("gap")))
        verdicts += _lora_verdicts(trial, problem, min(r, m2), generator)
    return verdicts


def _lora_verdicts(trial: Trial, problem: LinearProblem, enough: int, generator: torch.Generator) -> list[Verdict]:
    """LoRA below the rank that it needs loses exactly the tail; at that rank it loses nothing."""
    verdicts = []
    reduced = reduce_problem(problem)
    at_budget, per_rank = optima.lora_rank_at_budget(problem.layout), sum(problem.W0.shape)
    fits = at_budget * per_rank <= problem.layout.num_parameters < (at_budget + 1) * per_rank
    tails = _relative_tails(problem, generator)
    for role, rho in (("claim", at_budget), ("control", enough)):
        lost = relative_excess(problem, optima.lora_optimum(reduced, rho).update)
        premise = Premise(fits and rho < enough, min(enough - rho, 1 if fits else 0) - 0.5)
        statement = "LoRA at DiaBlo's budget has a positive gap (control: at rank min(r, m2))"
        verdicts.append(trial.stays_positive(role, statement, premise, lost, tolerance("gap")))
    for role, rho in (("claim", enough), ("control", enough - 1)):
        lost = relative_excess(problem, optima.lora_optimum(reduced, rho).update)
        premise = Premise(rho >= enough, rho - enough + 0.5)
        statement = "LoRA of rank min(r, m2), with r (m1 + m2) parameters, has gap 0 (control: one rank less)"
        verdicts.append(trial.vanishes(role, statement, premise, lost, tolerance("gap")))
    predicted = tails[at_budget]
    for role, rho in (("claim", at_budget), ("control", at_budget + 1)):
        optimum = optima.lora_optimum(reduced, rho)
        answers = (relative_excess(problem, optimum.update), float(optimum.relative_gap))
        off = max(abs(answer / predicted - 1) for answer in answers)
        premise = Premise(rho == at_budget, 0.5 - abs(rho - at_budget))
        statement = "LoRA's gap is the tail of the singular values of P_X R at its rank (control: another rank)"
        verdicts.append(trial.vanishes(role, statement, premise, off, tolerance("loss")))
    return verdicts


def _relative_tails(problem: LinearProblem, generator: torch.Generator) -> list[float]:
    """``sum_{j>rho} sigma_j(P_X R)^2 / ||P_X R||^2`` for rho = 0, 1, .., through a random range finder and QR."""
    rank = torch.linalg.matrix_rank(problem.X, rtol=tolerance("rank").value)
    probe = gaussian(problem.X.shape[1], int(rank), generator)
    Q, _ = torch.linalg.qr(problem.X @ probe)
    squares = torch.linalg.svdvals(Q.T @ problem.R).square()
    tails = squares.flip(0).cumsum(0).flip(0) / squares.sum()
    return [*tails.tolist(), 0.0]
