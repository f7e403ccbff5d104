"""DiaBlo as a module that wraps ``nn.Linear``, and what puts it into a model."""

from diablo_theory.tuner.layer import DiaBloLinear
from diablo_theory.tuner.model import add_diablo, merge_diablo

__all__ = ["DiaBloLinear", "add_diablo", "merge_diablo"]
