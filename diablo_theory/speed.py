"""Speed and scale of the closed forms, measured: maps against a plain loop, one layer of a 7B model, and growth.

Times are compared one after the other in one process and reported as ratios: medians with the range of the pairs where
there are several, else the one measurement. Nothing here decides a test.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.linalg
import threadpoolctl
import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.provenance import peak_rss_gib
from diablo_theory.theory import optima, starts
from diablo_theory.theory.arithmetic import seeded
from diablo_theory.theory.maps import Grid, cell_problem, map_cells
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.statistics import LayerStatistics
from diablo_theory.theory.tolerances import tolerance

Progress = Callable[[str], None]
Result = TypeVar("Result")
Floats = npt.NDArray[np.float64]

BATCH = 2048
"""Tokens at a time."""
LARGE_GRID = Grid(
    ranks=(4, 8, 12, 16, 24, 32, 48, 64, 96, 128),
    conditions=(1.0, 10.0, 100.0, 1000.0, 10000.0),
    target="low-rank",
    target_ranks=(1, 2, 4, 8, 16, 32, 64, 128),
    noises=(0.0, 0.01, 0.1, 0.3, 1.0),
    block_counts=(2, 4, 8, 16, 32),
    rows=256,
    size=128,
    outputs=128,
    draws=1,
)
"""10,000 cells at b = 256, m1 = m2 = 128."""


@dataclass(frozen=True)
class Measure:
    """One line of a benchmark.

    Args:
        benchmark: "map", "layer" or "growth".
        quantity: What was measured.
        value: The median over repetitions, or the value where there is one.
        low: The smallest.
        high: The largest.
        unit: Such as "times" or "s".
        n: Repetitions.
        setting: The sizes, readable.
        aim: What was aimed for or expected before it was measured, readable; empty if nothing was.
    """

    benchmark: str
    quantity: str
    value: float
    low: float
    high: float
    unit: str
    n: int
    setting: str
    aim: str


def measure(benchmark: str, quantity: str, values: Sequence[float], unit: str, setting: str, aim: str = "") -> Measure:
    """The line of one quantity from its repetitions."""
    middle, low, high = float(np.median(values)), min(values), max(values)
    return Measure(benchmark, quantity, middle, low, high, unit, len(values), setting, aim)


def _timed(work: Callable[..., Result], *args: Any, **kwargs: Any) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work(*args, **kwargs)
    return time.perf_counter() - started, result


def plain_gaps(problem: LinearProblem, A: Tensor) -> tuple[float, float, float]:
    """The gaps of DiaBlo, LoRA and frozen-A LoRA on one problem, as a reader would write them with scipy.

    Each method has its least-squares solves (DiaBlo one for each block, LoRA a singular value decomposition of the
    fit); nothing is shared between problems.

    Args:
        problem: One linear problem; LoRA has the rank that DiaBlo's parameters buy.
        A: The frozen factor, shape (m1, rho).

    Returns:
        The three gaps relative to what full fine-tuning captures.
    """
    X, R, layout = problem.X.numpy(), problem.R.numpy(), problem.layout

    def fit(inputs: Floats, targets: Floats) -> Floats:
        return np.asarray(inputs @ scipy.linalg.lstsq(inputs, targets, cond=tolerance("rank").value)[0])

    def missed(inputs: Floats, targets: Floats) -> float:
        return float(np.square(targets - fit(inputs, targets)).sum())

    fitted = fit(X, R)
    full, captured = float(np.square(R - fitted).sum()), float(np.square(fitted).sum())
    diablo = sum(missed(X[:, layout.rows(i)], R[:, layout.cols(i)]) for i in range(layout.count))
    sigma = scipy.linalg.svd(fitted, compute_uv=False)
    lora = float(np.square(sigma[optima.lora_rank_at_budget(layout) :]).sum())
    return (diablo - full) / captured, lora / captured, (missed(X @ A.numpy(), R) - full) / captured


def map_against_loop(grid: Grid = LARGE_GRID, sample: int = 5, progress: Progress | None = None) -> pd.DataFrame:
    """A whole map against the plain loop, input by input in turn, and the same numbers from both.

    The loop is timed on a sample of each input's cells, drawn at random, since it takes seconds where the map takes
    hundredths; a cell's time is the mean over the sample. Drawing the problems counts for the map and not for the
    loop. Both run on one thread: matrices of this size gain nothing from more, and the threads of scipy's BLAS and of
    torch, awake in one process, would slow the loop several times over.

    Args:
        grid: The map; one draw a cell.
        sample: Cells of each input that the loop does.
        progress: Called with a short text before each input.

    Returns:
        One row a :class:`Measure`: the loop's time a cell over the map's (one value an input), both times, and the
        largest difference of any gap, as a share of what full fine-tuning captures.
    """
    with threadpoolctl.threadpool_limits(1):
        return _map_against_loop(grid, sample, progress)


def _map_against_loop(grid: Grid, sample: int, progress: Progress | None) -> pd.DataFrame:
    generator = np.random.default_rng(grid.seed)
    ratios, ours, theirs, off = [], [], [], 0.0
    tasks = grid.tasks()
    for number, task in enumerate(tasks):
        if progress is not None:
            progress(f"input {number + 1} of {len(tasks)}")
        quick, cells = _timed(map_cells, **task)
        slow = 0.0
        for cell in (cells[i] for i in generator.choice(len(cells), min(sample, len(cells)), replace=False)):
            problem, factor = cell_problem(task, cell["num_blocks"], cell["target_rank"] or 1, cell["noise"])
            seconds, gaps = _timed(plain_gaps, problem, factor)
            slow += seconds
            found = (cell["diablo_gap"], cell["lora_gap"], cell["frozen_gap"])
            off = max(off, *(abs(a - b) for a, b in zip(gaps, found, strict=True)))
        ours.append(quick / len(cells))
        theirs.append(slow / min(sample, len(cells)))
        ratios.append(theirs[-1] / ours[-1])
    setting = f"{grid.num_cells:,} cells, b={grid.rows} m1={grid.size} m2={grid.outputs}, one thread"
    lines = [
        measure(
            "map", "time of the plain loop over the map's", [sum(theirs) / sum(ours)], "times", setting, "at least 20"
        ),
        measure("map", "the same, input by input", ratios, "times", setting),
        measure("map", "largest difference of a relative gap", [off], "of captured", setting, "at most 1e-9"),
        measure("map", "time of the map, all cells", [sum(ours) * grid.num_cells / len(tasks)], "s", setting),
    ]
    return pd.DataFrame(lines)


def activations(width: int, rows: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (X, R) as a trained layer might see them: float32, a spectrum that decays a hundredfold.

    Args:
        width: m1 = m2.
        rows: Tokens a batch.
        generator: Where the draws come from.
    """
    spectrum = torch.logspace(0, -2, width)
    W = torch.randn(width, width, generator=generator) / math.sqrt(width)
    while True:
        X = torch.randn(rows, width, generator=generator) * spectrum
        yield X, X @ W + 0.01 * torch.randn(rows, width, generator=generator)


def layer_at_scale(
    width: int = 4096,
    tokens: int = 65_536,
    batch: int = BATCH,
    num_blocks: Sequence[int] = (16, 32, 64, 128),
    pairs: int = 5,
    rounds: int = 3,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One square layer from its tokens to all optima: accumulation and closed forms against their bare linear algebra.

    Args:
        width: m1 = m2.
        tokens: In all, a multiple of batch, at least two.
        batch: Tokens at a time.
        num_blocks: N; for each, DiaBlo, LoRA with a frozen A, and LoRA's tangent at its usual start, with LoRA's best
            at every rank and full fine-tuning.
        pairs: Batches whose bare products are timed beside the accumulation.
        rounds: Times that all optima and the bare decompositions are timed in turn.
        progress: Called with a short text before each part.

    Returns:
        One row a :class:`Measure`: accumulation over the bare float64 products X^T X and X^T R of the same batch, all
        optima over one ``eigh`` and one ``svdvals`` of the layer's size, the rank of X, and the most memory that the
        process has held so far.

    Raises:
        ValueError: If tokens is not a multiple of batch, or holds fewer than two batches (the first one warms up).
    """
    require_batches(tokens, batch)
    tell = progress or (lambda text: None)
    generator, sums, ratios = seeded(0), LayerStatistics.empty(width, width), []
    stream = activations(width, batch, generator)
    for number in range(tokens // batch):
        tell(f"batch {number + 1} of {tokens // batch}")
        X, R = next(stream)
        if 1 <= number <= pairs:  # the first batch warms up
            X64, R64 = X.double(), R.double()
            bare = _timed(torch.matmul, X64.mT, X64)[0] + _timed(torch.matmul, X64.mT, R64)[0]
            ratios.append(_timed(sums.add, X, R)[0] / bare)
        else:
            sums.add(X, R)
    bases, shares, rank = [], [], 0
    for number in range(rounds):
        tell(f"bare eigh and svdvals, {number + 1} of {rounds}")
        bases.append(_timed(torch.linalg.eigh, sums.gram)[0] + _timed(torch.linalg.svdvals, sums.cross)[0])
        tell(f"all optima, {number + 1} of {rounds}")
        seconds, rank = _timed(_all_optima, sums, num_blocks, generator)
        shares.append(seconds / bases[-1])
    setting = f"m1=m2={width} tokens={tokens:,} N={','.join(map(str, num_blocks))}"
    lines = [
        measure("layer", "accumulation over bare products", ratios, "times", setting, "at most 1.2"),
        measure("layer", "all optima over eigh + svdvals", shares, "times", setting, "at most 2"),
        measure("layer", "eigh + svdvals", bases, "s", setting),
        measure("layer", "rank X", [float(rank)], "directions", setting),
    ]
    if (peak := peak_rss_gib()) is not None:
        lines.append(measure("layer", "peak memory of the process", [peak], "GiB", setting, "at most 3"))
    return pd.DataFrame(lines)


def require_batches(tokens: int, batch: int = BATCH) -> None:
    """Raise ValueError unless tokens fill at least two batches, and fill them."""
    if tokens < 2 * batch or tokens % batch:
        raise ValueError(f"tokens must be a multiple of batch = {batch}, at least {2 * batch}, got {tokens}")


def _all_optima(sums: LayerStatistics, num_blocks: Sequence[int], generator: torch.Generator) -> int:
    """Every minimum and gap of a layer from its sums; returns the rank of X."""
    problem = sums.reduce()
    width, outputs = sums.in_features, sums.out_features
    optima.full_optimum(problem, minimiser=False)
    optima.lora_relative_gaps(problem)
    for count in num_blocks:
        layout = BlockLayout(width, outputs, count)
        optima.diablo_optimum(problem, layout, minimiser=False)
        for rank in (optima.frozen_rank_at_budget(layout), optima.lora_rank_at_budget(layout)):
            A = starts.usual_start(width, outputs, rank, generator).A
            optima.frozen_lora_optimum(problem, A, minimiser=False)
    return int(problem.space.rank)


def accumulation_of(width: int, tokens: int) -> float:
    """Seconds to accumulate so many tokens of a square layer, drawing them not counted."""
    stream, sums = activations(width, 1024, seeded(0)), LayerStatistics.empty(width, width)
    return sum(_timed(sums.add, *next(stream))[0] for _ in range(tokens // 1024))


def optima_of(width: int) -> float:
    """Seconds from the sums of a square layer to all its optima."""
    sums = LayerStatistics.of([next(activations(width, 4 * width, seeded(0)))])
    return _timed(_all_optima, sums, (16, 32, 64, 128), seeded(0))[0]


def cells_of(count: int) -> float:
    """Seconds for a map of one input, six block counts and so many levels of noise."""
    grid = Grid(ranks=(32,), target="low-rank", noises=tuple(map(float, range(count))), rows=128, draws=1)
    return _timed(map_cells, **grid.tasks()[0])[0]


GROWTH: dict[str, tuple[tuple[int, ...], Callable[[int], float], str]] = {
    "tokens, accumulation": ((4096, 8192, 16384, 32768), lambda tokens: accumulation_of(512, tokens), "1"),
    "width, accumulation": ((512, 1024, 2048, 4096), lambda width: accumulation_of(width, 2048), "2"),
    "width, all optima": ((256, 512, 1024, 2048), optima_of, "3"),
    "cells, map": ((5, 10, 20, 40), cells_of, "at most 1"),
}
"""What is grown: the sizes, the seconds that one takes, and the exponent that counting operations gives."""


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log time over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth(repeats: int = 3, progress: Progress | None = None) -> pd.DataFrame:
    """Measured exponents: how time grows with tokens, width and the number of cells.

    Args:
        repeats: Times that each exponent is measured, over four sizes a factor of two apart.
        progress: Called with a short text before each exponent.

    Returns:
        One row a :class:`Measure`; expected are 1 in tokens, 2 in width for accumulation, 3 for all optima, and at
        most 1 in cells (cells share work).
    """
    lines = []
    for name, (sizes, timed, expected) in GROWTH.items():
        if progress is not None:
            progress(f"exponent in {name}")
        timed(sizes[0])  # warm up
        slopes = [exponent(sizes, [timed(size) for size in sizes]) for _ in range(repeats)]
        lines.append(measure("growth", f"exponent in {name}", slopes, "", f"{sizes[0]} to {sizes[-1]}", expected))
    return pd.DataFrame(lines)
