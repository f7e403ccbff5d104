"""S3's certificate on the layers of a real model: the two terms that bound the full gradient, beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.captures import measured_at, short_name
from diablo_theory.reporting.drawing import here, plain_ticks
from diablo_theory.reporting.layout import foot, grid, legend, styled
from diablo_theory.reporting.saved_tables import Kind, read_table
from diablo_theory.reporting.style import DIABLO_BLUE, GREY, LORA_VERMILLION

#: What the figure shows of a layer.
COLUMNS: dict[str, Kind] = {
    "layer": "text",
    "num_blocks": "count",
    "tokens": "count",
    "premise_holds": "flag",
    **dict.fromkeys(("grad_full", "grad_blocks", "amplification", "leak", "bound"), "number"),
}


def read_layers(file: Path, columns: Mapping[str, Kind] = COLUMNS) -> pd.DataFrame:
    """The ``layers.csv`` that ``diablo-theory diagnose --out`` wrote, a row a layer.

    Args:
        file: The file.
        columns: What it must have.

    Raises:
        ResultsError: See :func:`~.saved_tables.read_table`; or if its layers are not all of one N.
    """
    table = read_table(file, columns, "diablo-theory diagnose", [("layer",)])
    if len(counts := sorted(set(table["num_blocks"]))) > 1:
        raise ResultsError(
            f"{file} is of several N ({', '.join(map(str, counts))}); `diablo-theory diagnose` writes it"
        )
    return table


@styled
def certificates(layers: pd.DataFrame, model: str) -> Figure:
    """Of each layer: amplification times the blocks' gradient, leak, and their sum, in units of the full gradient.

    Args:
        layers: Columns :data:`COLUMNS`, from :func:`read_layers`.
        model: Its name.
    """
    shown = layers[layers["grad_full"] > 0].reset_index(drop=True)
    unit, place = shown["grad_full"], np.arange(len(shown))
    figure, ((axes,),) = grid([1.7 + 0.2 * len(shown)], 1)
    here(axes)
    bound = shown["bound"] / unit
    axes.hlines(place, np.minimum(bound, 1), np.maximum(bound, 1), color=GREY, linewidth=0.8, zorder=1)
    terms = {
        "amplification x blocks' gradient": (shown["amplification"] * shown["grad_blocks"], DIABLO_BLUE, "o"),
        "leak": (shown["leak"], LORA_VERMILLION, "^"),
    }
    for label, (values, color, marker) in terms.items():
        seen = values > 0
        axes.plot((values / unit)[seen], place[seen], marker, color=color, label=label)
    axes.plot(bound, place, "|", color="black", markersize=10, markeredgewidth=2, label="their sum, the bound")
    axes.axvline(1, color="black", linewidth=0.9, linestyle="--", label="the full gradient")
    holds = shown["premise_holds"].astype(bool)
    told = holds.any() and not holds.all()  # a star on every row would tell nothing apart
    stars = [" *" if told and not held else "" for held in holds]
    axes.set_yticks(place, [short_name(name) + star for name, star in zip(shown["layer"], stars, strict=True)])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, (1.0,))
    axes.set_xlabel("in units of the layer's full gradient")
    legend(figure, axes.get_legend_handles_labels()[0], 4, columnspacing=1.2)
    where = "" if holds.all() else " at *" if told else " at every layer"
    leak = f"The premise (every X_i has the rank of X) fails{where}, so that a leak remains." if where else ""
    foot(figure, measured_at(shown, model), "S3: the full gradient is at most the bound.", leak)
    return figure
