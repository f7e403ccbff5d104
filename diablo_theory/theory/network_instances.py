"""Seeded networks with data that meets or breaks the premises of S1 and S2, and the truth about it attached."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.architectures import MLP, Architecture, AttentionBlock
from diablo_theory.theory.arithmetic import FLOAT64, Arithmetic, gaussian
from diablo_theory.theory.column_space import written_groups
from diablo_theory.theory.duality import transposed
from diablo_theory.theory.networks import NetworkProblem, Truth


def mlp_problem(
    sizes: Sequence[int],
    num_blocks: Sequence[int],
    samples: int,
    generator: torch.Generator,
    *,
    repeats: int = 1,
    activation: str = "tanh",
    head_width: int | None = None,
    arithmetic: Arithmetic = FLOAT64,
) -> NetworkProblem:
    """A generic MLP and data, every layer but the head adapted.

    With ``repeats`` above one every input comes that often, each time with another target: rank X stays at most
    ``samples`` in every layer while no update can bring the loss to zero, so that a vanishing gradient says
    something. S1's premise holds where ``samples`` is at most the size of every input group (with relu, whose units
    can be dead, where it is well below), S2's where ``head_width`` is at most that of every output group. Targets
    have standard deviation 0.3, which keeps tanh out of the saturation where descent stalls.

    Args:
        sizes: Widths, at least two: inputs, hidden ones, the last layer's outputs.
        num_blocks: N of each layer, ``len(sizes) - 1`` of them.
        samples: Distinct inputs.
        generator: Where the draws come from.
        repeats: How often each comes.
        activation: A key of ``ACTIVATIONS``.
        head_width: q, the width of a frozen linear head, or None for none.
        arithmetic: The precision and device of the tensors.

    Returns:
        The problem, with b = samples * repeats, and its truth.
    """
    adapted = _layouts(itertools.pairwise(sizes), num_blocks)
    outputs = sizes[-1] if head_width is None else head_width
    head = [] if head_width is None else [(sizes[-1], head_width)]
    architecture = MLP(len(adapted), activation, head=bool(head))
    inputs = gaussian(samples, sizes[0], generator)
    return _generic(architecture, inputs, repeats, adapted, head, outputs, generator).placed(arithmetic)


def attention_problem(
    width: int,
    hidden: int,
    num_blocks: int,
    sequences: int,
    tokens: int,
    generator: torch.Generator,
    *,
    repeats: int = 1,
    activation: str = "gelu",
    arithmetic: Arithmetic = FLOAT64,
) -> NetworkProblem:
    """A generic attention block and data, all six layers adapted; premises as in :func:`mlp_problem`.

    Tokens have standard deviation 0.5, which keeps attention weights away from 0 and 1, where values lose their rank.

    Args:
        width: Of the tokens, queries, keys and values.
        hidden: Of the MLP.
        num_blocks: N of every layer.
        sequences: Distinct ones; ``sequences * tokens`` is the rank of generic inputs that are wide enough.
        tokens: In each sequence.
        generator: Where the draws come from.
        repeats: How often each sequence comes, each time with other targets.
        activation: A key of ``ACTIVATIONS``.
        arithmetic: The precision and device of the tensors.

    Returns:
        The problem, with b = sequences * tokens * repeats, and its truth.
    """
    shapes = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
    adapted = _layouts(shapes, [num_blocks] * len(shapes))
    inputs = 0.5 * gaussian(sequences * tokens, width, generator)
    problem = _generic(AttentionBlock(tokens, activation), inputs, repeats, adapted, [], width, generator)
    return problem.placed(arithmetic)


def _layouts(shapes: Iterable[tuple[int, int]], num_blocks: Sequence[int]) -> tuple[BlockLayout, ...]:
    return tuple(BlockLayout(m1, m2, n) for (m1, m2), n in zip(shapes, num_blocks, strict=True))


def _generic(
    architecture: Architecture,
    inputs: Tensor,
    repeats: int,
    adapted: tuple[BlockLayout, ...],
    head: list[tuple[int, int]],
    outputs: int,
    generator: torch.Generator,
) -> NetworkProblem:
    """Random targets and weights around given distinct inputs, and the truth that follows from the counts."""
    samples = len(inputs)
    shapes = [*((layout.in_features, layout.out_features) for layout in adapted), *head]
    return NetworkProblem(
        inputs=inputs.repeat(repeats, 1),
        targets=0.3 * gaussian(samples * repeats, outputs, generator),
        weights=tuple(gaussian(m1, m2, generator) / m1**0.5 for m1, m2 in shapes),
        layouts=adapted,
        architecture=architecture,
        truth=Truth(
            inputs=all(_groups_hold(samples, layout) for layout in adapted),
            gradients=_groups_hold(min(samples * repeats, outputs), transposed(adapted[-1])),
        ),
    )


def _groups_hold(rank: int, layout: BlockLayout) -> bool:
    """Whether generic inputs of this rank, or of all columns if they are fewer, have it in every column group."""
    sizes = [layout.rows(i).stop - layout.rows(i).start for i in written_groups(layout)]
    return bool(min(rank, layout.in_features) <= min(sizes))
