"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that --help is quick."""

from diablo_theory.cli import adapters, bench, figures, models, papers, runs, theory
from diablo_theory.cli.common import app, main

__all__ = ["adapters", "app", "bench", "figures", "main", "models", "papers", "runs", "theory"]
