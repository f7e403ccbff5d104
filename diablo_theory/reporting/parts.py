"""Parts of the report: what a heading holds, and the parts that show measurements of this project's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from diablo_theory.reporting.captures import LAYER_NOTE, readable_layers
from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.steps import readable_steps


@dataclass(frozen=True)
class Shown:
    """A table in words and figures, under a title or none.

    Attributes:
        title: What is said above them.
        frame: The table; empty: none.
        ids: By which claims refer to it.
        figures: Stems of figures.
    """

    title: str = ""
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    ids: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part of the report: a heading, what to know, and what is shown."""

    id: str
    heading: str
    text: str = ""
    shown: list[Shown] = field(default_factory=list)


def made(evidence: Evidence, name: str) -> Any:
    """A part of the evidence, or None where it was never made."""
    try:
        return getattr(evidence, name)
    except NotMadeError:
        return None


def measured_parts(evidence: Evidence) -> Iterable[Part]:
    """Steps and a real model's layers, each where it was measured."""
    steps, layers = made(evidence, "step_summary"), made(evidence, "layers")
    if steps is not None:
        first = steps.iloc[0]
        text = (
            f"{first['workload']}, on {first['cpu']}, {first['threads']} threads. The floor is the same step with "
            "everything frozen: forward pass and input gradient alone. Times are ratios within paired rounds."
        )
        shown = Shown("", readable_steps(steps), figures=("steps",))
        yield Part("steps", "Time and memory of a step", text, [shown])
    if layers is not None:
        shown = Shown("", readable_layers(layers), figures=("captures", "certificates"))
        yield Part("layers", "A real model's layers", LAYER_NOTE, [shown])
