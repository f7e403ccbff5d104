"""What each method could capture in the layers of a real model: a figure and a table for the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.drawing import here
from diablo_theory.reporting.layout import foot, grid, legend, styled
from diablo_theory.reporting.names import CAPTURED, STARTS
from diablo_theory.reporting.saved_tables import Kind, read_table
from diablo_theory.reporting.style import DIABLO_BLUE, GREY, looks
from diablo_theory.reporting.terminal import terminal_table

_LORA, _FROZEN = looks([("LoRA", "lora"), ("LoRA, frozen A", "lora")]).values()
# (method, start): legend, colour, marker, filled, height within the row: of marks that lie close, none hides another
_SHOWN = {
    ("lora", "any"): ("LoRA, best of its rank", _LORA.color, _LORA.marker, True, 0.0),
    ("lora", "usual"): ("LoRA, open at its usual start", _LORA.color, _LORA.marker, False, 0.0),
    ("lora", "lora-ga"): ("LoRA, open at LoRA-GA's start", GREY, "x", True, 0.0),
    ("lora-frozen-a", "usual"): ("LoRA, frozen A", _FROZEN.color, _FROZEN.marker, True, 0.22),
    ("diablo", "zero"): ("DiaBlo", DIABLO_BLUE, "o", True, -0.22),
}

#: What the columns of a table of layers are.
LAYER_NOTE = (
    "Each method at DiaBlo's number of parameters. Rank 99%: directions that hold 99% of the inputs' energy; premise: "
    "every X_i has the rank of X; percentages: captured of what full fine-tuning of the layer captures; leak share: "
    "S3's leak over the full gradient."
)


_CAPTURES: dict[str, Kind] = {"layer": "text", "method": CAPTURED, "start": STARTS, "capture": "number"}


def read_captures(file: Path, layers: pd.DataFrame) -> pd.DataFrame:
    """The ``captures.csv`` that ``diablo-theory diagnose --out`` wrote, a row a layer, method and start.

    Args:
        file: The file.
        layers: What ``layers.csv`` beside it says.

    Raises:
        ResultsError: See :func:`~.saved_tables.read_table`; or if the two are not of the same layers.
    """
    command = "diablo-theory diagnose"
    found = read_table(file, _CAPTURES, command, [("layer", "method", "start")])
    if apart := sorted(set(found["layer"]) ^ set(layers["layer"])):
        raise ResultsError(f"{file} and layers.csv beside it are not both of {apart[0]}; `{command}` writes them")
    return found


@styled
def capture_figure(captures: pd.DataFrame, about: str) -> Figure:
    """Captured shares by layer at equal parameters.

    Args:
        captures: Columns ``layer, num_blocks, method, start, capture``; one number of blocks.
        about: From :func:`measured_at`.
    """
    layers = list(dict.fromkeys(captures["layer"]))
    figure, ((axes,),) = grid([1.6 + 0.23 * len(layers)], 1)
    here(axes)
    for (method, start), (label, color, marker, filled, height) in _SHOWN.items():
        part = captures[(captures["method"] == method) & (captures["start"] == start)]
        place = part["layer"].map(layers.index).to_numpy(float) + height
        face = color if filled else "none"
        axes.plot(part["capture"], place, marker, color=color, markerfacecolor=face, label=label)
    axes.set_yticks(np.arange(len(layers)), [short_name(name) for name in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("captured of the output change that the loss asks for, relative to full fine-tuning of the layer")
    legend(figure, axes.lines, 3)
    foot(
        figure, about, "All methods at DiaBlo's number of parameters. Marks of a row differ in height for room alone."
    )
    return figure


def measured_at(layers: pd.DataFrame, model: str) -> str:
    """What model, how many layers and tokens were measured here, in a sentence.

    Args:
        layers: Columns ``num_blocks, tokens``, a row a layer.
        model: Its name.
    """
    tokens, count = int(layers["tokens"].max()), int(layers["num_blocks"].iloc[0])
    return f"Measured here: {model}, {len(layers)} layers, {tokens:,} tokens, N = {count}."


def short_name(layer: str) -> str:
    """Without what the layers of every Llama-type model have in common."""
    return layer.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "")


def readable_layers(layers: pd.DataFrame) -> pd.DataFrame:
    """One line a layer, in words.

    Args:
        layers: What ``diagnose.diagnose_layers`` returned, its second table.
    """
    shares = {"DiaBlo": "diablo", "LoRA best": "lora_set", "LoRA start": "lora_tangent", "Frozen A": "lora_frozen"}
    return pd.DataFrame(
        {
            "Layer": layers["layer"].map(short_name),
            "Block rows": layers["block_rows"].map(str),
            "Rank 99%": layers["energy_rank"].map(str),
            "Premise": layers["premise_holds"].map({True: "holds", False: "fails"}),
            **{name: layers[f"capture_{key}"].map("{:.0%}".format) for name, key in shares.items()},
            "Leak share": layers["leak_share"].map("{:.2f}".format),
        }
    )


def layer_table(layers: pd.DataFrame) -> Table:
    """The readable layers for a terminal."""
    table = terminal_table(readable_layers(layers), "Layers")
    table.columns[0].no_wrap = True
    table.caption = LAYER_NOTE
    return table
