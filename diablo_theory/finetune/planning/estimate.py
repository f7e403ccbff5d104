"""The plan of a run: parameters, operations, memory and time, computed before it is started."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.planning.devices import Device, device
from diablo_theory.finetune.planning.flops import StepFlops, step_flops
from diablo_theory.finetune.planning.generation import Decoding, decoding, decoding_seconds
from diablo_theory.finetune.planning.memory import Memory, memory
from diablo_theory.finetune.planning.quantised import check_base
from diablo_theory.finetune.planning.shapes import Shapes, model_shapes
from diablo_theory.finetune.planning.trainable import Trained, trained
from diablo_theory.finetune.planning.work import Work

GIB = 2**30
#: How far the memory was from measured peaks, at most, for the methods of ``trainable.DERIVED_MEMORY``.
MEMORY_ERROR = 0.15
Fit = Literal["yes", "barely", "no"]


@dataclass(frozen=True)
class Plan:
    """What a run costs. Times are ranges, from the high to the low end of the device's assumed rates.

    Attributes:
        work: The run.
        shapes: Its model.
        trained: What it trains.
        device: One of its devices.
        steps: Optimizer steps.
        trained_tokens: Positions computed in training, padding included.
        flops: Of one optimizer step.
        decoding: The work of the evaluation.
        memory: Of one device, in bytes.
        train_seconds_low: At the high end of the assumed rate.
        train_seconds_high: At its low end.
        eval_seconds_low: Decoding on one device.
        eval_seconds_high: Likewise, at the low end.
    """

    work: Work
    shapes: Shapes
    trained: Trained
    device: Device
    steps: int
    trained_tokens: float
    flops: StepFlops
    decoding: Decoding
    memory: Memory
    train_seconds_low: float
    train_seconds_high: float
    eval_seconds_low: float
    eval_seconds_high: float

    @property
    def run_flops(self) -> float:
        """Operations of the whole training."""
        return self.flops.total_flops * self.steps

    @property
    def peak_gib(self) -> float:
        """The most that one device holds, in GiB."""
        return self.memory.peak_bytes / GIB

    @property
    def device_gib(self) -> float:
        """What one device has, in GiB."""
        return self.device.memory_bytes / GIB

    @property
    def fits(self) -> Fit:
        """Whether the peak fits one device: ``barely`` where the estimate's own error may decide."""
        if self.memory.peak_bytes * (1 + MEMORY_ERROR) <= self.device.memory_bytes:
            return "yes"
        return "barely" if self.memory.peak_bytes <= self.device.memory_bytes else "no"

    def table(self) -> pd.DataFrame:
        """Columns ``quantity, value, how``: every number as text with its unit, and how it was computed."""
        from diablo_theory.finetune.planning.describe import rows  # it knows plans, so it comes after them

        return pd.DataFrame(rows(self), columns=["quantity", "value", "how"])


def sharded_until_it_fits(found: Plan) -> Plan | None:
    """A plan that does not fit, on twice as many of its devices with FSDP, or four times, and so on.

    Args:
        found: The plan of a run on too few devices.

    Returns:
        The first plan that fits for certain, or None where there is none with an example for each device.
    """
    work = found.work
    while work.batch_size % (2 * work.devices) == 0:
        devices = 2 * work.devices
        micro = math.gcd(work.micro, work.batch_size // devices)
        work = replace(work, devices=devices, sharding="fsdp", micro_batch=micro)
        if (larger := plan(work, found.device)).fits == "yes":
            return larger
    return None


def plan(work: Work, on: str | Device) -> Plan:
    """Compute what a run costs.

    Args:
        work: The run.
        on: A device, or its name as :func:`devices.device` takes it.

    Raises:
        ConfigError: If model, method, base, targets or device are unknown or do not fit each other.
        ModelUnavailableError: If the model's configuration is not to be had.
    """
    shapes = model_shapes(work.model)
    if work.longest > shapes.max_positions:
        raise ConfigError(f"max_tokens must be at most {shapes.max_positions} for {shapes.name}, got {work.longest}")
    check_base(shapes, work)
    ours = trained(shapes, work)
    where = device(on, work.dtype) if isinstance(on, str) else on
    flops, steps = step_flops(shapes, ours, work), work.total_steps
    rate = where.flops_per_second[work.dtype] * work.devices
    decoded = decoding(shapes, work)
    fastest, slowest = decoding_seconds(decoded, where, work.dtype)
    return Plan(
        work=work,
        shapes=shapes,
        trained=ours,
        device=where,
        steps=steps,
        trained_tokens=steps * work.batch_size * work.length,
        flops=flops,
        decoding=decoded,
        memory=memory(shapes, ours, work, foreach=where.foreach),
        train_seconds_low=flops.total_flops * steps / (rate * where.training[1]),
        train_seconds_high=flops.total_flops * steps / (rate * where.training[0]),
        eval_seconds_low=fastest,
        eval_seconds_high=slowest,
    )
