"""Hypothesis strategies for layouts and linear problems: plain integers that shrink, from which tensors are made."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.theory.arithmetic import FLOAT64, Arithmetic, gaussian, seeded
from diablo_theory.theory.problems import TARGETS, LinearProblem, linear_problem

SINGLE = Arithmetic(torch.float32)


@dataclass(frozen=True)
class Case:
    """What a problem, or a batch of such, is made from; its repr is a call that makes it again."""

    rows: int
    m1: int
    m2: int
    num_blocks: int = 1
    rank: int = 0
    seed: int = 0
    condition: float | None = None
    target: str = "generic"
    noise: float = 0.0
    power_of_ten: int = 0
    single: bool = False
    batch_x: tuple[int, ...] = ()
    batch_t: tuple[int, ...] = ()

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.m1, self.m2, self.num_blocks)

    def draw(self, rows: int, cols: int, number: int = 0) -> Tensor:
        """A Gaussian matrix that belongs to the case, such as LoRA's A."""
        return gaussian(rows, cols, seeded(1000 * self.seed + number))

    def one(self, number: int = 0) -> LinearProblem:
        """A single problem; those of other numbers have other tensors and, where there is room, other ranks."""
        return linear_problem(
            self.layout,
            self.rows,
            (self.rank + number) % (min(self.rows, self.m1) + 1),
            seeded(self.seed + number),
            condition=self.condition,
            target=self.target,
            noise=self.noise,
            scale=10.0**self.power_of_ten,
            arithmetic=SINGLE if self.single else FLOAT64,
        )

    def problem(self) -> LinearProblem:
        """The problem, or the batch: inputs of shape batch_x, targets of shape batch_t, one W0 for all."""
        first = self.one()
        if not self.batch_x and not self.batch_t:
            return first
        inputs, targets = math.prod(self.batch_x), math.prod(self.batch_t)
        several = [first, *(self.one(number) for number in range(1, max(inputs, targets)))]
        X, T = torch.stack([one.X for one in several]), torch.stack([one.T for one in several])
        return LinearProblem(
            X[:inputs].reshape(*self.batch_x, *first.X.shape),
            first.W0,
            T[:targets].reshape(*self.batch_t, *first.T.shape),
            self.layout,
        )


def singles(problem: LinearProblem) -> Iterator[tuple[tuple[int, ...], LinearProblem]]:
    """The problems of a batch, one by one, with their indices."""
    batch = torch.broadcast_shapes(problem.X.shape[:-2], problem.W0.shape[:-2], problem.T.shape[:-2])
    whole = {name: getattr(problem, name) for name in ("X", "W0", "T")}
    spread = {name: value.expand(*batch, *value.shape[-2:]) for name, value in whole.items()}
    for index in itertools.product(*map(range, batch)):
        parts = {name: value[index] for name, value in spread.items()}
        yield index, dataclasses.replace(problem, truth=None, **parts)


@st.composite
def layouts(draw: st.DrawFn, largest: int = 10, even: bool = False) -> BlockLayout:
    """Every layout up to a size; only those that N divides if ``even``."""
    if even:
        n, d1, d2 = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
        return BlockLayout(n * d1, n * d2, n)
    m1, m2 = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return BlockLayout(m1, m2, draw(st.integers(1, max(m1, m2))))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    largest: int = 10,
    even: bool = False,
    targets: Sequence[str] = TARGETS,
    powers: Sequence[int] = (0, -150, -20, 20, 150),
    single: bool | None = False,
    batched: bool = False,
) -> Case:
    """Problems of every shape, rank, conditioning, target and scale; they shrink to one row, one block and rank 0.

    Args:
        largest: m1, m2 and a little less than the rows.
        even: Whether N divides m1 and m2.
        targets: Kinds of target.
        powers: Scales of X and T, as powers of ten; float32 takes the 15th part.
        single: Whether in float32; None draws it.
        batched: Whether with batch dimensions, of X, of T, of both or neither.
    """
    layout = draw(layouts(largest, even))
    rows = draw(st.integers(1, largest + 4))
    target = draw(st.sampled_from(targets))
    is_single = draw(st.booleans()) if single is None else single
    power = draw(st.sampled_from(powers))
    batches = [((), ()), ((), (3,)), ((2,), ()), ((2,), (2,)), ((2, 1), (3,)), ((0,), (1,))]
    batch_x, batch_t = draw(st.sampled_from(batches)) if batched else ((), ())
    return Case(
        rows=rows,
        m1=layout.in_features,
        m2=layout.out_features,
        num_blocks=layout.num_blocks,
        rank=draw(st.integers(0, min(rows, layout.in_features))),
        seed=draw(st.integers(0, 999)),
        condition=draw(st.sampled_from([None, 1.0, 10.0] if is_single else [None, 1.0, 1e4])),
        target=target,
        noise=0.0 if target == "generic" else draw(st.sampled_from([0.0, 0.1, 10.0])),
        power_of_ten=power // 15 if is_single else power,
        single=is_single,
        batch_x=batch_x,
        batch_t=batch_t,
    )
