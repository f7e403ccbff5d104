"""Bars of published averages, hollow and hatched: nothing of them was reproduced here; contradictions are marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diablo_theory.reporting.drawing import accents, published_bars
from diablo_theory.reporting.layout import foot, grid, label_below, names_beside, small, stacked, styled
from diablo_theory.reporting.published import AVERAGE

#: Sources of other numbers, by the end of their file's name.
_SOURCES = {
    "sketchtune": "SketchTune",
    "dora": "DoRA",
    "dora-early": "DoRA (early)",
    "smt": "SMT",
    "milora": "MiLoRA",
    "llm-adapters": "LLM-Adapters",
    "diablo": "paper's table",
    "diablo-bars": "the authors' chart",
}
_CHART = " (from a chart)"


@styled
def commonsense(rows: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Averages over the commonsense sets by model and method: from zero, and enlarged with what contradicts them.

    Args:
        rows: From :func:`~.published.read_published`.
        found: Their :func:`~.published.conflicts`.
    """
    shown = averages(rows, "commonsense")
    shown["others"] = pd.Series(contradictions(shown, found), index=shown.index)
    models = list(dict.fromkeys(shown["model"]))
    counts = [int((shown["model"] == model).sum()) for model in models]
    figure, panels = grid([0.235 * count + 0.2 for count in counts], 2, 1.6, widths=[1, 1.35], sharex="col")
    for (left, right), model in zip(panels, models, strict=True):
        same = shown[shown["model"] == model].reset_index(drop=True)
        published_bars(left, same["value"], same["method"], same["name"], "{:.1f}")
        left.set_title(model)
        _enlarged(right, same)
    left.set(xlim=(0, 105), xticks=range(0, 101, 25))
    right.set(xlim=(72.5, 110 if stacked() else 102), xticks=range(75, 96, 5))
    label_below(panels, "average, %", "the same, enlarged; ◇: another source says")
    foot(figure, "Commonsense, eight sets.", origins(shown), "Beside names: trainable share as quoted.")
    return figure


@styled
def arithmetic(rows: pd.DataFrame) -> Figure:
    """GSM8K, MATH and their average after MetaMathQA by method.

    Args:
        rows: From :func:`~.published.read_published`.
    """
    parts = [averages(rows, "arithmetic", table) for table in ("gsm8k", "math", AVERAGE)]
    figure, (panels,) = grid([0.26 * len(parts[0])], 3, 1.35)
    for axes, table in zip(panels, parts, strict=True):
        published_bars(axes, table["value"], table["method"], table["name"], "{:.1f}")
        which = str(table["table"].iloc[0])
        axes.set(title="Average" if which == AVERAGE else which.upper(), xlabel="right answers, %")
        if axes is not panels[0]:
            names_beside(axes)
    model = parts[0]["model"].iloc[0]
    sources = origins(pd.concat(parts))
    foot(figure, f"{model} after MetaMathQA.", sources, "Beside names: trainable share as quoted.")
    return figure


def averages(rows: pd.DataFrame, suite: str, table: str = AVERAGE) -> pd.DataFrame:
    """What the paper says of each model and method; methods that only its authors' charts show are read off there.

    Args:
        rows: From :func:`~.published.read_published`.
        suite: Such as "commonsense".
        table: Which column of the paper's table.

    Returns:
        The rows of the schema with ``name``: setting and quoted share. DiaBlo is last within a model.
    """
    own = rows[(rows["suite"] == suite) & (rows["table"] == table) & (rows["metric"] == "exact_match")]
    own = own[own["file"].isin([f"{suite}_diablo", f"{suite}_diablo-bars"])].sort_values("file", kind="stable")
    own = own.assign(bits=own["setting"].str.extract(r"^(\d) bits", expand=False).fillna(""))
    own = own.drop_duplicates(["model", "bits", "method"]).copy()
    own["name"] = [_name(row) for row in own.to_dict("records")]
    models = {model: place for place, model in enumerate(dict.fromkeys(own["model"]))}
    order = pd.DataFrame({"model": own["model"].map(models), "bits": own["bits"], "last": own["method"] == "diablo"})
    return own.loc[order.sort_values(["model", "bits", "last"], ascending=[True, False, True], kind="stable").index]


def contradictions(shown: pd.DataFrame, found: pd.DataFrame) -> list[list[tuple[float, str]]]:
    """For each of the averages what other sources say instead: pairs of a value and who says so.

    Args:
        shown: From :func:`averages`.
        found: From :func:`~.published.conflicts`.
    """
    pairs = found.to_dict("records")
    return [_others(row, pairs) for row in shown.to_dict("records")]


def _name(row: Mapping[Any, Any]) -> str:
    setting = str(row["setting"]).partition(" bits, ")[2] or str(row["setting"])
    if row["certainty"] == "measured":
        return setting + _CHART
    if pd.notna(row["trainable_pct"]):
        return f"{setting}, {row['trainable_pct']:g}%"
    return setting if pd.isna(row["trainable_params"]) else f"{setting}, {row['trainable_params'] / 1e6:g} M"


def _others(row: Mapping[Any, Any], found: list[dict[Any, Any]]) -> list[tuple[float, str]]:
    """Values that contradict a row, each with all who say so."""
    said: dict[float, list[str]] = {}
    for pair in found:
        if any(pair[key] != row[key] for key in ("suite", "model", "method")):
            continue
        for mine, other in ((1, 2), (2, 1)):
            if (pair[f"file_{mine}"], pair[f"setting_{mine}"]) == (row["file"], row["setting"]):
                source = str(pair[f"file_{other}"]).partition("_")[2]
                said.setdefault(pair[f"average_{other}"], []).append(_SOURCES.get(source, source))
    return [(value, " and ".join(sources)) for value, sources in said.items()]


def _enlarged(axes: Axes, table: pd.DataFrame) -> None:
    colors = accents(table["method"])
    for place, (row, color) in enumerate(zip(table.to_dict("records"), colors, strict=True)):
        # Values that contradict each other may be close: what others say stands lower.
        up = 0.17 if row["others"] else 0
        axes.plot(row["value"], place - up, "o", markerfacecolor="white", markeredgecolor=color, markeredgewidth=1.6)
        for value, source in row["others"]:
            axes.plot(
                [row["value"], value], [place - up, place + up], color="black", linewidth=0.8, linestyle=":", zorder=1
            )
            axes.plot(value, place + up, "D", markerfacecolor="white", markeredgecolor="black", markersize=5)
            right = max(row["value"], value)
            words: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": small()}
            told = source.replace(" and ", "\nand ") if stacked() else source
            said = axes.annotate(f"◇ {value:.1f}, {told}", (right, place), (7, 0), **words)
            said.set_in_layout(False)  # the axes end far enough right of it
    axes.set_yticks(range(len(table)), table["name"])
    names_beside(axes)
    axes.set_ylim(len(table) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def origins(rows: pd.DataFrame) -> str:
    """Whose numbers these are and how they came here, in a sentence or two."""
    said = rows[["certainty", "origin"]].drop_duplicates().itertuples(index=False)
    how = {"quoted": "quoted from", "printed": "printed in", "measured": "read off"}
    sources = "; ".join(f"{how.get(certainty, certainty)} {origin}" for certainty, origin in said)
    return f"Hollow, hatched: published, full scale, not reproduced here ({sources})."
