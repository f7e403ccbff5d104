"""Maps of the linear problem: what each method misses of full fine-tuning at equal parameters, and who least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.layout import grid, label_below, label_left, legend, styled, width
from diablo_theory.reporting.style import DIABLO_BLUE, LORA_VERMILLION

TIE = 0.01  # gaps closer than one per cent of what full fine-tuning captures count as equal
METHODS = {"diablo_gap": "DiaBlo", "lora_gap": "LoRA", "frozen_gap": "LoRA, frozen A"}
AXES = {
    "rank_x": "rank of X",
    "num_blocks": "number of blocks N",
    "target_rank": "rank of the target",
    "noise": "noise relative to the signal",
    "condition": "conditioning of X",
}
_SHORT = {"rank_x": "rank X", "num_blocks": "N", "target_rank": "target rank", "noise": "noise", "condition": "cond X"}
Floats = npt.NDArray[np.float64]

# Who is ahead, from the letters of the methods within TIE of the smallest gap: text, colour, legend.
_LEADS = {
    "D": ("D", DIABLO_BLUE, "D: DiaBlo"),
    "DF": ("DF", "#56B4E9", "DF: DiaBlo and frozen A"),
    "F": ("F", "#E69F00", "F: LoRA, frozen A"),
    "L": ("L", LORA_VERMILLION, "L: LoRA"),
    "=": ("=", "#F2F2F2", "=: no winner by 1%"),
}
_ORDER = list(_LEADS)


@styled
def theory_map(cells: pd.DataFrame, x: str = "rank_x", y: str = "num_blocks") -> Figure:
    """The gap of every method over two coordinates, and which is smallest.

    Args:
        cells: A map: the columns of ``AXES`` that vary, ``diablo_gap, lora_gap, frozen_gap`` and ``in_theorem``.
            Cells that differ in nothing else are averaged.
        x: Coordinate across.
        y: Coordinate upwards.

    Raises:
        ResultsError: If there is nothing to draw, or another coordinate varies as well.
    """
    _refuse_other_coordinates(cells, {x, y})
    tables = _tables(cells, x, y)
    figure, panels = grid([2.3, 2.3], 2, 1.0, sharex=True, sharey=True)
    heat = panels.ravel()[:3]
    for axes, (column, name) in zip(heat, METHODS.items(), strict=True):
        gap = tables[column].to_numpy()
        image = axes.pcolormesh(*_edges(gap), gap, cmap="cividis_r", vmin=0, vmax=1, edgecolors="white")
        _write(axes, [[f"{100 * value:.0f}" for value in row] for row in gap], gap > 0.55)
        axes.set_title(f"{name}: gap")
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=40, format=PercentFormatter(1))
    bar.set_label("missed, of what full fine-tuning captures (cells: %)")
    leads = _lead(panels[1, 1], tables)
    panels[1, 1].set_title("Smallest gap")
    for axes in panels.ravel():
        _frame(axes, tables)
    label_below(panels, AXES[x], AXES[x])
    label_left(panels, AXES[y])
    legend(figure, _keys(leads, tables), 3, handlelength=1.6)
    return figure


@styled
def lead_maps(cells: pd.DataFrame, x: str, y: str, across: str, up: str | None = None) -> Figure:
    """Who misses least over four coordinates: a small map for each pair of values of two of them.

    Args:
        cells: As in :func:`theory_map`.
        x: Coordinate across within a small map.
        y: Coordinate upwards within it.
        across: Coordinate of the columns of small maps.
        up: Coordinate of their rows; one row without it.

    Raises:
        ResultsError: If there is nothing to draw, or a fifth coordinate varies as well.
    """
    _refuse_other_coordinates(cells, {x, y, across} | ({up} if up else set()))
    columns = sorted(cells[across].unique())
    rows = sorted(cells[up].unique(), reverse=True) if up else [None]
    figure = Figure(figsize=(width(), 0.9 + 1.45 * len(rows)))
    panels = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    seen: set[str] = set()
    for (i, row), (j, column) in ((r, c) for r in enumerate(rows) for c in enumerate(columns)):
        part = cells[(cells[across] == column) & ((cells[up] == row) if up else True)]
        tables = _tables(part, x, y)
        axes = panels[i, j]
        seen |= set(_lead(axes, tables))
        _frame(axes, tables)
        named = [f"{_SHORT[across]} {column:g}"] + ([f"{_SHORT[up]} {row:g}"] if up else [])
        axes.set_title(", ".join(named), fontsize=8, fontweight="normal")
        axes.tick_params(labelsize=6.5)
    figure.supxlabel(AXES[x], fontsize=9)
    figure.supylabel(AXES[y], fontsize=9)
    legend(figure, list(_keys(seen, tables)), 3, handlelength=1.6)
    return figure


def draw_map(cells: pd.DataFrame) -> list[tuple[str, Figure]]:
    """The figures of a map by file name, in this project's style, for whatever coordinates vary.

    Rank X and N come first; up to two further coordinates become columns and rows of small maps. Where more vary, the
    gaps are drawn for the first value of each further one, and the file name says so.

    Args:
        cells: As in :func:`theory_map`.

    Raises:
        ResultsError: If there is nothing to draw.
    """
    x, y, *others = sorted(AXES, key=lambda name: (name not in varying(cells), list(AXES).index(name)))
    others = [name for name in others if name in varying(cells)]
    drawn = []
    if len(others) in (1, 2):
        drawn.append(("map_leads", lead_maps(cells, x, y, *others)))
    part, stem = cells, "map_gaps"
    for name in others:
        first = cells[name].min()
        part, stem = part[part[name] == first], f"{stem}_{name}_{first:g}"
    drawn.append((stem, theory_map(part, x, y)))
    return drawn


def map_table(cells: pd.DataFrame) -> Table:
    """A map for the terminal: who misses least, inside and outside the theorem's region, by what varies besides."""
    if cells.empty:
        raise ResultsError("the map holds no cells")
    others = [name for name in varying(cells) if name not in ("rank_x", "num_blocks")]
    gaps = cells[list(METHODS)].to_numpy()
    ahead = gaps <= gaps.min(axis=1, keepdims=True) + TIE
    single = ahead.sum(axis=1) == 1
    table = Table(title="Cells by who misses least of what full fine-tuning captures", title_justify="left")
    table.caption = "D: DiaBlo; F: LoRA with a frozen A; DF: these two within 1%; L: LoRA"
    for heading in (
        *(_SHORT[name] for name in others),
        "theorem's region",
        "cells",
        "D",
        "DF",
        "F",
        "L",
        "none by 1%",
    ):
        table.add_column(heading, justify="right")
    for where, part in cells.groupby([*others, "in_theorem"], sort=True):
        at = cells.index.get_indexer(part.index)
        wins = [int((single[at] & ahead[at, k]).sum()) for k in range(3)]
        both = int((ahead[at, 0] & ahead[at, 2] & ~ahead[at, 1]).sum())
        counts = (len(part), wins[0], both, wins[2], wins[1], len(part) - sum(wins) - both)
        table.add_row(*(f"{value:g}" for value in where[:-1]), "inside" if where[-1] else "outside", *map(str, counts))
    return table


def varying(cells: pd.DataFrame) -> list[str]:
    """The coordinates of a map that take more than one value, in the order of ``AXES``."""
    return [name for name in AXES if name in cells and len(cells[name].unique()) > 1]


def _refuse_other_coordinates(cells: pd.DataFrame, shown: set[str]) -> None:
    if cells.empty:
        raise ResultsError("the map holds no cells to draw")
    for name in shown:
        if name not in AXES or name not in cells:
            raise ResultsError(f"no coordinate {name!r} in the map. Known: {', '.join(AXES)}.")
    if others := [name for name in varying(cells) if name not in shown]:
        raise ResultsError(f"{others[0]} varies as well; choose one value of it, or show it as a row or column")


def _tables(cells: pd.DataFrame, x: str, y: str) -> dict[str, pd.DataFrame]:
    """One table a column, y down and x across."""
    points = cells.astype({"in_theorem": float})
    return {name: points.pivot_table(index=y, columns=x, values=name) for name in [*METHODS, "in_theorem"]}


def _lead(axes: Axes, tables: dict[str, pd.DataFrame]) -> list[str]:
    """Colour and letter each cell by the methods within TIE of the smallest gap; returns which occur."""
    gaps = np.stack([tables[name].to_numpy() for name in METHODS])
    close = gaps <= gaps.min(axis=0) + TIE
    letters = [["".join(c for c, ahead in zip("DLF", cell, strict=True) if ahead) for cell in row] for row in close.T]
    leads = [[lead if lead in _LEADS else "=" for lead in row] for row in zip(*letters, strict=True)]
    winner = np.array([[_ORDER.index(lead) for lead in row] for row in leads])
    colors = ListedColormap([color for _, color, _ in _LEADS.values()])
    axes.pcolormesh(*_edges(winner), winner, cmap=colors, vmin=0, vmax=len(_ORDER) - 1, edgecolors="white")
    _write(axes, [[_LEADS[lead][0] for lead in row] for row in leads], np.isin(winner, [0, 3]))
    return [lead for row in leads for lead in row]


def _keys(leads: Sequence[str] | set[str], tables: dict[str, pd.DataFrame]) -> list[Line2D | Patch]:
    keys: list[Line2D | Patch] = []
    if (tables["in_theorem"] == 1).to_numpy().any():
        keys.append(Line2D([], [], color="black", linewidth=2.2, label="theorem's region: DiaBlo's gap is 0"))
    for lead in _ORDER:
        if lead in leads:
            _, color, label = _LEADS[lead]
            keys.append(Patch(facecolor=color, edgecolor="#999999", label=label))
    return keys


def _edges(grid: npt.NDArray[np.generic]) -> tuple[Floats, Floats]:
    """Cells of equal size, whatever the values: (x, y)."""
    return np.arange(grid.shape[1] + 1) - 0.5, np.arange(grid.shape[0] + 1) - 0.5


def _write(axes: Axes, words: list[list[str]], on_dark: npt.NDArray[np.bool_]) -> None:
    """Write into the cells, if they are large enough to read."""
    if max(len(words), len(words[0])) > 10:
        return
    for (up, across), dark in np.ndenumerate(on_dark):
        color = "white" if dark else "black"
        axes.text(across, up, words[up][across], ha="center", va="center", fontsize=8, color=color)


def _frame(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Label the axes with the grid's own values and outline the theorem's region."""
    inside = tables["in_theorem"] == 1
    x, y = _edges(inside.to_numpy())
    padded = np.pad(inside.to_numpy(), 1)
    across = [((x[j], y[i - 1]), (x[j], y[i])) for i, j in np.argwhere(padded[:, 1:] != padded[:, :-1])]
    up = [((x[j - 1], y[i]), (x[j], y[i])) for i, j in np.argwhere(padded[1:] != padded[:-1])]
    axes.add_collection(LineCollection(across + up, colors="black", linewidths=2.2, clip_on=False, zorder=4))
    axes.set_xticks(range(inside.shape[1]), [f"{value:g}" for value in inside.columns])
    axes.set_yticks(range(inside.shape[0]), [f"{value:g}" for value in inside.index])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
