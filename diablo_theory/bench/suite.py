"""The step benchmark: every method at one budget on one workload, with times, memory and the floor beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from diablo_theory.bench.measuring import MIB, WARMUP_ROUNDS, keep_pages, paired, peak_bytes
from diablo_theory.bench.workloads import METHODS, Step, Workload, block_counts, input_bytes


@dataclass(frozen=True)
class Suite:
    """What to measure.

    Attributes:
        workload: The model or layer.
        num_blocks: DiaBlo's N, one comparison for each.
        methods: Names in ``METHODS``; the floor is always there.
        rounds: Counted rounds of each comparison.
        device: Where it runs.

    Raises:
        ValueError: If a method is unknown, a number of blocks does not fit, or rounds is below 1.
    """

    workload: Workload
    num_blocks: Sequence[int]
    methods: Sequence[str] = METHODS
    rounds: int = 20
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        fit = block_counts(self.workload)
        for count in self.num_blocks:
            if count not in fit:
                raise ValueError(f"num_blocks must be from 1 to {fit[-1]} for {self.workload.name}, got {count}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")

    @property
    def work(self) -> int:
        """Rounds in all, warm-up included: the units that ``run_suite`` advances by."""
        return len(self.num_blocks) * (self.rounds + WARMUP_ROUNDS)


def run_suite(suite: Suite, advance: Callable[[int], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure.

    Args:
        suite: What.
        advance: Told the number of rounds finished.

    Returns:
        Times (workload, num_blocks, round, method, phase, seconds) and what each method is (workload, num_blocks,
        name, method, trainable, tokens, static_mib: parameters and optimizer state; step_peak_mib: the most that a
        step adds; trainable_mib; inputs_mib: the adapted layers' inputs; kept_pages).
    """
    kept = keep_pages()
    times, contenders = [], []
    inputs = input_bytes(suite.workload)
    names = ["floor", *(name for name in suite.methods if name != "floor")]
    for num_blocks in suite.num_blocks:
        steps = [Step(suite.workload, name, num_blocks) for name in names]
        where = {"workload": suite.workload.name, "num_blocks": num_blocks}
        times.append(paired(steps, suite.rounds, suite.device, advance).assign(**where))  # type: ignore[arg-type]
        contenders += [
            where
            | {
                "name": step.method,
                "method": step.label,
                "trainable": sum(p.numel() for p in step.trainable),
                "tokens": suite.workload.tokens,
                "static_mib": step.static_bytes() / MIB,
                "step_peak_mib": peak_bytes(step.step, suite.device) / MIB,
                "trainable_mib": step.trainable_bytes() / MIB,
                "inputs_mib": inputs / MIB,
                "kept_pages": kept,
            }
            for step in steps
        ]
        del steps
    return pd.concat(times, ignore_index=True), pd.DataFrame(contenders)
