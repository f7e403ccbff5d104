"""The command on figures: figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diablo_theory.cli.common import app, require_folder, say, working, wrote


@app.command()
def figures(
    results: Annotated[
        Path, typer.Option("--results", help="Saved results, laid out as this repository's paper_results.")
    ] = Path("paper_results"),
    out: Annotated[
        Path, typer.Option("--out", help="Gets a PDF, an SVG and a PNG file a figure, and a PDF in its folder column.")
    ] = Path("figures"),
) -> None:
    """Draw every figure again from saved results; nothing is trained or solved.

    Each is drawn across a page (7 inches), and as PDF for one column of two (3.35 inches) into the folder's `column`,
    so that letters have their nominal size in both: 8 points or more, and 7 in a column. A figure whose data are
    missing is skipped, with the command that produces them.

    Example: `diablo-theory figures --out results/figures`
    """
    from diablo_theory.reporting.figures import draw_figures

    require_folder(out)
    with working("drawing figures"):
        written, skipped = draw_figures(results, out)
    wrote(written)
    for stem, why in skipped.items():
        say(f"skipped {stem}: {why}")
