"""The block product and the block gradient against ``torch.einsum``, over shapes and numbers of blocks."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.ops import block_gradient, block_product

#: Inputs by outputs, small to large, square and not, and two that few N divide.
SHAPES = ((64, 64), (576, 192), (576, 1536), (1536, 576), (1000, 700), (4096, 4096), (4096, 11_008), (11_008, 4096))
#: What one timing takes at least, so that the clock and a stray interrupt do not matter.
SECONDS = 0.004
#: Inputs are taken in turn from copies of this many bytes in all, so that they come from beyond a core's own cache, as
#: they do in training, where a whole model lies between a forward and a backward pass.
POOL = 64 * 2**20


Inputs = Sequence[tuple[Tensor, Tensor]]


def some_block_counts(m1: int, m2: int) -> list[int]:
    """Powers of four from 1, one ragged N, and min(m1, m2)."""
    most = min(m1, m2)
    powers = [4**i for i in range(int(math.log(most, 4)) + 1)]
    return sorted({*powers, 7, most})


def einsum_product(x: Tensor, blocks: Tensor, m2: int) -> Tensor:
    """The paper's formulation, zero-padded where N does not divide the sizes as the authors' code does."""
    num_blocks, d1, _ = blocks.shape
    padded = torch.nn.functional.pad(x, (0, num_blocks * d1 - x.shape[1])) if num_blocks * d1 != x.shape[1] else x
    out = torch.einsum("tni,nio->tno", padded.view(x.shape[0], num_blocks, d1), blocks)
    return out.reshape(x.shape[0], -1)[:, :m2]


def einsum_gradient(x: Tensor, g: Tensor, layout: BlockLayout) -> Tensor:
    """What autograd makes of :func:`einsum_product` for the blocks."""
    parts = []
    for matrix, size in ((x, layout.block_rows), (g, layout.block_cols)):
        missing = layout.num_blocks * size - matrix.shape[1]
        padded = torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix
        parts.append(padded.view(matrix.shape[0], layout.num_blocks, size))
    return torch.einsum("tni,tno->nio", *parts)


def compare_kernels(
    advance: Callable[[int], None],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: int = 512,
    rounds: int = 9,
    device: torch.device | None = None,
) -> pd.DataFrame:
    """Time both kernels against einsum, in turn in one process, in float32.

    Args:
        advance: Told 1 for each finished shape.
        shapes: Inputs by outputs.
        tokens: Rows.
        rounds: Paired rounds of each pair.
        device: The CPU if left out.

    Returns:
        One row for each shape, N and kernel: m1, m2, num_blocks, tokens, kernel ("product" or "gradient"),
        einsum_seconds (median), ratio (ours to einsum's, median of the paired rounds), smallest and largest ratio.
    """
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for m1, m2 in shapes:
        copies = max(1, round(POOL / (4 * tokens * (m1 + m2))))
        where = device or torch.device("cpu")
        pool = [
            (
                torch.randn(tokens, m1, generator=generator).to(where),
                torch.randn(tokens, m2, generator=generator).to(where),
            )
            for _ in range(copies)
        ]
        for num_blocks in some_block_counts(m1, m2):
            for kernel, (ours, einsum) in _pairs(pool, BlockLayout(m1, m2, num_blocks)).items():
                ratios, seconds = _paired_ratio(ours, einsum, rounds)
                rows.append(
                    {"m1": m1, "m2": m2, "num_blocks": num_blocks, "tokens": tokens, "kernel": kernel}
                    | {"einsum_seconds": seconds, "ratio": statistics.median(ratios)}
                    | {"smallest": min(ratios), "largest": max(ratios)}
                )
        advance(1)
    return pd.DataFrame(rows)


def _pairs(pool: Inputs, layout: BlockLayout) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    blocks, tail = layout.gather(torch.randn(layout.in_features, layout.out_features).to(pool[0][0].device))
    blocks, tail = blocks.contiguous(), None if tail is None else tail.contiguous()
    padded = blocks.new_zeros(layout.num_blocks, layout.block_rows, layout.block_cols).normal_()
    return {
        "product": (
            _in_turn(pool, lambda x, _: block_product(x, blocks, tail, layout)),
            _in_turn(pool, lambda x, _: einsum_product(x, padded, layout.out_features)),
        ),
        "gradient": (
            _in_turn(pool, lambda x, g: block_gradient(x, g, layout)),
            _in_turn(pool, lambda x, g: einsum_gradient(x, g, layout)),
        ),
    }


def _in_turn(pool: Inputs, work: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
    turn = itertools.cycle(pool)
    return lambda: work(*next(turn))


def _paired_ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[list[float], float]:
    repeats = max(1, math.ceil(SECONDS / max(_seconds(theirs, 2), 1e-7)))
    _seconds(ours, 2)
    ratios, bases = [], []
    for index in range(rounds):
        if index % 2:
            base, own = _seconds(theirs, repeats), _seconds(ours, repeats)
        else:
            own, base = _seconds(ours, repeats), _seconds(theirs, repeats)
        ratios.append(own / base)
        bases.append(base)
    return ratios, statistics.median(bases)


def _seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats
