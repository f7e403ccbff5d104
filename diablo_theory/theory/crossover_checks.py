"""L5: DiaBlo is not always ahead of LoRA; it depends on where the target lies."""

from __future__ import annotations

import torch

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima
from diablo_theory.theory.arithmetic import Arithmetic, wide
from diablo_theory.theory.column_space import column_space, written_groups
from diablo_theory.theory.instances import clear_problem
from diablo_theory.theory.measures import diablo_excesses, lora_excesses
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, describe, room

# b, m1, m2, N, for which DiaBlo's parameters buy LoRA a rank: wide blocks; ragged; few outputs
_SIZES = ((40, 24, 18, 3), (40, 23, 17, 4), (40, 20, 6, 4))


def crossover(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """L5 [beyond the paper]: at equal parameters LoRA is ahead of DiaBlo on a dense low-rank dW*, behind in blocks.

    The target is ``X (W0 + dW*)`` throughout, with X of full column rank, above d1.

    - LoRA has gap 0, its rank rho the largest with no more parameters than DiaBlo. Premise: dW* has rank rho;
      margin, decades of sigma_{rho+1} / sigma_1 below the rank cutoff. Control: a block-aligned dW*, of the rank of
      its blocks.
    - DiaBlo has a positive gap. Premise: X is of full column rank and dW* has entries outside the blocks; margin, the
      smaller of ``rank X - m1 + 1/2`` and the decades of their share of ``||dW*||^2`` above the gap's tolerance.
      Controls, where DiaBlo has no gap: the block-aligned dW*, and the dense one with rank X = d1 (the rows of the
      shortest block), where L2 holds.

    Measured are both answers of each method, the closed form's relative gap and its minimiser's: the larger where they
    should vanish, the smaller where they should not.

    Args:
        generator: Where the instances come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Two claims and three controls for each size.

    Source: theory.md, L5.
    """
    verdicts = []
    for b, m1, m2, n in _SIZES:
        layout = BlockLayout(m1, m2, n)
        shortest = min(layout.rows(i).stop - layout.rows(i).start for i in written_groups(layout))
        for role, target, rank in (
            ("claim", "low-rank", m1),
            ("control", "block-aligned", m1),
            ("control", "low-rank", shortest),
        ):
            rho = optima.lora_rank_at_budget(layout)
            problem = clear_problem(layout, b, rank, generator, arithmetic, target=target, target_rank=rho)
            trial = Trial("L5", number, describe(b, m1, m2, n, rank) + f" target={target}")
            if rank == m1:
                verdicts.append(_lora_verdict(trial, role, problem))
            verdicts.append(_diablo_verdict(trial, role, problem))
    return verdicts


def _lora_verdict(trial: Trial, role: str, problem: LinearProblem) -> Verdict:
    sigma, dtype = torch.linalg.svdvals(wide(_truth(problem))), problem.X.dtype
    rho = optima.lora_rank_at_budget(problem.layout)
    margin = room(float(sigma[rho] / sigma[0]), tolerance("rank", dtype).value)
    lost = max(lora_excesses(problem, rho))
    statement = "LoRA loses nothing on an update of its own rank (control: a block-aligned one)"
    return trial.vanishes(role, statement, Premise(margin > 0, margin), lost, tolerance("gap", dtype))


def _diablo_verdict(trial: Trial, role: str, problem: LinearProblem) -> Verdict:
    layout, truth, gap = problem.layout, wide(_truth(problem)), tolerance("gap", problem.X.dtype)
    outside = truth - layout.scatter(*layout.gather(truth))
    share = float(outside.square().sum() / truth.square().sum())
    margin = min(int(column_space(problem.X).rank) - layout.in_features + 0.5, -room(share, gap.value))
    statement = "DiaBlo loses on an update outside its blocks (controls: inside them; rank X = d1)"
    return trial.stays_positive(role, statement, Premise(margin > 0, margin), min(diablo_excesses(problem)), gap)


def _truth(problem: LinearProblem) -> torch.Tensor:
    assert problem.truth is not None
    return problem.truth
