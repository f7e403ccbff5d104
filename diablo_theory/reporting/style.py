"""How every figure looks: fonts, colours that colour-blind readers tell apart, markers that survive greyscale."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from diablo_theory.files import write_with

GREY = "#595959"
DIABLO_BLUE = "#0072B2"
LIGHT_BLUE = "#56B4E9"
LORA_VERMILLION = "#D55E00"
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that every machine draws the same glyphs
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "hatch.linewidth": 0.7,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 220,
    "pdf.fonttype": 42,
    "svg.hashsalt": "diablo-theory",
}
#: The kinds of files of every figure, each with what would tell the day or the version of its writer.
UNDATED: dict[str, dict[str, Any]] = {
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
}


@dataclass(frozen=True)
class Look:
    """How one method is drawn, in every figure alike."""

    color: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]
    hatch: str


_LOOKS = {  # Okabe and Ito's palette
    "none": (Look("#000000", "x", ":", ""),),
    "full": (Look("#009E73", "s", "-.", "...."),),
    "diablo": (
        Look(DIABLO_BLUE, "o", "-", ""),
        Look(LIGHT_BLUE, "p", (0, (8, 2)), "xx"),
        Look("#000000", "h", "-", "++"),
    ),
    "lora": (Look(LORA_VERMILLION, "^", "--", "////"), Look("#E69F00", "v", (0, (2, 1)), "----")),
    "dora": (Look("#CC79A7", "D", (0, (5, 1, 1, 1, 1, 1)), "\\\\\\\\"),),
    "miss": (Look(GREY, "*", (0, (1, 1)), "oo"),),
    "lora-fa": (Look("#8C510A", "P", (0, (4, 1, 1, 1)), "**"),),
}
_OTHERS = (  # Tol's muted palette, which the same readers tell apart
    Look("#117733", ">", (0, (5, 1, 1, 1, 1, 1)), "\\\\\\\\"),
    Look("#882255", "<", (0, (1, 1)), "oo"),
    Look("#332288", "d", (0, (3, 1)), "OO"),
    Look("#44AA99", "X", (0, (5, 1)), "..."),
    Look("#AA4499", "H", (0, (3, 1, 1, 1)), "xx"),
    Look("#999933", "8", (0, (2, 2)), "++"),
    Look("#661100", "p", (0, (6, 1)), "//"),
)


def looks(pairs: Sequence[tuple[str, str]]) -> dict[str, Look]:
    """Give each method a look that depends only on its kind and on how many of the kind came before.

    Args:
        pairs: ``(label, method)`` in drawing order.

    Returns:
        A look per label.
    """
    seen: dict[str, int] = {}
    chosen = {}
    for label, method in pairs:
        kind = method if method in _LOOKS else ""  # all others share their looks, one after another
        family = _LOOKS.get(kind, _OTHERS)
        chosen[label] = family[seen.get(kind, 0) % len(family)]
        seen[kind] = seen.get(kind, 0) + 1
    return chosen


def save(figure: Figure, folder: Path, stem: str, kinds: Sequence[str] = tuple(UNDATED)) -> list[Path]:
    """Write a figure as PDF, SVG and PNG, whole or not at all, with the same bytes for the same data.

    Args:
        figure: The figure.
        folder: Where the files go.
        stem: File name without its suffix.
        kinds: Suffixes, of :data:`UNDATED`.

    Returns:
        The files, in the order of the kinds.
    """
    written = []
    with mpl.rc_context(RC):
        solve(figure)
        figure.set_layout_engine("none")  # solved once, for files that are alike
        for suffix in kinds:
            path = folder / f"{stem}{suffix}"
            drawn = io.BytesIO()  # matplotlib's own writing hides a full disk behind an error of its clean-up
            figure.set_dpi(mpl.rcParams["savefig.dpi"])  # of PNG; the others set their own, and leave it
            getattr(_CANVASES[suffix](figure), f"print_{suffix[1:]}")(drawn, metadata=UNDATED[suffix])
            content = drawn.getvalue() if suffix != ".svg" else _numbered_clips(drawn.getvalue())
            write_with(path, methodcaller("write_bytes", content))
            written.append(path)
    return written


#: Asked directly: ``savefig`` would draw everything once more for each file, to solve the layout again.
_CANVASES: dict[str, Any] = {".pdf": FigureCanvasPdf, ".svg": FigureCanvasSVG, ".png": FigureCanvasAgg}


def solve(figure: Figure) -> None:
    """Give panels, legends and notes of a figure their places."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def _numbered_clips(svg: bytes) -> bytes:
    """An SVG file whose clip paths are numbered.

    Their names are hashes of rectangles to the last bit, which the solver of the layout does not give twice alike.
    """
    names = dict.fromkeys(re.findall(rb'<clipPath id="(p[0-9a-f]{10})"', svg))
    numbers = {name: b"clip%d" % number for number, name in enumerate(names, start=1)}
    return re.sub(rb"\bp[0-9a-f]{10}\b", lambda found: numbers.get(found[0], found[0]), svg)
