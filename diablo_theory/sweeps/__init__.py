"""Sweeps: one function over many tasks, in parallel, each result kept as it comes and none computed twice."""

from diablo_theory.sweeps.runner import sweep

__all__ = ["sweep"]
