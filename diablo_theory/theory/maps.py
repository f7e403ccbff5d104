"""Maps of the linear problem: what DiaBlo, LoRA and LoRA with a frozen A miss at equal parameters, over a grid.

The unit of work is one input X (a rank and a conditioning): all targets, noises and block counts share its
decomposition, and all block counts share each target's singular values.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diablo_theory.blocks import BlockLayout
from diablo_theory.errors import ConfigError, nearest
from diablo_theory.theory import optima
from diablo_theory.theory.arithmetic import gaussian, require_integer, seeded
from diablo_theory.theory.column_space import ColumnSpace, column_space, written_groups
from diablo_theory.theory.problems import TARGETS, LinearProblem, low_rank_inputs, update_of_kind
from diablo_theory.theory.reduction import ReducedProblem
from diablo_theory.theory.starts import usual_start

Cell = dict[str, Any]
"""One flat record: see :func:`map_cells`."""
#: Kinds of target that are made for one block layout, and so differ from one block count to the next.
_OF_LAYOUT = ("block-aligned", "sparse")


@dataclass(frozen=True)
class Grid:
    """The cells of a map: every combination of the sequences.

    Args:
        ranks: Ranks of X, each from 1 to min(rows, size).
        block_counts: N, each from 1 to max(size, outputs). At N = size the budget buys LoRA no rank at all.
        conditions: Conditioning of X, each from 1 to 1e6: a group of columns is worse conditioned than X, and beyond
            that float64 can take its smallest directions for rounding.
        target: One of ``problems.TARGETS``, what the residual is made from.
        target_ranks: Ranks of a "low-rank" target; other targets take one value, whatever it is.
        noises: ``||E|| / ||X dW*||``; other than 0 for targets made from an update only.
        rows: b, tokens.
        size: m1.
        outputs: m2.
        draws: Independent targets to average over in each cell.
        seed: Where all draws come from. A cell depends on the seed and its own coordinates only.

    Raises:
        ConfigError: If the target is unknown.
        TypeError: If a count is not an integer, or a sequence is neither a list nor a tuple.
        ValueError: If a value is out of range; the message names it.
    """

    ranks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    block_counts: Sequence[int] = (1, 2, 4, 8, 16, 32)
    conditions: Sequence[float] = (1.0,)
    target: str = "generic"
    target_ranks: Sequence[int] = (1,)
    noises: Sequence[float] = (0.0,)
    rows: int = 128
    size: int = 64
    outputs: int = 64
    draws: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"unknown target {self.target!r}.{nearest(self.target, TARGETS)}")
        for name in ("rows", "size", "outputs", "draws"):
            require_integer(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        limits: dict[str, tuple[float, float]] = {
            "ranks": (1, min(self.rows, self.size)),
            "block_counts": (1, max(self.size, self.outputs)),
            "conditions": (1, 1e6),
            "target_ranks": (1, min(self.size, self.outputs)),
            "noises": (0, 1e12),
        }
        for name, (low, high) in limits.items():
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise TypeError(f"{name} must be a list or a tuple, got {values!r}")
            if not values:
                raise ValueError(f"{name} must hold at least one value")
            for value in values:
                if name in ("ranks", "block_counts", "target_ranks"):
                    require_integer(name, value)
                if not low <= value <= high:
                    raise ValueError(f"{name} must lie from {low:g} to {high:g}, got {value}")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must not repeat a value, got {values}")
        if self.target != "low-rank" and len(self.target_ranks) > 1:
            raise ValueError(f"target_ranks must hold one value unless target is 'low-rank', got {self.target_ranks}")
        if self.target in ("generic", "noise") and tuple(self.noises) != (0.0,):
            raise ValueError(f"noises must be 0 for target {self.target!r}, which has no signal, got {self.noises}")

    @property
    def num_cells(self) -> int:
        """How many cells there are."""
        parts = (self.ranks, self.conditions, self.target_ranks, self.noises, self.block_counts)
        count = 1
        for part in parts:
            count *= len(part)
        return count

    def tasks(self) -> list[dict[str, Any]]:
        """Keyword arguments of :func:`map_cells`, one for each input X: what a sweep runs."""
        shared = {name: value for name, value in asdict(self).items() if name not in ("ranks", "conditions")}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in shared.items()}
        return [
            {"rank": rank, "condition": condition} | plain
            for rank, condition in itertools.product(self.ranks, self.conditions)
        ]


def map_cells(*, rank: int, condition: float, **shared: Any) -> list[Cell]:
    """All cells of a map that share one input X.

    A gap is a fraction of ``1/2 ||P_X R||^2``: 0 is full fine-tuning, 1 captures nothing. LoRA's ranks are rounded
    down to DiaBlo's parameters.

    Args:
        rank: Rank of X.
        condition: Conditioning of X.
        shared: The other fields of a :class:`Grid`.

    Returns:
        One flat record a cell: rank_x, condition, target, target_rank, noise, num_blocks, block_rows, diablo_params,
        lora_rank, lora_params, frozen_rank, frozen_params, diablo_gap, lora_gap, frozen_gap (LoRA with a frozen
        usual random A) and in_theorem (whether every block has at least rank_x rows).

    Source: theory.md, L2, L4, L5, L6.
    """
    grid = Grid(ranks=[rank], conditions=[condition], **shared)
    where, space = _place(grid), column_space(_input(grid)).cut()
    cells: list[Cell] = []
    common = (
        None if grid.target in _OF_LAYOUT else _Targets(space, grid, where, BlockLayout(grid.size, grid.outputs, 1))
    )
    for count in grid.block_counts:
        layout = BlockLayout(grid.size, grid.outputs, count)
        targets = common or _Targets(space, grid, f"{where}/{count}", layout)
        gaps = targets.gaps(layout, _frozen_factor(layout, where))
        for (t, target_rank), (s, noise) in itertools.product(enumerate(grid.target_ranks), enumerate(grid.noises)):
            coordinates: Cell = {
                "rank_x": rank,
                "condition": float(condition),
                "target": grid.target,
                "target_rank": target_rank if grid.target == "low-rank" else 0,
                "noise": float(noise),
            }
            cells.append(coordinates | _budget(layout, rank) | {name: float(gap[t, s]) for name, gap in gaps.items()})
    return cells


def cell_problem(
    task: dict[str, Any], num_blocks: int, target_rank: int = 1, noise: float = 0.0, draw: int = 0
) -> tuple[LinearProblem, Float[Tensor, "m1 rho"]]:
    """The problem behind one cell of a map, and LoRA's frozen A, as dense matrices.

    Args:
        task: One of :meth:`Grid.tasks`.
        num_blocks: N.
        target_rank: One of the grid's.
        noise: One of the grid's.
        draw: From 0 to the grid's draws - 1.

    Returns:
        The problem with W0 = 0, so that T is the residual, and A.
    """
    fields = {name: value for name, value in task.items() if name not in ("rank", "condition")}
    grid = Grid(ranks=[task["rank"]], conditions=[task["condition"]], **fields)
    layout, where = BlockLayout(grid.size, grid.outputs, num_blocks), _place(grid)
    X = _input(grid)
    above = f"{where}/{num_blocks}" if grid.target in _OF_LAYOUT else where
    truth, E = _truth_and_noise(grid, layout, target_rank, f"{above}/{target_rank}/{draw}")
    if truth is None or grid.target == "noise":
        T = E
    else:
        signal = X @ truth
        T = signal + noise * signal.norm() / E.norm() * E
    W0 = torch.zeros(grid.size, grid.outputs, dtype=torch.float64)
    return LinearProblem(X, W0, T, layout, truth), _frozen_factor(layout, where)


def _place(grid: Grid) -> str:
    return f"{grid.seed}/{grid.ranks[0]}/{grid.conditions[0]:g}"


def _input(grid: Grid) -> Tensor:
    return low_rank_inputs(grid.rows, grid.size, grid.ranks[0], _draws(_place(grid)), grid.conditions[0])


def _frozen_factor(layout: BlockLayout, where: str) -> Tensor:
    generator = _draws(f"{where}/{layout.num_blocks}/A")
    return usual_start(layout.in_features, layout.out_features, optima.frozen_rank_at_budget(layout), generator).A


def _truth_and_noise(grid: Grid, layout: BlockLayout, rank: int, where: str) -> tuple[Tensor | None, Tensor]:
    generator = _draws(where)
    truth = update_of_kind(grid.target, layout, generator, rank)
    return truth, gaussian(grid.rows, grid.outputs, generator)


def _draws(where: str) -> torch.Generator:
    return seeded(zlib.crc32(where.encode()))


def _budget(layout: BlockLayout, rank: int) -> Cell:
    lora, frozen = optima.lora_rank_at_budget(layout), optima.frozen_rank_at_budget(layout)
    rows = [layout.rows(i) for i in written_groups(layout)]
    return {
        "num_blocks": layout.num_blocks,
        "block_rows": layout.block_rows,
        "diablo_params": layout.num_parameters,
        "lora_rank": lora,
        "lora_params": lora * (layout.in_features + layout.out_features),
        "frozen_rank": frozen,
        "frozen_params": frozen * layout.out_features,
        "in_theorem": min(part.stop - part.start for part in rows) >= rank,
    }


class _Targets:
    """Coordinates of P_X R for every target rank, noise and draw, shape (ranks, noises, draws, k, m2)."""

    def __init__(self, space: ColumnSpace, grid: Grid, where: str, layout: BlockLayout) -> None:
        assert space.basis is not None
        draws = [
            [self._one(space, grid, layout, rank, f"{where}/{rank}/{d}") for d in range(grid.draws)]
            for rank in grid.target_ranks
        ]
        target = torch.stack([torch.stack(of_rank, 1) for of_rank in draws])
        zeros = torch.zeros(target.shape[:-2], dtype=torch.float64)
        self.problem = ReducedProblem(space, target, zeros, zeros.long())
        self.lora = optima.lora_relative_gaps(self.problem)

    @staticmethod
    def _one(space: ColumnSpace, grid: Grid, layout: BlockLayout, rank: int, where: str) -> Float[Tensor, "s k m2"]:
        """One draw at every noise; the noise's norm is taken over all tokens, as in ``linear_problem``."""
        assert space.basis is not None
        truth, draw = _truth_and_noise(grid, layout, rank, where)
        inside: Tensor = space.basis.mT @ draw
        if truth is None or grid.target == "noise":
            return inside[None]
        signal = space.coordinates @ truth
        levels = torch.tensor([float(noise) for noise in grid.noises], dtype=torch.float64)
        noises: Tensor = (levels * signal.norm() / draw.norm())[:, None, None] * inside
        return signal + noises

    def gaps(self, layout: BlockLayout, A: Tensor) -> dict[str, Float[Tensor, "t s"]]:
        """The methods' relative gaps at the parameters of a layout, averaged over draws."""
        rho = min(optima.lora_rank_at_budget(layout), self.lora.shape[-1] - 1)
        return {
            "diablo_gap": optima.diablo_optimum(self.problem, layout, minimiser=False).relative_gap.mean(-1),
            "lora_gap": self.lora[..., rho].mean(-1),
            "frozen_gap": optima.frozen_lora_optimum(self.problem, A, minimiser=False).relative_gap.mean(-1),
        }
