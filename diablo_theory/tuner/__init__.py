"""DiaBlo as a tuner of Hugging Face peft. Importing this package makes peft know it."""

from diablo_theory.tuner.chkpt import load_chkpt, save_chkpt
from diablo_theory.tuner.config import DiaBloConfig
from diablo_theory.tuner.conversion import from_shira, save_adapter, to_lora
from diablo_theory.tuner.layer import DiaBloLinear
from diablo_theory.tuner.model import DiaBloModel, mode_summary
from diablo_theory.tuner.registration import register, report_modes

__all__ = [
    "DiaBloConfig",
    "DiaBloLinear",
    "DiaBloModel",
    "from_shira",
    "load_chkpt",
    "mode_summary",
    "save_adapter",
    "save_chkpt",
    "to_lora",
]

register(DiaBloConfig, DiaBloModel)
report_modes(mode_summary)
