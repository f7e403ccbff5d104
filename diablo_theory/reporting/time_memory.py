"""Time and memory: what was published of whole trainings, and what this project measured of single steps."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from diablo_theory.reporting.drawing import foot, own_bars, published_bars
from diablo_theory.reporting.published_bars import origins
from diablo_theory.reporting.style import WIDTH, styled

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
    figure = Figure(figsize=(WIDTH, 1.9 + 0.25 * (len(ratios) + len(own))))
    panels = figure.subplots(2, 2, gridspec_kw={"height_ratios": [len(ratios), len(own)]})
    for axes, table, spec in ((panels[0, 0], minutes, "{:.0f}"), (panels[0, 1], ratios, "{:.2f}")):
        published_bars(axes, table["value"], table["method"], table["setting"].str.partition(",")[0], spec)
    panels[0, 0].set(title="Published: the paper", xlabel="minutes an epoch, hardware unstated")
    panels[0, 0].set_ylim(len(ratios) - 0.45, -0.55)  # rows as high as those beside them
    panels[0, 1].set(title="Published: MiLoRA's paper", xlabel="training time, ratio to LoRA's")
    panels[0, 1].axvline(1, color="black", linewidth=0.8, linestyle=":")
    own_bars(panels[1, 0], own, "over_lora", own["name"].str.partition("-")[0], own["method"], "{:.3f}")
    panels[1, 0].axvline(1, color="black", linewidth=0.8, linestyle=":")
    panels[1, 0].set(title="Measured here: a training step", xlabel="time, ratio to LoRA's, 95% interval")
    memory = own.assign(peak=own["static_mib"] + own["step_peak_mib"])
    own_bars(panels[1, 1], memory, "peak", own["name"].str.partition("-")[0], own["method"], "{:,.0f}")
    panels[1, 1].set(title="Measured here: memory", xlabel="at rest and peak of a step, MiB")
    panels[1, 1].set_yticklabels([])
    saved = cost[cost["metric"] == "memory_saved_pct"].to_dict("records")
    said = "".join(f"Published of memory alone: {row['setting']}, {row['value']:g}% saved." for row in saved)
    where = f"{own['workload'].iloc[0]}, all methods at the parameters of DiaBlo with N = {count}"
    published = origins(pd.concat([minutes, ratios]))
    here = f"Filled, on a tinted ground: measured here ({where})."
    foot(figure, published, said, here, "A step here and an epoch there are different things.")
    return figure
