"""S1 and S2: where descent on the blocks stops, under either rank premise, the full gradient has vanished as well."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diablo_theory.theory import gradients, network_descent, network_instances, stationary_points
from diablo_theory.theory.arithmetic import Arithmetic
from diablo_theory.theory.gradients import LayerGradients
from diablo_theory.theory.measures import bound_excess, rank_premise_of_layers
from diablo_theory.theory.networks import NetworkProblem, Update
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Trial, Verdict

# few distinct samples, repeated with other targets: every activation, attention, ragged widths
_FEW_SAMPLES = (
    partial(network_instances.mlp_problem, (12, 18, 9), (2, 3), 4, repeats=3),
    partial(network_instances.mlp_problem, (13, 17, 7), (2, 3), 3, repeats=2),
    partial(network_instances.mlp_problem, (12, 18, 9), (2, 3), 4, repeats=2, activation="gelu"),
    partial(network_instances.mlp_problem, (12, 40, 9), (2, 2), 3, repeats=2, activation="relu"),
    partial(network_instances.attention_problem, 18, 21, 3, 2, 2, repeats=2),
)
# more samples than d1, N > 1, and as many outputs as the last layer has
_MANY_SAMPLES = partial(network_instances.mlp_problem, (9, 7, 5), (3, 2), 100)
# more samples than d1, with a head no wider than d2: where descent goes; made points of activations on which it would
# be slow or stall; and one with a wider head
_NARROW_HEAD = partial(network_instances.mlp_problem, (8, 4, 7), (4, 2), 200, head_width=2)
_NARROW_HEAD_MADE = (
    partial(network_instances.mlp_problem, (9, 7, 9), (3, 2), 30, activation="gelu", head_width=2),
    partial(network_instances.mlp_problem, (9, 7, 9), (3, 2), 30, activation="relu", head_width=2),
)
_WIDE_HEAD_MADE = partial(network_instances.mlp_problem, (9, 7, 9), (3, 2), 20, head_width=9)


def stationary(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """S1: where ``rank X_i = rank X`` in every layer, a stationary point of the blocks is one of all weights.

    Descent brings the blocks near stationarity; then two statements. The bound: ``||grad W||_F <= max_i ||C_i||_2
    ||grad D||_F`` in every layer, without S3's leak. The conclusion: grad W fell, claim margin in decades of its norm
    relative to the start. Premise margin: as in L2, the smallest over layers, at the point reached. Inputs are
    repeated with different targets, so the loss cannot reach zero and the gradients at the outputs do not vanish.
    Control: more distinct samples than d1, at a generic point that its targets make stationary, so that it is the
    premise and not unfinished descent that fails it.

    A network with kinks is among the claims: with so few samples descent ends inside one of the regions where it is
    smooth.

    Args:
        generator: Where the networks come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Two claims for each network within the premise, two controls for the one beyond.

    Source: arXiv 2506.03230v2, stationarity theorem; theory.md, S1 and S3.
    """
    cases = [*(("claim", make, _descended) for make in _FEW_SAMPLES), ("control", _MANY_SAMPLES, _made)]
    verdicts = []
    for role, make, reached in cases:
        problem = make(generator, arithmetic=arithmetic)
        trial = Trial("S1", number, problem.description)
        verdicts += _verdicts(trial, role, "more samples than d1", reached(problem, generator))
    return verdicts


def dual_stationary(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """S2: where ``rank g_{Y_i} = rank g_Y``, a stationary point of a layer's blocks is one of its weight.

    The statements and margins of :func:`stationary`, for the transposed layer (see duality.py), and only for the last
    layer: a frozen linear head of width q <= d2 after it gives ``g_Y = g_out V^T`` and ``g_{Y_i} = g_out V_i^T``, of
    rank q both. S1's premise fails there, with more samples than d1, so that S1 cannot be the reason. The stationary
    points are where descent stops and, since the statement is about any, generic points that their targets make
    stationary, where the reference is grad W with other targets. Control: such a point with q > d2.

    Args:
        generator: Where the networks come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Two claims for each network with a narrow head, two controls for the one with a wide head.

    Source: arXiv 2506.03230v2, stationarity theorem; theory.md, S2.
    """
    cases = [
        ("claim", _NARROW_HEAD, _descended),
        *(("claim", make, _made) for make in _NARROW_HEAD_MADE),
        ("control", _WIDE_HEAD_MADE, _made),
    ]
    verdicts = []
    for role, make, reached in cases:
        problem = make(generator, arithmetic=arithmetic)
        trial = Trial("S2", number, problem.description)
        last = reached(problem, generator)[-1]
        verdicts += _verdicts(trial, role, "a head wider than d2", [last.transposed])
    return verdicts


@dataclass(frozen=True)
class _Settled:
    """One layer at a stationary point of the blocks.

    Args:
        layer: Its gradients there.
        reference: ``||grad W||_F`` that a vanishing one is compared with.
    """

    layer: LayerGradients
    reference: float

    @property
    def transposed(self) -> _Settled:
        """The transposed layer there: see duality.py."""
        return _Settled(self.layer.transposed, self.reference)


def _descended(problem: NetworkProblem, generator: torch.Generator) -> list[_Settled]:
    """Every layer where descent stops; the reference is where it starts."""
    updates = network_descent.minimise_blocks(problem, iterations=400, gradient_tolerance=1e-9)
    return _settled(problem, updates, gradients.dense_gradients(problem, problem.zero_updates()))


def _made(problem: NetworkProblem, generator: torch.Generator) -> list[_Settled]:
    """Every layer at a generic point that its targets make stationary; the reference has generic targets."""
    updates = problem.random_updates(generator)
    made = stationary_points.with_stationary_targets(problem, updates, generator)
    return _settled(made, updates, gradients.dense_gradients(problem, updates))


def _settled(problem: NetworkProblem, updates: list[Update], reference: list[Tensor]) -> list[_Settled]:
    layers = gradients.layer_gradients(problem, updates)
    return [_Settled(layer, float(G.norm())) for layer, G in zip(layers, reference, strict=True)]


def _verdicts(trial: Trial, role: str, control: str, layers: list[_Settled]) -> list[Verdict]:
    """The bound and the conclusion, each by its worst layer."""
    dtype = layers[0].layer.dense.dtype
    premise = rank_premise_of_layers([item.layer for item in layers])
    excess = max(bound_excess(item.layer, leak=False) for item in layers)
    fell = max(float(item.layer.dense.norm()) / item.reference for item in layers)
    bound = f"grad W within amplification times grad D, no leak (control: {control})"
    conclusion = f"grad W vanishes with grad D (control: {control})"
    return [
        trial.vanishes(role, bound, premise, excess, tolerance("gradient", dtype)),
        trial.vanishes(role, conclusion, premise, fell, tolerance("stationarity", dtype)),
    ]
