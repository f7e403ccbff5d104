"""Figures to draw: each a function, whether what it reads is there, and what makes that otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from diablo_theory.errors import ResultsError
from diablo_theory.reporting.style import UNDATED, save


class NothingToDrawError(ResultsError):
    """The data are there and sound, but nothing in them is of the kind that a figure shows."""


@dataclass(frozen=True)
class Plan:
    """One figure.

    Attributes:
        draw: From saved data, which it reads when it is called.
        why_not: Said where the data are not there: which command produces them.
        available: Whether they are.
    """

    draw: Callable[[], Figure]
    why_not: str
    available: bool = True


def save_plans(
    plans: Mapping[str, Plan], folder: Path, kinds: Sequence[str] = tuple(UNDATED)
) -> tuple[list[Path], dict[str, str]]:
    """Draw and write every figure whose data are there.

    Args:
        plans: By stem, the files' name without its suffix.
        folder: Where the files go.
        kinds: Suffixes, of :data:`~.style.UNDATED`.

    Returns:
        The files written, and the reason for each figure that was skipped. A skipped figure's old files are removed:
        they would show data that are no longer there.
    """
    written, skipped = [], {}
    for stem, plan in plans.items():
        if plan.available:
            try:
                written += save(plan.draw(), folder, stem, kinds)
                continue
            except NothingToDrawError as error:
                skipped[stem] = str(error)
        else:
            skipped[stem] = plan.why_not
        for suffix in kinds:
            (folder / f"{stem}{suffix}").unlink(missing_ok=True)
    return written, skipped
