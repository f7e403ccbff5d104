"""Maps over a grid: what DiaBlo and LoRA miss as the rank of the input and the number of blocks vary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import gaussian, seeded
from diablo_theory.theory.column_space import ColumnSpace, column_space, group_svd, written_groups
from diablo_theory.theory.optima import lora_rank_at_budget
from diablo_theory.theory.problems import low_rank_inputs

RANKS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
# At 64 blocks of one entry the budget would not buy LoRA a single rank.
BLOCK_COUNTS: tuple[int, ...] = (1, 2, 4, 8, 16, 32)


def gap_map(
    ranks: Sequence[int] = RANKS,
    block_counts: Sequence[int] = BLOCK_COUNTS,
    rows: int = 128,
    size: int = 64,
    targets: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Gaps of DiaBlo and of LoRA at DiaBlo's budget, for generic targets, over rank X and the number of blocks.

    A gap is a fraction of ``1/2 ||P_X R||^2``: 0 is full fine-tuning, 1 captures nothing. LoRA's rank is rounded down
    to DiaBlo's parameters: at many blocks it is 0 and its gap 1. Cells of one rank share X, its SVD and the targets.

    Args:
        ranks: Ranks of X, each from 1 to min(rows, size).
        block_counts: N, each from 1 to size.
        rows: b.
        size: m1 = m2.
        targets: Independent generic residuals to average over, at least 1.
        seed: Where all draws come from; a cell depends on the seed and its rank only.
        progress: Called with a short text before each rank.

    Returns:
        One row a cell: rank_x, num_blocks, block_rows, diablo_params, lora_rank, lora_params, diablo_gap, lora_gap and
        in_theorem, whether rank_x <= block_rows.

    Raises:
        ValueError: If a rank, a block count or targets is out of range.

    Source: theory.md, L2, L4 and L5.
    """
    _check_grid(ranks, min(rows, size), targets)
    layouts = [BlockLayout(size, size, n) for n in block_counts]
    cells = []
    for rank in ranks:
        if progress is not None:
            progress(f"rank {rank} of up to {max(ranks)}")
        generator = seeded(seed * 1009 + rank)
        space = column_space(low_rank_inputs(rows, size, rank, generator))
        residuals = [space.basis.T @ gaussian(rows, size, generator) for _ in range(targets)]
        cells += [_cell(space, layout, residuals) for layout in layouts]
    return pd.DataFrame(cells)


def _check_grid(ranks: Sequence[int], largest: int, targets: int) -> None:
    if targets < 1:
        raise ValueError(f"targets must be at least 1, got {targets}")
    for rank in ranks:
        if not 1 <= rank <= largest:
            raise ValueError(f"ranks must lie from 1 to min(rows, size) = {largest}, got {rank}")


def _cell(space: ColumnSpace, layout: BlockLayout, residuals: list[Tensor]) -> dict[str, int | float | bool]:
    rho = lora_rank_at_budget(layout)
    missed = _diablo_missed(space, layout, torch.stack(residuals))
    captured = torch.stack([residual.square().sum() for residual in residuals])
    tails = torch.stack([torch.linalg.svdvals(residual)[rho:].square().sum() for residual in residuals])
    return {
        "rank_x": space.rank,
        "num_blocks": layout.num_blocks,
        "block_rows": layout.block_rows,
        "diablo_params": layout.num_parameters,
        "lora_rank": rho,
        "lora_params": rho * (layout.in_features + layout.out_features),
        "diablo_gap": float((missed / captured).mean()),
        "lora_gap": float((tails / captured).mean()),
        "in_theorem": space.rank <= layout.block_rows,
    }


def _diablo_missed(
    space: ColumnSpace, layout: BlockLayout, residuals: Float[Tensor, "targets r m2"]
) -> Float[Tensor, " targets"]:
    """``sum_i ||(I - P_{X_i}) R_i||^2`` in coordinates of col X, for every target at once, shape (targets,)."""
    total = residuals.new_zeros(residuals.shape[0])
    for i in written_groups(layout):
        U, _, _ = group_svd(space.group(layout, i), space.cutoff)
        target = residuals[:, :, layout.cols(i)]
        total += (target - U @ (U.T @ target)).square().sum(dim=(1, 2))
    return total
