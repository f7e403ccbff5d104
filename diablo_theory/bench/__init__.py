"""Step time and memory of the methods, paired: every round runs one training step of each, in turn, in one process."""

from diablo_theory.bench.finetuning import compare
from diablo_theory.bench.measuring import MIB, PHASES, WARMUP_ROUNDS, keep_pages, paired, peak_bytes
from diablo_theory.bench.suite import Suite, run_suite
from diablo_theory.bench.workloads import METHODS, SHAPES

__all__ = [
    "METHODS",
    "MIB",
    "PHASES",
    "SHAPES",
    "WARMUP_ROUNDS",
    "Suite",
    "compare",
    "keep_pages",
    "paired",
    "peak_bytes",
    "run_suite",
]
