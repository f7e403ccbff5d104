"""S3: the certificate bounds the full gradient at any point of any network, and its leak is needed."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch

from diablo_theory.theory import gradients, network_instances, stationarity, stationary_points
from diablo_theory.theory.arithmetic import Arithmetic, wide
from diablo_theory.theory.column_space import written_groups
from diablo_theory.theory.gradients import LayerGradients
from diablo_theory.theory.measures import bound_excess, rank_premise_of_layers
from diablo_theory.theory.networks import flat
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict

# more samples than d1 and a last layer with more outputs than d2, so that both premises fail; more output entries than
# block parameters, so that points can be made stationary. Attention has N = 3, since queries and keys matter through
# W_q W_k^T alone, and values and outputs through W_v W_o: with M the gradient at such an m x m product, theirs are
# M W_k and M^T W_q (or M W_o^T and W_v^T M), whose blocks are 2 m^2 / N linear functions of M, so that for N <= 2 they
# vanish with M only, and their full gradients with them, whatever the ranks
_NETWORKS = (
    partial(network_instances.mlp_problem, (9, 7, 5), (3, 2), 24),
    partial(network_instances.mlp_problem, (9, 7, 5), (3, 2), 24, activation="relu"),
    partial(network_instances.mlp_problem, (7, 5, 7), (3, 2), 24, activation="gelu", head_width=5),
    partial(network_instances.attention_problem, 5, 6, 3, 6, 4),
)


def certified(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """S3: ``||grad W||_F <= max_i ||C_i||_2 ||grad D||_F + leak`` in every layer, whatever the ranks.

    Four statements on each network, at a generic point with generic targets and with targets that make the same
    point stationary for the blocks. Claim margins by the worst layer, in decades of an error relative to
    ``||X||_F ||g||_F`` (see :func:`bound_excess`).

    - The bound. Premise: the leak is counted (it needs no more; margin 1), or else ``rank X_i = rank X``, margin as
      in L2. Control: the stationary point without the leak.
    - The same for the transposed layer, with ``g_Y`` in the place of X; see duality.py.
    - The certificate's two norms are autograd's. Premise: X and g are over the whole training set; margin 1, or minus
      the share left out. Control: a certificate from every second sample.
    - Its terms are those of ``C_i = X_i^+ X``, by LAPACK's pseudo-inverse. Premise: C_i is of the whole group; margin
      half a column, less the columns left out. Control: of the group without its last column.

    Args:
        generator: Where the networks and points come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Four claims and four controls for each network.

    Source: theory.md, S3.
    """
    verdicts = []
    for make in _NETWORKS:
        problem = make(generator, arithmetic=arithmetic)
        updates = problem.random_updates(generator)
        still = stationary_points.with_stationary_targets(problem, updates, generator)
        generic, stationary = (gradients.layer_gradients(p, updates) for p in (problem, still))
        trial = Trial("S3", number, problem.description)
        bound = "grad W within amplification times grad D plus leak (control: no leak, grad D = 0)"
        verdicts += _bound_verdicts(trial, bound, generic, stationary)
        turned = ([layer.transposed for layer in layers] for layers in (generic, stationary))
        verdicts += _bound_verdicts(trial, f"transposed: {bound}", *turned)
        verdicts += _norm_verdicts(trial, generic)
        verdicts += _term_verdicts(trial, generic)
    return verdicts


def _term_verdicts(trial: Trial, layers: list[LayerGradients]) -> list[Verdict]:
    """Amplification and leak by LAPACK's pseudo-inverses: the bound alone would hold of any C_i."""
    entry = tolerance("loss", layers[0].dense.dtype)
    statement = "amplification and leak are those of C_i = X_i^+ X (control: of all but one of each group's columns)"
    return [
        trial.vanishes(role, statement, Premise(missing == 0, 0.5 - missing), worst, entry)
        for role, missing, worst in (
            ("claim", 0, max(_term_error(layer, 0) for layer in layers)),
            ("control", 1, min(_term_error(layer, 1) for layer in layers)),
        )
    ]


def _term_error(layer: LayerGradients, missing: int) -> float:
    """The larger relative error of the two terms; the leak's is over ``amplification ||X||_F ||g||_F``."""
    layout, X, g = layer.layout, wide(layer.X), wide(layer.g)
    cutoff = tolerance("rank", layer.X.dtype).value * float(torch.linalg.matrix_norm(X, 2))
    amplification, leak = 0.0, 0.0
    for i in written_groups(layout):
        rows = layout.rows(i)
        X_i = X[:, rows.start : rows.stop - missing]
        C_i = torch.linalg.pinv(X_i, atol=cutoff, rtol=0.0) @ X
        amplification = max(amplification, float(torch.linalg.matrix_norm(C_i, 2)) if C_i.numel() else 0.0)
        leak += float(((X - X_i @ C_i).T @ g[:, layout.cols(i)]).square().sum())
    found = stationarity.certificate(layer.X, layer.g, layout)
    scale = amplification * float(X.norm()) * float(g.norm())
    return max(abs(found.amplification / amplification - 1), abs(found.leak - math.sqrt(leak)) / scale)


def _bound_verdicts(
    trial: Trial, statement: str, generic: list[LayerGradients], stationary: list[LayerGradients]
) -> list[Verdict]:
    entry = tolerance("gradient", generic[0].dense.dtype)
    with_leak = max(bound_excess(layer, leak=True) for layer in generic + stationary)
    without = max(bound_excess(layer, leak=False) for layer in stationary)
    return [
        trial.vanishes("claim", statement, Premise(True, 1.0), with_leak, entry),
        trial.vanishes("control", statement, rank_premise_of_layers(stationary), without, entry),
    ]


def _norm_verdicts(trial: Trial, layers: list[LayerGradients]) -> list[Verdict]:
    entry = tolerance("gradient", layers[0].dense.dtype)
    statement = "the certificate's norms are autograd's (control: from every second sample)"
    halves = [dataclasses.replace(layer, X=layer.X[::2], g=layer.g[::2]) for layer in layers]
    share = 1 - len(halves[0].X) / len(layers[0].X)
    return [
        trial.vanishes("claim", statement, Premise(True, 1.0), max(map(_norm_error, layers)), entry),
        trial.vanishes("control", statement, Premise(False, -share), max(map(_norm_error, halves)), entry),
    ]


def _norm_error(layer: LayerGradients) -> float:
    """The larger error of the certificate's two norms, relative to ``||X||_F ||g||_F``."""
    certificate = stationarity.certificate(layer.X, layer.g, layer.layout)
    full, blocks = float(layer.dense.norm()), float(flat(layer.blocks).norm())
    off = (certificate.grad_full - full, certificate.grad_blocks - blocks)
    return max(map(abs, off)) / (float(layer.X.norm()) * float(layer.g.norm()))
