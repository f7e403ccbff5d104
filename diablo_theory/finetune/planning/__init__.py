"""What a fine-tuning run costs, computed before it is started: parameters, operations, memory, time."""

from diablo_theory.finetune.planning.datasets import DATASETS, Dataset
from diablo_theory.finetune.planning.describe import duration, header
from diablo_theory.finetune.planning.devices import DEVICES, Device, device
from diablo_theory.finetune.planning.estimate import Plan, plan
from diablo_theory.finetune.planning.flops import StepFlops, step_flops
from diablo_theory.finetune.planning.memory import Memory, memory
from diablo_theory.finetune.planning.of_run import work_of
from diablo_theory.finetune.planning.shapes import KNOWN, Shapes, model_shapes
from diablo_theory.finetune.planning.trainable import Trained, trained
from diablo_theory.finetune.planning.work import PAPER_TARGETS, Work

__all__ = [
    "DATASETS",
    "DEVICES",
    "KNOWN",
    "PAPER_TARGETS",
    "Dataset",
    "Device",
    "Memory",
    "Plan",
    "Shapes",
    "StepFlops",
    "Trained",
    "Work",
    "device",
    "duration",
    "header",
    "memory",
    "model_shapes",
    "plan",
    "step_flops",
    "trained",
    "work_of",
]
