"""Where panels, legends and notes of a figure go: side by side across a page, below each other in a narrow column."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeAlias

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.textpath import text_to_path

from diablo_theory.reporting.style import GREY, RC, solve

P = ParamSpec("P")
Panels: TypeAlias = npt.NDArray[Any]

#: Inches that a title and a label take of a panel that lies below another instead of beside it.
_LABELS = 0.45
#: Inches that panels and what is around them may take of a column; a legend and notes may still grow.
_TALLEST = 8.3


@dataclass(frozen=True)
class Page:
    """What figures are drawn for, so that they are printed at their own size.

    Attributes:
        width: Inches.
        stacked: Whether it is too narrow for panels side by side.
        small: The smallest letters on it, points.
        rc: What differs from :data:`~.style.RC`.
    """

    width: float
    stacked: bool = False
    small: float = 8
    rc: dict[str, Any] = field(default_factory=dict)


#: A text block on A4 or letter paper; its fonts are :data:`~.style.RC`'s own.
WHOLE = Page(7.0)
#: One column of two, as conferences set them.
COLUMN = Page(
    3.35,
    stacked=True,
    small=7,
    rc={
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7.5,
        "lines.linewidth": 1.3,
        "lines.markersize": 4.5,
    },
)
_PAGE: ContextVar[Page] = ContextVar("page", default=WHOLE)


@contextmanager
def drawn_for(page: Page) -> Iterator[None]:
    """Within it, figures are drawn for this page instead of a whole one."""
    before = _PAGE.set(page)
    try:
        yield
    finally:
        _PAGE.reset(before)


def width() -> float:
    """Of what figures are drawn for, inches."""
    return _PAGE.get().width


def small() -> float:
    """The size of notes beside marks, in points."""
    return _PAGE.get().small


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in this project's style, with titles and labels broken to fit, leaving matplotlib's settings alone."""

    @wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(RC | _PAGE.get().rc):
            figure = draw(*args, **kwargs)
            if _PAGE.get().stacked:
                for _ in range(2):  # panels that lie beside each other grow when their labels are broken
                    _break_words(figure)
            return figure

    return in_style


def grid(
    heights: Sequence[float],
    columns: int,
    around: float = 0.0,
    *,
    widths: Sequence[float] | None = None,
    stack: bool = True,
    **share: Any,
) -> tuple[Figure, Panels]:
    """Rows of panels; in a column, those of a row lie below each other.

    Args:
        heights: Inches of each row, with its titles and labels.
        columns: Panels of a row.
        around: Inches for a legend and notes.
        widths: Relative widths of the columns; equal if left out.
        stack: False for panels that are legible side by side in a column too.
        **share: ``sharex`` and ``sharey``, as ``Figure.subplots`` takes them.

    Returns:
        The figure, and its panels in an array of rows and columns however they lie.
    """
    page = _PAGE.get()
    if not (page.stacked and stack):
        figure = Figure(figsize=(page.width, around + sum(heights)))
        ratios = {"height_ratios": heights, "width_ratios": widths}
        panels: Panels = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw=ratios, **share)
        return figure, panels
    figure, rows = spanning(heights, [columns] * len(heights), around)
    panels = np.array(rows)
    for axis, kind in share.items():
        _share(panels, axis, kind)
    return figure, panels


def spanning(heights: Sequence[float], counts: Sequence[int], around: float = 0.0) -> tuple[Figure, list[list[Axes]]]:
    """Rows of different numbers of panels, each row across the whole page; in a column all lie below each other.

    Args:
        heights: As for :func:`grid`.
        counts: Panels of each row.
        around: As for :func:`grid`.

    Returns:
        The figure, and its panels row by row.
    """
    page = _PAGE.get()
    if page.stacked:
        each = np.repeat(heights, counts)
        around += _LABELS * (len(each) - len(heights))
        figure = Figure(figsize=(page.width, fit(around + each.sum())))
        left = iter(figure.subplots(len(each), 1, squeeze=False, gridspec_kw={"height_ratios": each}).ravel())
        return figure, [[next(left) for _ in range(count)] for count in counts]
    figure = Figure(figsize=(page.width, around + sum(heights)))
    spec = figure.add_gridspec(len(heights), max(counts), height_ratios=heights)
    cells = [
        [spec[row, :]] if count == 1 else [spec[row, place] for place in range(count)]
        for row, count in enumerate(counts)
    ]
    return figure, [[figure.add_subplot(cell) for cell in row] for row in cells]


def _share(panels: Panels, axis: str, kind: Any) -> None:
    """Share the panels' axes, each with its own numbers, since panels that share may lie apart."""
    for (row, column), axes in np.ndenumerate(panels):
        first = panels[row if kind == "row" else 0, column if kind == "col" else 0]
        if kind and axes is not first:
            getattr(axes, axis)(first)


def label_below(panels: Panels, *words: str) -> None:
    """Name the x axes of each column: at the last row, or at every panel where those of a row lie below each other."""
    for column, text in zip(panels.T, words, strict=True):
        for axes in column if _is_stacked(panels) else column[-1:]:
            axes.set_xlabel(text)


def label_left(panels: Panels, words: str) -> None:
    """Name the y axes: at the first column, or at every panel where those of a row lie below each other."""
    for axes in panels.ravel() if _is_stacked(panels) else panels[:, 0]:
        axes.set_ylabel(words)


def _is_stacked(panels: Panels) -> bool:
    return panels.shape[1] > 1 and bool(panels[0, 1].get_subplotspec().colspan.start == 0)


def names_beside(axes: Axes) -> None:
    """Leave out names of rows that stand at the panel on the left, where there is one."""
    spec = axes.get_subplotspec()
    if spec is not None and spec.colspan.start > 0:
        axes.set_yticklabels([])
        axes.tick_params(left=False)


def fit(height: float) -> float:
    """The height of a figure, inches: in a column not beyond what a page has."""
    return min(height, _TALLEST) if _PAGE.get().stacked else height


def stacked() -> bool:
    """Whether panels lie below each other."""
    return _PAGE.get().stacked


def legend(figure: Figure, handles: Sequence[Artist], ncols: int, **how: Any) -> Legend:
    """A legend above all panels, in as many columns as fit, for which the figure grows where these are fewer."""
    page, size = _PAGE.get(), mpl.rcParams["legend.fontsize"]
    if page.stacked:
        entry = max(_wide(str(handle.get_label()), size) for handle in handles) + 4.5 * size
        fewer = max(1, min(ncols, int(72 * page.width / entry)))
        lines = math.ceil(len(handles) / fewer) - math.ceil(len(handles) / ncols)
        figure.set_figheight(figure.get_figheight() + 1.3 * size * lines / 72)
        ncols = fewer
    return figure.legend(handles=list(handles), loc="outside upper left", ncols=ncols, **how)


def foot(figure: Figure, *sentences: str) -> None:
    """What a reader must know of the numbers, below the panels; empty sentences are left out."""
    page, text = _PAGE.get(), " ".join(part for part in sentences if part)
    lines = _lines(text, 0.93 * page.width, page.small)
    more = len(lines) - len(_lines(text, 0.93 * WHOLE.width, WHOLE.small))
    figure.set_figheight(figure.get_figheight() + 1.25 * page.small * more / 72)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=page.small, color=GREY)


def _wide(text: str, size: float, weight: str = "normal") -> float:
    """Points that a line of text takes."""
    font = FontProperties(family=RC["font.family"], size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def _lines(text: str, inches: float, size: float, weight: str = "normal") -> list[str]:
    """The text broken between words into lines of at most so many inches, where no word is longer."""
    lines: list[str] = []
    for word in text.split():
        if lines and _wide(f"{lines[-1]} {word}", size, weight) <= 72 * inches:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _break_words(figure: Figure) -> None:
    """Break titles and labels that are wider than the room up to the next panels, or to the edge."""
    solve(figure)
    inches = figure.dpi_scale_trans.inverted()
    boxes = {axes: axes.get_window_extent().transformed(inches) for axes in figure.axes}
    edge, size = figure.get_figwidth(), mpl.rcParams["axes.titlesize"]
    for axes, box in boxes.items():
        row = {other: its for other, its in boxes.items() if its.y0 < box.y1 and its.y1 > box.y0}
        titled = [its.x0 for other, its in row.items() if its.x0 > box.x1 and other.get_title(loc="left")]
        if "$" not in (title := axes.get_title(loc="left")):  # a formula is one word
            room = min([edge, *titled]) - box.x0
            axes.set_title("\n".join(_lines(title, room, size, "bold")), loc="left")
        right = min(((box.x1 + its.x0) / 2 for its in row.values() if its.x0 > box.x1), default=edge)
        left = max(((box.x0 + its.x1) / 2 for its in row.values() if its.x1 < box.x0), default=0.0)
        middle = (box.x0 + box.x1) / 2
        _break_label(axes.xaxis.label, 1.9 * min(middle - left, right - middle))
        _break_label(axes.yaxis.label, 1.2 * box.height)


def _break_label(label: Text, inches: float) -> None:
    words = label.get_text().split("\n")  # breaks that are there stay
    label.set_text("\n".join(line for part in words for line in _lines(part, inches, float(label.get_fontsize()))))
