"""G1 and G2: what the gradients of the blocks and of LoRA's factors are, by autograd through nonlinear networks."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory import gradients, network_instances, networks, starts
from diablo_theory.theory.arithmetic import Arithmetic
from diablo_theory.theory.gradients import Factors
from diablo_theory.theory.networks import NetworkProblem, Update, flat
from diablo_theory.theory.tolerances import tolerance
from diablo_theory.theory.verdicts import Premise, Trial, Verdict, room

# tanh: three layers that divide; ragged rectangular ones; more blocks than outputs. Then smooth and kinked
# activations, a frozen head, and ragged attention
_NETWORKS = (
    partial(network_instances.mlp_problem, (12, 18, 12, 6), (3, 6, 2), 16),
    partial(network_instances.mlp_problem, (13, 17, 7), (3, 4), 16),
    partial(network_instances.mlp_problem, (10, 14, 3), (5, 6), 16),
    partial(network_instances.mlp_problem, (9, 14, 8), (3, 4), 16, activation="gelu", head_width=3),
    partial(network_instances.mlp_problem, (11, 16, 9), (2, 3), 16, activation="relu"),
    partial(network_instances.attention_problem, 13, 17, 3, 4, 3),
)
_LORA_RANK, _LORA_SCALE = 2, 2.0


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
    for make in _NETWORKS:
        problem = make(generator, arithmetic=arithmetic)
        trial = Trial("G1", number, problem.description)
        statement = "block gradient = diagonal blocks of the dense one (control: blocks beside the diagonal)"
        verdicts.extend(_position_verdicts(trial, statement, problem, problem.random_updates(generator)))
    return verdicts


def _position_verdicts(trial: Trial, statement: str, problem: NetworkProblem, updates: list[Update]) -> list[Verdict]:
    """The blocks' gradient at a point against the dense gradient's blocks: its own, and those beside them."""
    own, shifted = [], []
    for layer in gradients.layer_gradients(problem, updates):
        blocks = flat(layer.blocks)
        own.append(_relative(blocks, flat(layer.layout.gather(layer.dense))))
        shifted.append(_relative(blocks, _shifted(layer.dense, layer.layout)))
    bound = tolerance("gradient", problem.inputs.dtype)
    return [
        trial.vanishes("claim", statement, _position(problem, shift=False), max(own), bound),
        trial.vanishes("control", statement, _position(problem, shift=True), min(shifted), bound),
    ]


def _shifted(matrix: Tensor, layout: BlockLayout) -> Tensor:
    """The entries one block to the right of the diagonal ones, wrapping at the edge."""
    return flat(layout.gather(matrix.roll(-layout.block_cols, dims=1)))


def _relative(value: Tensor, reference: Tensor) -> float:
    scale = max(float(value.norm()), float(reference.norm()))
    return float((value - reference).norm()) / scale if scale > 0 else 0.0


def _position(problem: NetworkProblem, shift: bool) -> Premise:
    """How many compared entries are the blocks' own, those with ``row // ceil(m1/N) = col // ceil(m2/N)``."""
    wrong = 0.0
    for layout in problem.layouts:
        m1, m2, n = layout.in_features, layout.out_features, layout.num_blocks
        indices = torch.arange(m1 * m2).reshape(m1, m2).double()
        compared = (_shifted(indices, layout) if shift else flat(layout.gather(indices))).long()
        outside = (compared // m2) // -(-m1 // n) != (compared % m2) // -(-m2 // n)
        wrong = max(wrong, float(outside.double().mean()))
    return Premise(wrong == 0.0, -wrong if wrong else 1.0)


def start(generator: torch.Generator, number: int, arithmetic: Arithmetic) -> list[Verdict]:
    """G2: at the start LoRA's gradient is ``(0, s A^T G)``, DiaBlo's the blocks of G, with G the full gradient there.

    Four statements on each network; margins of claims in decades of a relative norm, the worst layer's.

    - ``grad A = 0``, relative to ``s ||G||_F``. Premise: B = 0; margin 1, or minus the share of entries that are not.
      Control: PiSSA's start, the same output from B != 0.
    - ``grad B = s A^T G``, at PiSSA's start too. Premise: the frozen weight plus ``s A B`` is the weight at which G is
      taken; margin, decades of their relative difference. Control: PiSSA's factors on top of W, another network.
    - DiaBlo's gradient is the blocks of G: premise, margin and control as in :func:`gradient`.
    - It is not zero, relative to ``||G||_F``. Premise: some group of inputs and its group of output gradients are both
      nonzero; margin, the share of such groups, or -1 without any. Control: inputs in one group, errors in another.

    Args:
        generator: Where the networks and LoRA's A come from.
        number: The trial's number.
        arithmetic: The precision and device of the instances.

    Returns:
        Eight verdicts for each network, and the control of the last statement.

    Source: theory.md, G2.
    """
    verdicts = []
    for make in _NETWORKS:
        problem = make(generator, arithmetic=arithmetic)
        trial = Trial("G2", number, problem.description)
        statement = "DiaBlo's gradient at zero = diagonal blocks of the full one (control: blocks beside the diagonal)"
        verdicts += [
            *_lora_verdicts(trial, problem, generator),
            *_position_verdicts(trial, statement, problem, problem.zero_updates()),
            _nonzero(trial, "claim", problem),
        ]
    problem = _unmatched(generator, arithmetic)
    return [*verdicts, _nonzero(Trial("G2", number, problem.description), "control", problem)]


def _lora_verdicts(trial: Trial, problem: NetworkProblem, generator: torch.Generator) -> list[Verdict]:
    adapted = problem.weights[: len(problem.layouts)]
    full = gradients.dense_gradients(problem, problem.zero_updates())
    drawn = [starts.usual_start(len(weight), weight.shape[1], _LORA_RANK, generator) for weight in adapted]
    usual = [(start.A.to(weight), start.B.to(weight)) for start, weight in zip(drawn, adapted, strict=True)]
    principal = [_principal_factors(weight) for weight in adapted]
    residual = [W - _LORA_SCALE * A @ B for W, (A, B) in zip(adapted, principal, strict=True)]
    without = dataclasses.replace(problem, weights=(*residual, *problem.weights[len(adapted) :]))
    bound = tolerance("gradient", problem.inputs.dtype)
    still = "LoRA's usual start: grad A = 0 (control: PiSSA's start, of the same output)"
    known = "LoRA at a start of the same output: grad B = s A^T G (control: B not zero on top of W)"
    return [
        trial.vanishes("claim", still, _zero_b(usual), max(_a_sizes(problem, usual, full)), bound),
        trial.vanishes("control", still, _zero_b(principal), min(_a_sizes(without, principal, full)), bound),
        *(
            trial.vanishes(role, known, _same(start, factors, adapted), worst(_b_errors(start, factors, full)), bound)
            for role, start, factors, worst in (
                ("claim", problem, usual, max),
                ("claim", without, principal, max),
                ("control", problem, principal, min),
            )
        ),
    ]


def _principal_factors(weight: Tensor) -> Factors:
    """PiSSA's A and B in the weight's precision, with ``s A B`` its best approximation."""
    start = starts.pissa_start(weight, _LORA_RANK)
    return (start.A / _LORA_SCALE**0.5).to(weight), (start.B / _LORA_SCALE**0.5).to(weight)


def _same(problem: NetworkProblem, factors: list[Factors], weights: tuple[Tensor, ...]) -> Premise:
    """Whether the frozen weights plus ``s A B`` are these weights."""
    pairs = zip(problem.weights, factors, weights, strict=False)
    off = max(float((frozen + _LORA_SCALE * A @ B - W).norm() / W.norm()) for frozen, (A, B), W in pairs)
    margin = room(off, tolerance("gradient", weights[0].dtype).value)
    return Premise(margin > 0, margin)


def _zero_b(factors: list[Factors]) -> Premise:
    share = max(float((B != 0).double().mean()) for _, B in factors)
    return Premise(share == 0.0, -share if share else 1.0)


def _a_sizes(problem: NetworkProblem, factors: list[Factors], full: list[Tensor]) -> list[float]:
    """``||grad A||_F / (s ||G||_F)`` of every layer."""
    found = gradients.lora_gradients(problem, factors, _LORA_SCALE)
    return [float(grad_a.norm() / (_LORA_SCALE * G.norm())) for (grad_a, _), G in zip(found, full, strict=True)]


def _b_errors(problem: NetworkProblem, factors: list[Factors], full: list[Tensor]) -> list[float]:
    """Relative difference of grad B and ``s A^T G`` in every layer."""
    found = gradients.lora_gradients(problem, factors, _LORA_SCALE)
    return [
        _relative(grad_b, _LORA_SCALE * A.T @ G) for (_, grad_b), (A, _), G in zip(found, factors, full, strict=True)
    ]


def _nonzero(trial: Trial, role: str, problem: NetworkProblem) -> Verdict:
    sizes, shares = [], []
    for layer in gradients.layer_gradients(problem, problem.zero_updates()):
        sizes.append(float(flat(layer.blocks).norm() / layer.dense.norm()))
        groups = range(layer.layout.count)
        both = [
            bool(layer.X[:, layer.layout.rows(i)].any() and layer.g[:, layer.layout.cols(i)].any()) for i in groups
        ]
        shares.append(sum(both) / len(both))
    share = min(shares)
    statement = "DiaBlo's gradient at zero is not zero (control: inputs and errors in different groups)"
    premise = Premise(share > 0, share if share > 0 else -1.0)
    return trial.stays_positive(role, statement, premise, min(sizes), tolerance("gradient", problem.inputs.dtype))


def _unmatched(generator: torch.Generator, arithmetic: Arithmetic) -> NetworkProblem:
    """One linear layer whose inputs are zero outside the first group, and whose errors are outside the second."""
    problem = network_instances.mlp_problem((12, 9), (3,), 8, generator, arithmetic=arithmetic)
    (layout,) = problem.layouts
    inputs = torch.zeros_like(problem.inputs)
    inputs[:, layout.rows(0)] = problem.inputs[:, layout.rows(0)]
    moved = dataclasses.replace(problem, inputs=inputs)
    targets = networks.forward(moved, moved.zero_updates()).output
    targets[:, layout.cols(1)] += problem.targets[:, layout.cols(1)]
    return dataclasses.replace(moved, targets=targets)
