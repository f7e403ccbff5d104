"""What several checks measure, and the premises that they share: each loss twice, each premise as a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.theory import optima, oracles, stationarity
from diablo_theory.theory.gradients import LayerGradients
from diablo_theory.theory.networks import flat
from diablo_theory.theory.parametrisations import Parametrisation
from diablo_theory.theory.problems import LinearProblem
from diablo_theory.theory.reduction import reduce_problem
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, room


def diablo_excesses(problem: LinearProblem) -> tuple[float, float]:
    """What DiaBlo loses, twice: the closed form's relative gap, and its minimiser's through the block product."""
    optimum = optima.diablo_optimum(reduce_problem(problem), problem.layout)
    fitted = oracles.block_fit(problem, optimum.update)
    return float(optimum.relative_gap), oracles.relative_excess(problem, fitted)


def lora_excesses(problem: LinearProblem, rho: int) -> tuple[float, float]:
    """What LoRA loses, twice: the closed form's relative gap, and its minimiser's through a dense product."""
    optimum = optima.lora_optimum(reduce_problem(problem), rho)
    fitted = oracles.dense_fit(problem, optimum.update)
    return float(optimum.relative_gap), oracles.relative_excess(problem, fitted)


def frozen_excesses(problem: LinearProblem, A: Float[Tensor, "m1 rho"]) -> tuple[float, float]:
    """What a frozen A loses, twice: the closed form's relative gap, and its minimiser's, seen through A."""
    optimum = optima.frozen_lora_optimum(reduce_problem(problem), A)
    fitted = oracles.dense_fit(problem, oracles.projection(A, optimum.update))
    return float(optimum.relative_gap), oracles.relative_excess(problem, fitted)


def rank_premise(problem: LinearProblem) -> Premise:
    """The premise of L2, ``rank X_i = rank X`` for every i, with its margin in decades."""
    premise = stationarity.rank_premise(problem.X, problem.layout)
    return Premise(premise.holds, premise.margin)


def rank_premise_of_layers(layers: Sequence[LayerGradients]) -> Premise:
    """The premise of S1, that of L2 in every layer, with the smallest margin in decades."""
    ranks = [stationarity.rank_premise(layer.X, layer.layout) for layer in layers]
    return Premise(all(rank.holds for rank in ranks), min(rank.margin for rank in ranks))


def rank_margin(relative: Float[Tensor, " k"], rank: int, dtype: torch.dtype) -> float:
    """Decades between the singular value that makes this rank, and the cutoff.

    Args:
        relative: Singular values, descending, relative to what the cutoff is relative to; one that is missing, or
            below eps, counts as eps.
        rank: At least 1.
        dtype: The precision in which the matrix was given.
    """
    weakest = float(relative[rank - 1]) if len(relative) >= rank else 0.0
    return math.log10(max(weakest, torch.finfo(dtype).eps) / tolerance("rank", dtype).value)


def midpoint_excess(method: Parametrisation, a: Float[Tensor, " p"], b: Float[Tensor, " p"]) -> float:
    """The loss at the midpoint of a segment over the mean of its ends' losses, less 1: not positive if convex."""
    mean = 0.5 * float(method.loss(a) + method.loss(b))
    return float(method.loss((a + b) / 2)) / mean - 1


def linearity(method: Parametrisation, a: Float[Tensor, " p"], b: Float[Tensor, " p"], dtype: torch.dtype) -> Premise:
    """The premise that the output is linear: that of ``(a -+ b)/2`` is half the difference, or sum, of the ends'."""
    out_a, out_b = method.output(a), method.output(b)
    defect = max(
        float(torch.linalg.matrix_norm(method.output((a + sign * b) / 2) - (out_a + sign * out_b) / 2))
        for sign in (1, -1)
    )
    scale = float(torch.linalg.matrix_norm(out_a) + torch.linalg.matrix_norm(out_b))
    margin = room(defect / scale, tolerance("linearity", dtype).value)
    return Premise(margin >= 0, margin)


def bound_excess(layer: LayerGradients, *, leak: bool) -> float:
    """How far ``||grad W||_F`` exceeds S3's bound, relative to ``(1 + amplification) ||X||_F ||g||_F``.

    Both gradients are sums of products of entries of X and g, so each is off by at most the tolerance on sums times
    ``||X||_F ||g||_F``, and the blocks' one is amplified.

    Args:
        layer: The layer at one point.
        leak: Whether the bound has its leak term.

    Returns:
        Zero or negative where the bound holds.

    Source: theory.md, S3.
    """
    certificate = stationarity.certificate(layer.X, layer.g, layer.layout)
    bound = certificate.amplification * float(flat(layer.blocks).norm()) + leak * certificate.leak
    scale = (1 + certificate.amplification) * float(layer.X.norm()) * float(layer.g.norm())
    return (float(layer.dense.norm()) - bound) / scale
