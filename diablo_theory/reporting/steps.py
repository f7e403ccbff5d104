"""Saved step benchmarks: read, written as a table, and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.drawing import accents, fills, here
from diablo_theory.reporting.intervals import time_ratio
from diablo_theory.reporting.layout import foot, grid, label_below, names_beside, small, styled
from diablo_theory.reporting.names import CONTENDERS
from diablo_theory.reporting.saved_tables import Kind, read_table

PHASES = ("forward", "backward", "optimizer")
#: All that is timed of a step, and the step itself.
_TIMED = (*PHASES, "step")
_TIMES: dict[str, Kind] = {
    **dict.fromkeys(("workload", "method"), "text"),
    "phase": _TIMED,
    "num_blocks": "count",
    "seconds": "positive",
    "round": "number",
}
_CONTENDERS: dict[str, Kind] = {
    **dict.fromkeys(("workload", "method", "cpu", "device", "dtype", "torch", "date"), "text"),
    "name": CONTENDERS,
    "trainable": "number",
    **dict.fromkeys(("num_blocks", "tokens"), "count"),
    **dict.fromkeys(("static_mib", "step_peak_mib"), "positive"),
    **dict.fromkeys(("inputs_mib", "trainable_mib", "threads"), "number"),
    **dict.fromkeys(("commit", "dirty"), "any"),
}
#: What is compared: everything of one workload and one N.
_PLACE = ("workload", "num_blocks")
_KERNELS: dict[str, Kind] = {
    "kernel": "text",
    **dict.fromkeys(("m1", "m2", "num_blocks", "ratio", "smallest", "largest"), "number"),
}
_GROWTH: dict[str, Kind] = {
    "varied": ("num_blocks", "tokens"),
    **dict.fromkeys(("num_blocks", "tokens", "exponent"), "number"),
}
_LOADING: dict[str, Kind] = dict.fromkeys(
    (
        *("num_blocks", "parameters", "model_mib", "adapter_mib"),
        *("load_seconds", "merge_seconds", "over_adapter", "over_model"),
    ),
    "number",
)
REFERENCES = ("floor", "lora", "einsum")
#: (contender, reference, asked): the whole step of one as a ratio to that of the other is to be at most so much.
AIMS = (
    *(("diablo", "floor", 1.04), ("diablo", "lora", 0.98), ("diablo", "einsum", 0.93)),
    *(("diablo", name, 1.0) for name in ("dora", "miss", "c3a")),
    ("diablo-additive", "einsum", 1.0),
)
#: Where the figure's axis ends; what is slower is named at its edge, so that the others can be told apart.
SLOWEST = 1.35
#: Bytes beyond the floor and the adapted layers' inputs that merged mode may take, for each byte that trains.
BYTES_PER_BYTE = 6
_COMMAND = "diablo-theory bench --out"


def read_steps(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The times and contenders that ``diablo-theory bench --out`` wrote.

    Raises:
        ResultsError: If a file is missing, damaged or of another kind, or the two are not of one benchmark.
    """
    times = read_table(folder / "times.csv", _TIMES, _COMMAND, [(*_PLACE, "round", "method", "phase")])
    keys = [(*_PLACE, "name"), (*_PLACE, "method")]
    contenders = read_table(folder / "contenders.csv", _CONTENDERS, _COMMAND, keys)
    _require_whole(folder, times, contenders)
    return times, contenders


def _require_whole(folder: Path, times: pd.DataFrame, contenders: pd.DataFrame) -> None:
    """Refuse what lacks the floor somewhere, or a time of a method in some round."""
    methods = (table[[*_PLACE, "method"]] for table in (times, contenders))
    timed, listed = (set(found.itertuples(index=False, name=None)) for found in methods)
    if odd := sorted(timed ^ listed):
        workload, count, method = odd[0]
        raise ResultsError(
            f"{folder}: only one of times.csv and contenders.csv has {method!r} at N = {count} on {workload}; "
            f"`{_COMMAND}` writes both"
        )
    for (workload, count), part in contenders.groupby(list(_PLACE)):
        if "floor" not in set(part["name"]):
            raise ResultsError(
                f"{folder / 'contenders.csv'} has no floor at N = {count} on {workload}; `{_COMMAND}` writes it"
            )
        own = times[(times["workload"] == workload) & (times["num_blocks"] == count)]
        for number, found in own.groupby("round").size().items():
            if found != len(part) * len(_TIMED):
                raise ResultsError(
                    f"{folder / 'times.csv'} has {found} times in round {number} at N = {count} on {workload}, not "
                    f"{len(_TIMED)} of each of {len(part)} methods; `{_COMMAND}` writes it"
                )


def summarise(times: pd.DataFrame, contenders: pd.DataFrame) -> pd.DataFrame:
    """One row for each workload, N and method.

    Args:
        times: As from :func:`read_steps`.
        contenders: As from :func:`read_steps`.

    Returns:
        The contenders' columns and, as medians over rounds: forward, backward, optimizer, step (seconds),
        tokens_per_second, and for each reference that was run ``over_<reference>`` (the whole step, paired ratio)
        with ``_low`` and ``_high`` (95% interval of the median).
    """
    rows = []
    for row in contenders.to_dict("records"):
        mine = times[(times["workload"] == row["workload"]) & (times["num_blocks"] == row["num_blocks"])]
        own = mine[mine["method"] == row["method"]].groupby("phase")["seconds"].median()
        row |= {str(phase): float(value) for phase, value in own.items()}
        row["tokens_per_second"] = row["tokens"] / row["step"]
        whole = mine[mine["phase"] == "step"]
        beside = contenders[
            (contenders["workload"] == row["workload"]) & (contenders["num_blocks"] == row["num_blocks"])
        ]
        labels = beside.set_index("name")["method"]
        for name in REFERENCES:
            if name in labels:
                ratio = time_ratio(whole, row["method"], labels[name])
                row |= {f"over_{name}": ratio.value, f"over_{name}_low": ratio.low, f"over_{name}_high": ratio.high}
        rows.append(row)
    return pd.DataFrame(rows)


def readable_steps(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary in words, a line for each contender."""

    def ratio(row: Mapping[Any, Any], name: str) -> str:
        value = row.get(f"over_{name}", np.nan)
        return "—" if np.isnan(value) else f"{value:.3f}"

    lines = []
    for row in summary.to_dict("records"):
        low, high = row["over_floor_low"], row["over_floor_high"]
        lines.append(
            {
                "N": row["num_blocks"],
                "Method": row["method"],
                "Trainable": f"{row['trainable']:,}",
                "Forward, backward, optimizer (ms)": ", ".join(f"{1000 * row[phase]:.0f}" for phase in PHASES),
                "Step over floor": ratio(row, "floor") + ("" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"),
                "Over LoRA": ratio(row, "lora"),
                "Over einsum": ratio(row, "einsum"),
                "Memory (MiB)": f"{row['static_mib'] + row['step_peak_mib']:,.0f}",
            }
        )
    return pd.DataFrame(lines)


def aims(times: pd.DataFrame, contenders: pd.DataFrame) -> pd.DataFrame:
    """What was asked of DiaBlo's speed and memory, beside what was measured; in words, once for each N.

    Args:
        times: As from :func:`read_steps`.
        contenders: As from :func:`read_steps`.

    Returns:
        Columns Measure, N, Measured, Asked (at most), Met: whether the whole interval of a ratio lies within
        what was asked (yes), beyond it (no), or neither (open).
    """
    lines = []
    for (workload, count), part in contenders.groupby(["workload", "num_blocks"], sort=False):
        here = (times["workload"] == workload) & (times["num_blocks"] == count)
        whole = times[here & (times["phase"] == "step")]
        by = part.set_index("name")
        labels = by["method"].astype(str).to_dict()
        for name, reference, asked in AIMS:
            if name in labels and reference in labels:
                ratio = time_ratio(whole, labels[name], labels[reference])
                measured = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
                what = f"step, {name} over {reference}"
                lines.append((what, count, measured, f"{asked:.2f}", _MET[ratio.within(high=asked)]))
        if "diablo" not in labels:
            continue
        memory = by["static_mib"] + by["step_peak_mib"]
        ours = by.loc["diablo"]
        limits = {"floor + inputs + 6 x trainable": memory["floor"] + ours["inputs_mib"]}
        limits["floor + inputs + 6 x trainable"] += BYTES_PER_BYTE * ours["trainable_mib"]
        if "lora" in memory:
            limits["lora"] = memory["lora"]
        for name, limit in limits.items():
            met = "yes" if memory["diablo"] <= limit else "no"
            lines.append(
                (f"memory, diablo beside {name}", count, f"{memory['diablo']:,.1f} MiB", f"{limit:,.1f} MiB", met)
            )
    return pd.DataFrame(lines, columns=["Measure", "N", "Measured", "Asked (at most)", "Met"])


_MET = {True: "yes", False: "no", None: "open"}


def side_measures(folder: Path) -> pd.DataFrame:
    """What the saved ``kernels.csv``, ``growth.csv`` and ``loading.csv`` say, a line each in words.

    Raises:
        ResultsError: If one is missing or damaged.
    """
    wanted = {"kernels": _KERNELS, "growth": _GROWTH, "loading": _LOADING}
    tables = {
        name: read_table(folder / f"{name}.csv", columns, f"diablo-theory bench --{name}")
        for name, columns in wanted.items()
    }
    lines: list[tuple[str, str]] = []
    for kernel, part in tables["kernels"].groupby("kernel"):
        worst = part.sort_values("ratio").iloc[-1]
        at = f"{worst['m1']} x {worst['m2']}, N = {worst['num_blocks']}"
        lines.append(
            (
                f"block {kernel} over einsum, {len(part)} shapes",
                f"median {part['ratio'].median():.2f}, best {part['ratio'].min():.2f}, worst {worst['ratio']:.2f} "
                f"({at}; its rounds: {worst['smallest']:.2f} to {worst['largest']:.2f})",
            )
        )
    for varied, name, expected in (("num_blocks", "N", -1), ("tokens", "tokens", 1)):
        part = tables["growth"][tables["growth"]["varied"] == varied]
        if part.empty:
            raise ResultsError(
                f"{folder / 'growth.csv'} has no rows with {varied} varied; `diablo-theory bench --growth`"
            )
        lines.append(
            (
                f"exponent in {name} ({part[varied].min()} to {part[varied].max()}) of merged mode's extra time",
                f"{part['exponent'].iloc[0]:.2f} (operations alone: {expected})",
            )
        )
    for row in tables["loading"].to_dict("records"):
        lines.append(
            (
                f"loading and merging N = {row['num_blocks']} ({row['adapter_mib']:,.0f} MiB) into "
                f"{row['parameters'] / 1e9:.1f}B parameters ({row['model_mib']:,.0f} MiB)",
                f"{row['load_seconds'] + row['merge_seconds']:.2f} s, {row['over_adapter']:.2f} of reading and "
                f"writing the adapter's bytes, {row['over_model']:.3f} of the model's",
            )
        )
    return pd.DataFrame(lines, columns=["Measure", "Measured"])


def step_table(summary: pd.DataFrame) -> Table:
    """The readable summary for a terminal."""
    lines = readable_steps(summary)
    table = Table(title=str(summary["workload"].iloc[0]), title_justify="left")
    for column in lines.columns:
        table.add_column(column, justify="left" if column == "Method" else "right")
    for line in lines.to_dict("records"):
        table.add_row(*map(str, line.values()))
    return table


def machine(summary: pd.DataFrame) -> str:
    """What steps were timed on, with what the figures' einsum is, for the foot of a figure."""
    first = summary.iloc[0]
    where = f"Machine: {first['cpu']}, {first['threads']} threads, torch {first['torch']}, {first['dtype']}."
    einsum = "Light blue, einsum: DiaBlo's layer as its authors compute it."
    return f"{where} {einsum}" if "einsum" in set(summary["name"]) else where


@styled
def draw_steps(summary: pd.DataFrame) -> Figure:
    """Whole steps as ratios to the floor, with 95% intervals, and peak memory beside them; a row of panels for each N.

    Args:
        summary: From :func:`summarise`, with the floor in it.

    Returns:
        The figure.
    """
    counts = sorted(summary["num_blocks"].unique())
    rows = [0.24 * int((summary["num_blocks"] == count).sum()) for count in counts]
    figure, panels = grid(rows, 2, 1.3, sharex="col")
    here(*panels.ravel())
    words: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": small()}
    for (left, right), count in zip(panels, counts, strict=True):
        part = summary[summary["num_blocks"] == count].sort_values("over_floor", ascending=False)
        places = range(len(part))
        names = part["name"].str.partition("-")[0]
        colours = accents(names)
        ends = part[["over_floor_low", "over_floor_high"]].to_numpy()
        left.hlines(places, ends[:, 0], ends[:, 1], color=colours, linewidth=2)
        left.scatter(part["over_floor"], places, color=colours, zorder=3, s=22)
        for place, value, high in zip(places, part["over_floor"], ends[:, 1], strict=True):
            slow = value > SLOWEST
            text, at = (f"{value:.2f} →", SLOWEST) if slow else (f"{value:.3f}", np.fmax(value, high))
            left.annotate(text, (at, place), (-2 if slow else 6, 0), ha="right" if slow else "left", **words)
        left.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        left.set_yticks(list(places), part["method"])
        memory = part["static_mib"] + part["step_peak_mib"]
        right.barh(places, memory, color=fills(names), height=0.6)
        for place, value in zip(places, memory, strict=True):
            right.annotate(f"{value:,.0f}", (value, place), (4, 0), **words)
        right.set_yticks(list(places), part["method"])
        names_beside(right)
        left.set_title(f"N = {count}", loc="left")
        for panel in (left, right):
            panel.set_ylim(-0.6, len(part) - 0.4)
            panel.grid(visible=False, axis="y")
    panels[-1, 0].set_xlim(0.98, max(1.01, min(SLOWEST, 1.06 * summary["over_floor"].max())))
    panels[-1, 1].set_xlim(0, 1.2 * (summary["static_mib"] + summary["step_peak_mib"]).max())
    label_below(panels, "whole step, ratio to the floor", "memory at rest + peak of a step, MiB")
    workload = summary["workload"].iloc[0]
    bars = "Lines: 95% intervals. The floor: the same step with everything frozen."
    foot(figure, f"Measured here: {workload}.", machine(summary), bars)
    return figure
