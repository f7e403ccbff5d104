"""The method as a picture: which entries of a frozen weight DiaBlo trains, beside LoRA's two thin factors."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from diablo_theory.reporting.layout import grid, stacked, styled
from diablo_theory.reporting.style import DIABLO_BLUE, LORA_VERMILLION

_FROZEN = "#E9E9E9"
_BLOCKS = 4
#: Shades of one colour, light enough for black letters and apart in grey as well.
_SHADES = ("#0072B2", "#5BA3D0", "#9CC9E6", "#D3E7F4")


@styled
def method_diagram() -> Figure:
    """``Y = X W`` with its N diagonal blocks trained, and with LoRA's ``A B`` beside W."""
    figure, ((left, right),) = grid([2.75], 2, widths=[1, 1.12])
    if stacked():
        figure.set_figheight(5.1)  # no label below a panel takes room
    _diablo(left)
    _lora(right)
    for axes, width in ((left, 8.3), (right, 9.4)):
        axes.set(xlim=(-0.3, width), ylim=(-2.0, 4.15), aspect="equal")
        axes.set_axis_off()
    return figure


def _diablo(axes: Axes) -> None:
    axes.set_title(r"DiaBlo: $Y = X\,(W + \mathrm{diag}(D_1, \ldots, D_N))$", fontweight="normal")
    size = 4 / _BLOCKS
    for i in range(_BLOCKS):
        ink = "white" if i == 0 else "black"
        across = 0.5 * i
        _box(axes, (across, 0), (0.5, 4), _SHADES[i], rf"$X_{i + 1}$", ink)
        _box(axes, (6 + across, 0), (0.5, 4), _SHADES[i], rf"$Y_{i + 1}$", ink)
    _box(axes, (2.75, 0), (2.5, 4), _FROZEN, "")
    axes.text(4.6, 3.1, "$W$\nfrozen", ha="center", va="center", fontsize=8.5)
    for i in range(_BLOCKS):
        ink = "white" if i == 0 else "black"
        corner = (2.75 + 0.625 * i, 4 - size * (i + 1))
        _box(axes, corner, (0.625, size), _SHADES[i], rf"$D_{i + 1}$", ink, edge=DIABLO_BLUE)
    _joined(axes, (2.08, 2), (2.67, 2), "·")
    _joined(axes, (5.33, 2), (5.92, 2), "=")
    _sizes(axes, ((1, r"$b \times m_1$"), (4, r"$m_1 \times m_2$"), (7, r"$b \times m_2$")))
    axes.text(4, -1.05, r"$Y_i$ gets $X_i D_i$ added, and nothing from other groups", ha="center", fontsize=8.5)
    axes.text(4, -1.85, r"trained: $m_1 m_2 \, / \, N$ entries", ha="center", fontsize=10, color=DIABLO_BLUE)


def _lora(axes: Axes) -> None:
    axes.set_title(r"LoRA: $Y = X\,(W + A\,B)$", fontweight="normal")
    _box(axes, (0, 0), (2, 4), "white", "$X$")
    _box(axes, (2.75, 0), (2.5, 4), _FROZEN, "$W$\nfrozen")
    _box(axes, (6.1, 0), (0.45, 4), LORA_VERMILLION, "$A$", "white")
    _box(axes, (6.8, 3.55), (2.3, 0.45), LORA_VERMILLION, "$B$", "white")
    axes.text(2.3, 2, "·", ha="center", va="center", fontsize=13)
    axes.text(5.66, 2, "+", ha="center", va="center", fontsize=12)
    _sizes(axes, ((1, r"$b \times m_1$"), (4, r"$m_1 \times m_2$"), (6.35, r"$m_1 \times r$")))
    axes.text(7.95, 3.1, r"$r \times m_2$", ha="center", va="center", fontsize=8)
    axes.text(4.6, -1.05, "every output reads every input, by way of $r$ directions", ha="center", fontsize=8.5)
    for at, inward in ((2.6, 0.12), (9.22, -0.12)):  # brackets around W + A B
        axes.plot([at + inward, at, at, at + inward], [-0.12, -0.12, 4.12, 4.12], color="black", linewidth=1)
    axes.text(4.6, -1.85, r"trained: $r\,(m_1 + m_2)$ entries", ha="center", fontsize=10, color="#A84A00")


def _box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], color: str, text: str, ink: str = "black",
    edge: str = "black",
) -> None:  # fmt: skip
    axes.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor=edge, linewidth=0.9))
    middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    axes.text(*middle, text, ha="center", va="center", fontsize=8.5, color=ink)


def _joined(axes: Axes, start: tuple[float, float], end: tuple[float, float], sign: str) -> None:
    axes.text((start[0] + end[0]) / 2, start[1], sign, ha="center", va="center", fontsize=13)


def _sizes(axes: Axes, named: tuple[tuple[float, str], ...]) -> None:
    for across, text in named:
        axes.text(across, -0.42, text, ha="center", va="center", fontsize=8)
