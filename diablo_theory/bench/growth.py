"""How the cost of DiaBlo's part, above the frozen layer's, grows with 1/N and with tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from diablo_theory.bench.measuring import WARMUP_ROUNDS, paired
from diablo_theory.bench.workloads import Step, linear

BLOCKS = (1, 2, 4, 8, 16)
TOKENS = (512, 1024, 2048, 4096)


def growth(
    advance: Callable[[int], None],
    width: int = 2048,
    blocks: Sequence[int] = BLOCKS,
    tokens: Sequence[int] = TOKENS,
    rounds: int = 9,
    device: torch.device | None = None,
) -> pd.DataFrame:
    """Seconds that merged mode adds to the forward and backward pass of a frozen square layer.

    Operations say 2 (tokens) width^2 / N, an exponent of -1 in N and of 1 in tokens, as long as the products are
    bound by arithmetic; small blocks are bound by reading inputs and output gradients, which does not shrink with N.

    Args:
        advance: Told the number of rounds finished; in all ``work(blocks, tokens, rounds)``.
        width: Inputs and outputs of the layer.
        blocks: N, at the second of the token counts.
        tokens: Token counts, at the third N.
        rounds: Paired rounds of each.
        device: The CPU if left out.

    Returns:
        Columns ``varied`` ("num_blocks" or "tokens"), num_blocks, tokens, extra_seconds (median of the paired
        differences), over_floor (median ratio) and exponent (the fitted slope of that row's curve).
    """
    where = device or torch.device("cpu")
    curves: dict[str, list[dict[str, Any]]] = {
        "num_blocks": [_extra(width, n, tokens[1], rounds, where, advance) for n in blocks],
        "tokens": [_extra(width, blocks[2], count, rounds, where, advance) for count in tokens],
    }
    rows = []
    for varied, points in curves.items():
        extra = [point["extra_seconds"] for point in points]
        slope = float("nan")
        if min(extra) > 0:
            slope = float(np.polyfit(np.log([point[varied] for point in points]), np.log(extra), 1)[0])
        rows += [{"varied": varied, **point, "exponent": slope} for point in points]
    return pd.DataFrame(rows)


def work(blocks: Sequence[int] = BLOCKS, tokens: Sequence[int] = TOKENS, rounds: int = 9) -> int:
    """The units that :func:`growth` advances by."""
    return (len(blocks) + len(tokens)) * (rounds + WARMUP_ROUNDS)


def _extra(
    width: int, num_blocks: int, tokens: int, rounds: int, device: torch.device, advance: Callable[[int], None]
) -> dict[str, Any]:
    workload = linear(width, width, tokens, device)
    steps = [Step(workload, name, num_blocks) for name in ("floor", "diablo")]
    times = paired(steps, rounds, device, advance)
    passes = times[times["phase"].isin(["forward", "backward"])]
    wide = passes.pivot_table(index="round", columns="method", values="seconds", aggfunc="sum")
    floor, ours = (wide[step.label] for step in steps)
    return {
        "num_blocks": num_blocks,
        "tokens": tokens,
        "extra_seconds": float((ours - floor).median()),
        "over_floor": float((ours / floor).median()),
    }
