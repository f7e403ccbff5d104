"""What the theory says of a layer: how much of the asked-for change each method can make, and S3's certificate.

Two captures must not be confused. The *set* capture is that of the method's best member; the *tangent* capture is that
of the directions open at its start. For linear sets (DiaBlo, frozen A) they agree. LoRA's set, the updates of rank at
most rho, holds the tangent where B = 0 (usual, EVA); elsewhere the tangent's updates have rank up to 2 rho and may
capture more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import optima, starts
from diablo_theory.theory.reduction import ReducedProblem
from diablo_theory.theory.starts import Start
from diablo_theory.theory.stationarity import certificate_of, premise_of
from diablo_theory.theory.statistics import LayerStatistics, energy_rank

CAPTURE_COLUMNS: tuple[str, ...] = ("num_blocks", "method", "start", "kind", "rank", "num_parameters", "capture")


def captures(
    problem: ReducedProblem,
    num_blocks: Sequence[int],
    generator: torch.Generator,
    W0: Float[Tensor, "m1 m2"] | None = None,
    iterations: int | None = None,
) -> pd.DataFrame:
    """Captured share of what full fine-tuning captures, for every method at DiaBlo's parameters.

    Args:
        problem: One layer, direct or from sums, with R = -g_Y.
        num_blocks: N, one or several.
        generator: Where LoRA's random factors come from.
        W0: The frozen weight, shape (m1, m2), for the starts that look at it (PiSSA, CorDA); left out without it.
        iterations: None for exact SVDs in the data-aware starts; else power iterations of randomised ones.

    Returns:
        One row for each N, method, start and kind ("set", "tangent", or "both" where they agree), columns
        ``CAPTURE_COLUMNS``. DiaBlo's rank is d1, the others' is the largest within DiaBlo's parameters. Capture is
        from 0 to 1, and 1 where there is nothing to capture.

    Raises:
        ValueError: If a number of blocks, the iterations or W0 does not fit.
        NonFiniteError: If W0 holds a NaN or an infinity.

    Source: theory.md, "At scale, from sums alone".
    """
    m1, m2 = problem.space.coordinates.shape[-1], problem.target.shape[-1]
    set_gaps = optima.lora_relative_gaps(problem)
    rows: list[tuple[object, ...]] = []
    for count in num_blocks:
        layout = BlockLayout(m1, m2, count)
        rho, frozen = optima.lora_rank_at_budget(layout), optima.frozen_rank_at_budget(layout)
        A = starts.usual_start(m1, m2, frozen, generator).A.to(problem.target.device)
        reached = [
            ("diablo", "zero", "both", layout.block_rows, optima.diablo_optimum(problem, layout, minimiser=False)),
            ("lora-frozen-a", "usual", "both", frozen, optima.frozen_lora_optimum(problem, A, minimiser=False)),
        ]
        for start in lora_starts(problem, rho, generator, W0, iterations):
            optimum = optima.lora_tangent_optimum(problem, start.A, start.B, minimiser=False)
            reached.append(("lora", start.name, "tangent", rho, optimum))
        rows += [(count, *what, best.num_parameters, _share(best.relative_gap)) for *what, best in reached]
        best_of_rank = _share(set_gaps[min(rho, len(set_gaps) - 1)])
        rows.append((count, "lora", "any", "set", rho, rho * (m1 + m2), best_of_rank))
    return pd.DataFrame(rows, columns=list(CAPTURE_COLUMNS))


def _share(relative_gap: Tensor) -> float:
    """The share that is captured; rounding may put a gap an eps above what there is."""
    return max(0.0, 1 - float(relative_gap))


def lora_starts(
    problem: ReducedProblem,
    rank: int,
    generator: torch.Generator,
    W0: Float[Tensor, "m1 m2"] | None = None,
    iterations: int | None = None,
) -> list[Start]:
    """LoRA's usual start and the data-aware ones of one rank, on the problem's device.

    LoRA-GA needs twice the rank, and is left out where the layer has not that many directions.

    Args:
        problem: One layer, with R = -g_Y.
        rank: rho.
        generator: Where the usual start comes from.
        W0: The frozen weight, for PiSSA and CorDA; left out without it.
        iterations: As in :func:`captures`.

    Raises:
        ValueError: If the rank, the iterations or W0 does not fit.
        NonFiniteError: If W0 holds a NaN or an infinity.
    """
    space, device = problem.space, problem.target.device
    m1, m2 = space.coordinates.shape[-1], problem.target.shape[-1]
    usual = starts.usual_start(m1, m2, rank, generator)
    found = [Start(usual.name, usual.A.to(device), usual.B.to(device)), starts.eva_start(space, m2, rank)]
    if 2 * rank <= min(m1, m2):
        found.append(starts.lora_ga_start(problem, rank, iterations))
    if W0 is not None:
        if W0.shape != (m1, m2):
            raise ValueError(f"W0 must have shape {(m1, m2)}, got {tuple(W0.shape)}")
        found += [starts.pissa_start(W0, rank, iterations), starts.corda_start(space, W0, rank, iterations)]
    return found


def certificates(layers: Mapping[str, LayerStatistics], num_blocks: int, rtol: float | None = None) -> pd.DataFrame:
    """S3 for every layer of a network: how far a vanishing gradient of the blocks is from a vanishing full one.

    Args:
        layers: Sums by layer, with R = -g_Y, as :func:`recording.record` makes them.
        num_blocks: N.
        rtol: The rank decision, as in :meth:`LayerStatistics.reduce`.

    Returns:
        One row a layer: layer, then what :func:`certificate_row` says of it.

    Raises:
        ValueError: If there is no layer, or num_blocks or rtol does not fit one.

    Source: theory.md, S3.
    """
    if not layers:
        raise ValueError("layers must hold at least one layer's statistics, got none")
    return pd.DataFrame(
        [{"layer": name} | certificate_row(sums, sums.reduce(rtol), num_blocks) for name, sums in layers.items()]
    )


def certificate_row(sums: LayerStatistics, problem: ReducedProblem, num_blocks: int) -> dict[str, int | float]:
    """S3 for one layer.

    Args:
        sums: Of the layer, with R = -g_Y.
        problem: What ``sums.reduce()`` gave, with any rtol: it is the costly part, and :func:`captures` takes it too.
        num_blocks: N.

    Returns:
        in_features, out_features, tokens, num_blocks, block_rows, rank, energy_rank (of 99% of ``||X||_F^2``),
        premise_holds, premise_margin (decades), grad_full, grad_blocks, amplification, leak, bound
        (amplification * grad_blocks + leak), tightness (grad_full / bound, at most 1 up to rounding; 1 where both are
        zero) and leak_share (leak / grad_full, 0 where both are zero).

    Raises:
        ValueError: If num_blocks does not fit the layer.

    Source: theory.md, S3.
    """
    layout = BlockLayout(sums.in_features, sums.out_features, num_blocks)
    exponent = torch.tensor(sums.x_exponent + sums.r_exponent, device=sums.sums.device)
    premise = premise_of(problem.space, layout)
    found = certificate_of(problem.space, sums.cross, exponent, layout)
    return {
        "in_features": layout.in_features,
        "out_features": layout.out_features,
        "tokens": sums.tokens,
        "num_blocks": num_blocks,
        "block_rows": layout.block_rows,
        "rank": premise.rank,
        "energy_rank": energy_rank(problem.space),
        "premise_holds": premise.holds,
        "premise_margin": premise.margin,
        "grad_full": found.grad_full,
        "grad_blocks": found.grad_blocks,
        "amplification": found.amplification,
        "leak": found.leak,
        "bound": found.bound,
        "tightness": found.tightness,
        "leak_share": found.leak_share,
    }
