"""Linear instances for checks: draws whose ranks every supported precision can tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import FLOAT64, Arithmetic, wide
from diablo_theory.theory.column_space import written_groups
from diablo_theory.theory.problems import LinearProblem, linear_problem

LARGEST_CONDITION = 2.0**8
"""Of an instance's X and column groups: 16 of it times eps is the "loss" tolerance of float32, 2^12 eps."""


def clear_problem(
    layout: BlockLayout,
    rows: int,
    rank: int,
    generator: torch.Generator,
    arithmetic: Arithmetic = FLOAT64,
    **details: Any,
) -> LinearProblem:
    """Draw a linear problem until its ranks are clear.

    Clear is an X whose nonzero singular values, and those of every column group, are at least ``||X||_2 / 2^8``. A
    Gaussian X breaks that in up to half of the draws for blocks as tall as the rank, and then float32 can tell
    neither the rank nor the fit.

    Args:
        layout: The blocks.
        rows: b.
        rank: Rank of X.
        generator: Where the draws come from.
        arithmetic: The precision and device of the tensors.
        details: Other arguments of :func:`linear_problem`.

    Returns:
        The problem.
    """
    while True:
        problem = linear_problem(layout, rows, rank, generator, arithmetic=arithmetic, **details)
        if _weakest(wide(problem.X), layout, rank) * LARGEST_CONDITION >= 1:
            return problem


def _weakest(X: Tensor, layout: BlockLayout, rank: int) -> float:
    """The smallest singular value that should not be zero, of X or of a group, relative to the largest."""
    groups = [X, *(X[:, layout.rows(i)] for i in written_groups(layout))]
    spectra = [torch.linalg.svdvals(group)[:rank] for group in groups if group.shape[1]]
    smallest = [float(sigma[-1]) for sigma in spectra if len(sigma)]
    return min(smallest) / float(spectra[0][0]) if smallest else 1.0
