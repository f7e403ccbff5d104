"""Time and memory: what was published of whole trainings, and what this project measured of single steps."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from diablo_theory.reporting.drawing import own_bars, published_bars
from diablo_theory.reporting.layout import foot, names_beside, spanning, styled
from diablo_theory.reporting.published_bars import origins
from diablo_theory.reporting.steps import machine

_LEFT_OUT = ("floor", "inputs")  # no methods: what a step costs that trains nothing


@styled
def time_memory(rows: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Published minutes and ratios above, measured steps below: different things, not to be read across.

    Args:
        rows: From :func:`~.published.read_published`.
        summary: From :func:`~.steps.summarise`, with LoRA in it.
    """
    cost = rows[rows["suite"] == "efficiency"]
    minutes, ratios = (cost[cost["metric"] == name] for name in ("minutes_per_epoch", "time_ratio_to_lora"))
    count = int(summary["num_blocks"].max())
    own = summary[(summary["num_blocks"] == count) & ~summary["name"].isin(_LEFT_OUT)]
    own = own.sort_values("over_lora").reset_index(drop=True)
    heights = [0.25 * len(table) for table in (minutes, ratios, own)]
    figure, ((epoch,), (ratio,), (step, memory)) = spanning(heights, (1, 1, 2), 2.8)
    for axes, table, spec in ((epoch, minutes, "{:.0f}"), (ratio, ratios, "{:.2f}")):
        published_bars(axes, table["value"], table["method"], table["setting"].str.partition(",")[0], spec)
    epoch.set(title="Published: the paper", xlabel="minutes an epoch, hardware unstated")
    ratio.set(title="Published: MiLoRA's paper", xlabel="training time, ratio to LoRA's")
    ratio.axvline(1, color="black", linewidth=0.8, linestyle=":")
    names = own["name"].str.partition("-")[0]
    own_bars(step, own, "over_lora", names, own["method"], "{:.3f}")
    step.axvline(1, color="black", linewidth=0.8, linestyle=":")
    step.set(title="Measured here: a training step", xlabel="time, ratio to LoRA's, 95% interval")
    peaks = own.assign(peak=own["static_mib"] + own["step_peak_mib"])
    own_bars(memory, peaks, "peak", names, own["method"], "{:,.0f}")
    memory.set(title="Measured here: memory", xlabel="at rest and peak of a step, MiB")
    names_beside(memory)
    saved = cost[cost["metric"] == "memory_saved_pct"].to_dict("records")
    said = "".join(f"Published of memory alone: {row['setting']}, {row['value']:g}% saved." for row in saved)
    where = f"{own['workload'].iloc[0]}, all methods at the parameters of DiaBlo with N = {count}"
    published = origins(pd.concat([minutes, ratios]))
    here = f"Filled, on a tinted ground: measured here ({where})."
    foot(figure, published, said, here, machine(own), "A step here and an epoch there are different things.")
    return figure
