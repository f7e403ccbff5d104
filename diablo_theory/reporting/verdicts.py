"""The figure of the checks: how clearly each claim held and each control failed."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diablo_theory.reporting.layout import grid, legend, styled
from diablo_theory.reporting.style import DIABLO_BLUE, LORA_VERMILLION


@styled
def verdict_margins(verdicts: pd.DataFrame) -> Figure:
    """Claim margins of every verdict by check: claims belong to the right of zero, controls to the left.

    Args:
        verdicts: Columns ``check, role, claim_margin, passed``.
    """
    checks = list(dict.fromkeys(verdicts["check"]))
    figure, ((axes,),) = grid([0.9 + 0.32 * len(checks)], 1)
    axes.axvline(0, color="black", linewidth=1)
    styles = {"claim": (DIABLO_BLUE, "o", -0.16), "control": (LORA_VERMILLION, "^", 0.16)}
    for role, (color, marker, shift) in styles.items():
        part = verdicts[verdicts["role"] == role]
        place = part["check"].map(checks.index).to_numpy(float) + shift
        kept = part["passed"].to_numpy(bool)
        margins = part["claim_margin"].to_numpy(float)
        axes.plot(margins[kept], place[kept], marker, color=color, alpha=0.55, markeredgewidth=0, label=f"{role}s")
        axes.plot(margins[~kept], place[~kept], marker, mfc="none", mec="red", markersize=9, zorder=4)
    if not verdicts["passed"].all():
        axes.plot([], [], "o", mfc="none", mec="red", markersize=9, label="failed verdict")
    axes.set_yticks(np.arange(len(checks)), checks)
    axes.set_ylim(len(checks) - 0.5, -0.5)
    axes.set_xlabel(
        "decades between what was measured and the tolerance: the claim held to the right, failed to the left"
    )
    legend(figure, axes.get_legend_handles_labels()[0], 3)
    return figure
