"""What a quantisation is: the method, the grid, and the constants of MagR and OPTQ with their published values."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diablo_theory.errors import ConfigError

Method = Literal["rtn", "optq", "magr-rtn", "magr-optq", "torchao-int4", "torchao-int8"]

#: Every variant, by name.
METHODS: tuple[Method, ...] = get_args(Method)

Positive = Annotated[int, Field(ge=1, strict=True)]

#: Bits per weight -> what a step that spans the whole range is multiplied by, one grid a channel; 1 at other widths.
_SHRINK_PER_CHANNEL = {2: 0.8, 3: 0.9}
_SHRINK_LARGE_GROUPS, _LARGE_GROUP = 0.95, 128


class QuantiseConfig(BaseModel):
    """One way to quantise; what a method does not use is ignored, so that methods can be exchanged in a config.

    Attributes:
        method: "rtn" rounds to nearest, "optq" corrects the rounding errors, "magr-" shrinks the largest weights
            first; all on the same kind of grid. "torchao-int4" and "torchao-int8" are torchao's weight-only ones.
        bits: Of one weight, 2 to 8.
        group_size: Inputs that share a grid; the last group may be smaller. None for one grid a channel, which is
            an output.
        alpha: MagR's penalty, relative to the largest eigenvalue of X'X; None for the published 1e-3 (per channel) or
            1e-4 (per group).
        iterations: MagR's steps (150 in its paper, 200 in its code).
        shrink: What the grid's step is multiplied by; None for the published table.
        sweeps: Coordinate descent after OPTQ; None for the published 30 at 2 bits per channel and none elsewhere.
        damping: Of OPTQ's Hessian, relative to its mean diagonal.
        sequential: Calibrate each decoder block on the outputs of the quantised blocks before it, as GPTQ does;
            otherwise all layers on the untouched model, and with the sums of all layers in memory at once.
        items: Sequences of calibration text, for :func:`segments`.
        length: Of each, in tokens.

    Source:
        MagR (arXiv 2406.00800), its experiments and code; GPTQ (arXiv 2210.17323).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    bits: int = Field(ge=2, le=8, strict=True)
    group_size: int | None = Field(default=None, ge=2, strict=True)
    alpha: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    iterations: Positive = 150
    shrink: float | None = Field(default=None, gt=0, le=1)
    sweeps: int | None = Field(default=None, ge=0, strict=True)
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    sequential: bool = True
    items: Positive = 128
    length: Positive = 2048

    @model_validator(mode="after")
    def _as_torchao_has_it(self) -> QuantiseConfig:
        if self.method == "torchao-int4" and (self.bits != 4 or self.group_size is None):
            raise ConfigError(f"torchao-int4 needs bits=4 and a group_size, got {self.bits} and {self.group_size}")
        if self.method == "torchao-int8" and (self.bits != 8 or self.group_size is not None):
            raise ConfigError(f"torchao-int8 needs bits=8 and no group_size, got {self.bits} and {self.group_size}")
        return self

    def check_inputs(self, name: str, inputs: int) -> None:
        """Refuse a layer whose inputs torchao's groups do not divide; the grids of this project may end in a part.

        Raises:
            ConfigError: If they do not.
        """
        if not self.is_simulated and self.group_size and inputs % self.group_size:
            raise ConfigError(
                f"torchao-int4 needs a group_size that divides the {inputs} inputs of layer {name!r}, "
                f"got {self.group_size}"
            )

    @property
    def is_simulated(self) -> bool:
        """Whether the weights stay floats."""
        return not self.method.startswith("torchao")

    @property
    def has_magr(self) -> bool:
        """Whether MagR comes first."""
        return self.method.startswith("magr")

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at inputs."""
        return self.has_magr or self.method == "optq"

    @property
    def penalty(self) -> float:
        """The alpha that MagR uses."""
        return (1e-3 if self.group_size is None else 1e-4) if self.alpha is None else self.alpha

    @property
    def step_shrink(self) -> float:
        """The shrink that the grid uses: the table is for up to 4 bits."""
        if self.shrink is not None:
            return self.shrink
        if self.group_size is None:
            return _SHRINK_PER_CHANNEL.get(self.bits, 1.0)
        return _SHRINK_LARGE_GROUPS if self.group_size >= _LARGE_GROUP and self.bits <= 4 else 1.0

    @property
    def descent_sweeps(self) -> int:
        """The sweeps that follow OPTQ; none follow rounding to nearest."""
        if not self.method.endswith("optq"):
            return 0
        published = 30 if self.bits == 2 and self.group_size is None else 0
        return published if self.sweeps is None else self.sweeps
