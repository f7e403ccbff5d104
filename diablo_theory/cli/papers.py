"""The commands on what papers print: count."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from diablo_theory.cli.common import app, require_folder, say, wrote


@app.command()
def count(
    published: Annotated[
        Path, typer.Option("--published", help="Holds published numbers, a CSV file a table.")
    ] = Path("paper_results/published"),
    out: Annotated[Path | None, typer.Option("--out", help="Gets counts.csv.")] = None,
) -> None:
    """Count again what papers quote of trainable parameters, on the models' true shapes.

    Says of each quoted percentage which way of counting gives it.

    Example: `diablo-theory count --out paper_results`
    """
    from diablo_theory.counting import count_published
    from diablo_theory.files import write_with
    from diablo_theory.reporting.parameters import readable_counts
    from diablo_theory.reporting.tables import markdown

    require_folder(out)
    counts = count_published(published)
    say(markdown(readable_counts(counts)))  # not as a table of the terminal's width, which cuts what does not fit
    if out is not None:
        write_with(out / "counts.csv", partial(counts.to_csv, index=False))
        wrote([out / "counts.csv"])
