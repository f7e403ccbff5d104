"""DiaBlo, block-diagonal fine-tuning: the theory as executable checks, the adapter for real models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diablo_theory.tuner import DiaBloConfig, DiaBloModel

__all__ = ["DiaBloConfig", "DiaBloModel"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The tuner on first use: importing torch and peft takes seconds, which ``--help`` should not."""
    if name in __all__:
        from diablo_theory import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
