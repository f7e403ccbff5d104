"""G1 and S1: gradients and stationary points of the blocks inside nonlinear networks, against autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import descent, networks, stationarity
from diablo_theory.theory.arithmetic import Arithmetic
from diablo_theory.theory.networks import NetworkProblem, Update
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict

# sizes, N of each layer: three layers that divide; ragged rectangular ones; more blocks than outputs
_NETWORKS = (((12, 18, 12, 6), (3, 6, 2)), ((13, 17, 7), (3, 4)), ((10, 14, 3), (5, 6)))
# sizes, N, distinct samples, repeats: within the premise, the second ragged; then one beyond it
_WITHIN = (((12, 16, 9), (2, 3), 4, 3), ((13, 17, 7), (2, 3), 5, 2))
_BEYOND = ((9, 7, 5), (3, 2), 100, 1)


def _instance(sizes: tuple[int, ...], num_blocks: tuple[int, ...], b: int) -> str:
    return f"b={b} sizes={'-'.join(map(str, sizes))} N={','.join(map(str, num_blocks))}"


def dense_gradients(problem: NetworkProblem, updates: list[Update]) -> list[Tensor]:
    """Autograd's gradients at the dense weights ``W + D``, shapes (m1, m2), with D scattered into W."""
    weights = [
        (weight + layout.scatter(*update)).requires_grad_()
        for weight, layout, update in zip(problem.weights, problem.layouts, updates, strict=True)
    ]
    loss = problem.loss(networks.dense_forward(problem, weights))
    return list(torch.autograd.grad(loss, weights))


def _flat(update: Update) -> Tensor:
    return torch.cat([part.flatten() for part in update if part is not None])


def _shifted(matrix: Tensor, layout: BlockLayout) -> Tensor:
    """The entries one block to the right of the diagonal ones, wrapping at the edge."""
    return _flat(layout.gather(matrix.roll(-layout.block_cols, dims=1)))


def gradient(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """G1: at a generic nonzero point the blocks' gradient is the (i, i) blocks of the dense gradient.

    Premise: the entries compared are the blocks' own; margin 1 where all are, minus the share that is not otherwise.
    Claim margin: decades of the relative Frobenius difference, the worst layer's. Control: the blocks' gradient
    against the blocks one to the right of the diagonal (the closest layer's difference decides).

    Args:
        generator: Where the networks come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        A claim and a control for each network.

    Source: arXiv 2506.03230v2, section 3, gradient of D_i; theory.md, G1.
    """
    verdicts = []
    for sizes, num_blocks in _NETWORKS:
        problem = networks.network_problem(sizes, num_blocks, 16, generator)
        updates = problem.random_updates(generator)
        trial = Trial("G1", number, _instance(sizes, num_blocks, 16))
        own, shifted = [], []
        for layer, dense, layout in zip(
            descent.layer_gradients(problem, updates),
            dense_gradients(problem, updates),
            problem.layouts,
            strict=True,
        ):
            blocks = _flat(layer.blocks)
            own.append(_relative(blocks, _flat(layout.gather(dense))))
            shifted.append(_relative(blocks, _shifted(dense, layout)))
        statement = "block gradient = diagonal blocks of the dense one (control: blocks beside the diagonal)"
        for role, off in (("claim", max(own)), ("control", min(shifted))):
            premise = _position(problem, role == "control")
            verdicts.append(trial.vanishes(role, statement, premise, off, tolerance("gradient")))
    return verdicts


def _relative(value: Tensor, reference: Tensor) -> float:
    scale = max(float(value.norm()), float(reference.norm()))
    return float((value - reference).norm()) / scale if scale > 0 else 0.0


def _position(problem: NetworkProblem, shift: bool) -> Premise:
    """How many compared entries are the blocks' own, counted on a matrix that holds its own indices."""
    wrong = 0.0
    for layout in problem.layouts:
        indices = torch.arange(layout.in_features * layout.out_features).reshape(layout.in_features, -1).double()
        own = _flat(layout.gather(indices))
        compared = _shifted(indices, layout) if shift else own
        wrong = max(wrong, float((compared != own).double().mean()))
    return Premise(wrong == 0.0, -wrong if wrong else 1.0)


def stationary(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """S1: where ``rank X_i = rank X`` in every layer, a stationary point of the blocks is one of all weights.

    L-BFGS brings the blocks near stationarity; then two statements. The bound: ``||grad W||_F <= max_i ||C_i||_2
    ||grad D||_F`` in every layer, claim margin in decades of its relative excess. The conclusion: grad W fell, claim
    margin in decades of its norm relative to the start. Premise margin: as in L2, the smallest over layers, at the
    point reached. Inputs are repeated with different targets, so the loss cannot reach zero and the gradients at the
    outputs do not vanish. Control: more distinct samples than d1.

    Args:
        generator: Where the networks come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Two claims for each network within the premise, two controls for the one beyond.

    Source: arXiv 2506.03230v2, stationarity theorem; theory.md, S1 and S3.
    """
    cases = [("claim", case) for case in _WITHIN] + [("control", _BEYOND)]
    verdicts = []
    for role, (sizes, num_blocks, samples, repeats) in cases:
        problem = networks.network_problem(sizes, num_blocks, samples, generator, repeats=repeats)
        trial = Trial("S1", number, _instance(sizes, num_blocks, samples * repeats))
        premise, excess, fell = _near_stationarity(problem)
        for statement, measured, quantity in (
            ("grad W within max ||C_i|| grad D, no leak (control: more samples than d1)", excess, "certificate"),
            ("grad W vanishes with grad D (control: more samples than d1)", fell, "stationarity"),
        ):
            verdicts.append(trial.vanishes(role, statement, premise, measured, tolerance(quantity)))
    return verdicts


def _near_stationarity(problem: NetworkProblem) -> tuple[Premise, float, float]:
    """Train the blocks; return the premise, the bound's relative excess and the fall of grad W, worst layers'."""
    start = dense_gradients(problem, problem.zero_updates())
    updates = descent.minimise_blocks(problem, iterations=400, gradient_tolerance=1e-10)
    layers = descent.layer_gradients(problem, updates)
    end = dense_gradients(problem, updates)
    ranks = [stationarity.rank_premise(la.X, lo) for la, lo in zip(layers, problem.layouts, strict=True)]
    excess, fell = -1.0, 0.0
    for layer, layout, before, after in zip(layers, problem.layouts, start, end, strict=True):
        amplification = stationarity.certificate(layer.X, layer.g, layout).amplification
        bound = amplification * float(_flat(layer.blocks).norm())
        excess = max(excess, float(after.norm()) / bound - 1 if bound > 0 else float("inf"))
        fell = max(fell, float(after.norm() / before.norm()))
    return Premise(all(r.holds for r in ranks), min(r.margin for r in ranks)), excess, fell
