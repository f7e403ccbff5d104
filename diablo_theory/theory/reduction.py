"""The part of a linear problem that every closed form depends on: coordinates of X and of P_X R in one basis.

With ``X = U Y`` and ``P_X R = U M``, U orthonormal, every gap and every minimiser is a function of (Y, M): U drops
out. Y and M come from X and R themselves, or from sums over tokens alone, ``G = X^T X = Y^T Y`` and
``C = X^T R = Y^T M``;
the closed forms do not know the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diablo_theory.theory.column_space import ColumnSpace, column_space, times_power, unit_scale
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.tolerances import tolerance


@dataclass(frozen=True)
class ReducedProblem:
    """A linear problem, or a batch, without its tokens.

    Args:
        space: Y, the coordinates of X, and the rank decision.
        target: M, the coordinates of P_X R with R at unit scale, shape (..., k, m2); its batch dimensions broadcast
            with those of the space.
        outside: ``||(I - P_X) R||_F^2`` with R at unit scale, shape (...): what no update can reach.
        exponent: The power of two that was taken out of R, shape (...).
        rounding: A ``||P_X R||`` of at most this share of ``||R||`` is rounding: what is captured of an R that is
            orthogonal to col X. Shape (...) or one number.
    """

    space: ColumnSpace
    target: Float[Tensor, "... k m2"]
    outside: Float[Tensor, ...]
    exponent: Int[Tensor, ...]
    rounding: Float[Tensor, ...] | float = tolerance("rank").value

    @cached_property
    def captured(self) -> Float[Tensor, ...]:
        """``||P_X R||_F^2`` with R at unit scale, shape (...): what full fine-tuning captures."""
        return self.target.square().sum((-2, -1))

    def share(self, missed: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """``missed / captured``, free of any scale, and 0 where there is nothing to capture but rounding."""
        nothing = self.rounding**2 * (self.captured + self.outside)
        return torch.where(self.captured > nothing, missed / self.captured, 0.0)

    def loss_of(self, missed: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """``missed / 2`` in the units of the problem's loss, for a squared norm at unit scale."""
        return times_power(0.5 * missed, 2 * self.exponent)

    def update_of(self, dW: Float[Tensor, "... m1 m2"]) -> Float[Tensor, "... m1 m2"]:
        """An update that solves ``Y dW = M`` in some sense, in the units of the problem's weights."""
        return times_power(dW, (self.exponent - self.space.exponent)[..., None, None])


def reduce_problem(problem: LinearProblem, rtol: float | None = None) -> ReducedProblem:
    """Reduce a linear problem to coordinates, by one SVD of its input.

    Args:
        problem: The problem, or a batch; an input that is shared by several targets is decomposed once.
        rtol: The rank decision, as in :func:`column_space`.

    Returns:
        The reduced problem; ``.space.rank`` and ``.space.decision.margin`` say what was decided.

    Raises:
        ValueError: If rtol is out of range.
    """
    space = column_space(problem.X, rtol)
    assert space.basis is not None
    R, exponent = unit_scale(problem.R)
    target = space.basis.mT @ R
    return ReducedProblem(space, target, (R - space.basis @ target).square().sum((-2, -1)), exponent)
