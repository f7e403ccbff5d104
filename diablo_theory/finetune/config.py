"""What a run is: one defaults file, one small file of differences, overrides on the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from diablo_theory.errors import ConfigError, nearest, refusal
from diablo_theory.files import experiments_folder
from diablo_theory.finetune.tasks import TASKS, Protocol
from diablo_theory.methods import Method, changes_base
from diablo_theory.quantise import QuantiseConfig
from diablo_theory.reading import find, parsed, read_yaml

Positive = Annotated[int, Field(ge=1, strict=True)]
DType = Literal["float32", "bfloat16", "float16"]
Scale = Literal["small", "full"]

#: Keys that say where a run is done, not what it is: a folder may be continued with others.
ELSEWHERE = ("data_root", "device", "eval_batch_size")
#: Keys that a run file decides for good: where its rows belong, and what they stand for.
DECIDED = ("suite", "scale")
#: Keys that say how much is done (null: all of it): with less than its file says a full run is a small one.
AMOUNT = ("steps", "epochs", "train_items", "max_length", "eval_items")


class RunConfig(BaseModel):
    """One training run with its evaluation. There are no defaults here: ``experiments/defaults.yaml`` has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: str
    model: str
    train_on: str
    evaluate_on: tuple[str, ...] = Field(min_length=1)
    protocol: Protocol
    data_root: Path | None

    method: Method
    num_blocks: Positive
    rank: Positive | None
    alpha: float | None = Field(gt=0, allow_inf_nan=False)
    dropout: float = Field(ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(min_length=1)
    quantise: QuantiseConfig | None

    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    steps: Positive | None
    epochs: float | None = Field(gt=0, le=1e6, allow_inf_nan=False)
    train_items: Positive | None
    batch_size: Positive
    micro_batch_size: Positive | None
    batching: Literal["in_order", "by_length"]
    drop_last: bool
    max_length: Positive
    loss_on: Literal["answer", "everything"]
    schedule: Literal["linear", "cosine", "constant"]
    warmup_steps: float = Field(ge=0, allow_inf_nan=False)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(gt=0, allow_inf_nan=False)
    dtype: DType
    adapter_dtype: Literal["float32", "bfloat16"]
    gradient_checkpointing: bool

    eval_split: Literal["test", "validation"]
    eval_items: Positive | None
    eval_batch_size: Positive
    save_every: Positive
    keep_weights: bool
    seed: int = Field(ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"]
    scale: Scale

    @field_validator("*", mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads ``on`` and ``yes`` as true, which otherwise would count as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("Input should not be true or false")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if (self.steps is None) is (self.epochs is None):
            raise ValueError(f"give steps or epochs, the other one null; got {self.steps} and {self.epochs}")
        if self.train_on not in TASKS:
            raise ValueError(f"train_on: no task is called {self.train_on!r}.{nearest(self.train_on, TASKS)}")
        if self.epochs is not None and not TASKS[self.train_on].bounded:
            raise ValueError(f"{self.train_on} has no end, so no epochs: set steps, and epochs to null")
        for name in self.evaluate_on:
            if name not in TASKS or not TASKS[name].metrics:
                known = (task.name for task in TASKS.values() if task.metrics)
                raise ValueError(f"evaluate_on: {name!r} is no task with a score.{nearest(name, known)}")
        for name in (self.train_on, *self.evaluate_on):
            if self.protocol not in TASKS[name].protocols:
                has = ", ".join(TASKS[name].protocols)
                raise ValueError(f"protocol: {name} has {has}; got {self.protocol!r}")
        if self.protocol == "clean" and self.drop_last:
            raise ValueError("protocol: clean trains on every example: set drop_last=false, or another protocol")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.method != "none" and self.steps is not None:
            require_warmup(self.warmup_steps, self.steps)
        if self.adapter_dtype != "float32" and self.adapter_dtype != self.dtype:
            raise ValueError(f"adapter_dtype must be float32 or the model's {self.dtype}, got {self.adapter_dtype}")
        if self.quantise is not None and changes_base(self.method):
            raise ValueError(
                f"method {self.method} changes the base's weights, which then are not of {self.quantise.bits} bits: "
                "choose another method, or quantise=null"
            )
        return self

    @property
    def train_limit(self) -> int | None:
        """Training examples that are read at most; None for all."""
        most = None if self.steps is None else self.steps * self.batch_size
        return min(filter(None, (self.train_items, most)), default=None)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run another run, ready for JSON."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in ELSEWHERE}


def require_warmup(warmup: float, steps: int) -> None:
    """Raise ConfigError if a warm-up is as long as the training; below 1 it is a share of it."""
    if 1 <= warmup >= steps:
        raise ConfigError(
            f"warmup_steps {warmup:g} must be below the {steps} steps of the run, or below 1 for a share of them"
        )


def moved(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A run that was done in one place, as it goes on in another.

    Args:
        config: The run.
        changes: Keys of :data:`ELSEWHERE` alone.

    Raises:
        ConfigError: For another key, which would make it another run, or a value that is not allowed.
    """
    if others := [key for key in changes if key not in ELSEWHERE]:
        raise ConfigError(
            f"{others[0]} cannot be changed of a run that has been trained; only {', '.join(ELSEWHERE)} can, "
            f"which say where it is done.{nearest(others[0], ELSEWHERE)}"
        )
    return validated({**config.model_dump(), **changes})


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """``["steps=5", "learning_rate=1e-3"]`` as a mapping, values read as YAML.

    Raises:
        ConfigError: If a pair has no ``=`` or its value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"an override must read key=value, got {pair!r}")
        try:
            overrides[key] = parsed(value)
        except ValueError as error:
            raise ConfigError(f"{key}: {value!r} is not a YAML value: {error}") from None
    return overrides


def resolve(*layers: Mapping[str, Any]) -> RunConfig:
    """Defaults, then each layer over the one before.

    Args:
        layers: Mappings of known keys, the last one wins. ``quantise.bits`` means that part of the key.

    Raises:
        ConfigError: For an unknown key (naming the nearest) or a value that is not allowed (naming what is).
    """
    merged = read_yaml(experiments_folder() / "defaults.yaml")
    for layer in layers:
        for key, value in layer.items():
            name, dot, part = key.partition(".")
            if name not in RunConfig.model_fields:
                raise ConfigError(f"unknown key {name!r}.{nearest(name, RunConfig.model_fields)}")
            if dot and not isinstance(merged[name], dict):
                raise ConfigError(f"{key}: there is no {name} here that has parts; set {name} itself")
            merged[name] = {**merged[name], part: value} if dot else value
    # YAML 1.1 reads 1e-3 (no dot) as text; pydantic turns it into the number that was meant.
    return validated(merged)


def validated(values: Mapping[str, Any]) -> RunConfig:
    """A configuration from the values of all its keys.

    Raises:
        ConfigError: For a value that is not allowed, naming what is.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(refusal(error, RunConfig)) from None


def load_run(path: Path, overrides: Iterable[str] = (), scale: Scale = "full") -> RunConfig:
    """The run that a file of differences describes, with command-line overrides on top.

    Args:
        path: Such as ``experiments/word_problems/lora.yaml``, or without the first folder; also found in what an
            installed package carries.
        overrides: ``key=value`` pairs.
        scale: ``full`` is what the file says; ``small`` puts ``experiments/small.yaml`` between file and overrides:
            the same recipe on a small model.

    Raises:
        ConfigError: As :func:`resolve` and :func:`overridden` say.
    """
    differences = read_run_file(path)
    return overridden(layers(differences, scale), parse_overrides(overrides))


def overridden(files: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]) -> RunConfig:
    """What files say, with a user's changes: a full run that does less than its file is a small one.

    Less is another model, less of any of :data:`AMOUNT`, or smaller batches for as many steps. A model is another one
    if the last part of its name is: a copy in a folder, or on a hub under another owner, has to be called as the file
    calls it (upper or lower case). Whether such a copy is one is not checked; a run records its source and SHA-256.

    Args:
        files: Layers, as for :func:`resolve`.
        changes: Keys over all of them.

    Raises:
        ConfigError: For a key that only a file may decide.
    """
    if decided := [key for key in changes if key in DECIDED]:
        raise ConfigError(
            f"{decided[0]} cannot be set here: the run file decides it (--scale small makes any run a small one)"
        )
    before, after = resolve(*files), resolve(*files, changes)
    return after.model_copy(update={"scale": "small"}) if _does_less(after, before) else after


def _does_less(after: RunConfig, before: RunConfig) -> bool:
    """As :func:`overridden` says."""
    names = {Path(config.model).name.casefold() for config in (after, before)}
    smaller_batches = before.steps is not None and after.batch_size < before.batch_size
    less = any((getattr(after, key) or math.inf) < (getattr(before, key) or math.inf) for key in AMOUNT)
    return len(names) > 1 or smaller_batches or less


def read_run_file(path: Path) -> dict[str, Any]:
    """What a run file says; its suite is the folder that it lies in.

    Raises:
        ConfigError: If it is missing (naming the nearest file there is), no YAML, a sweep file, or names its suite.
    """
    path = find(path, experiments_folder(), experiments_folder().parent)
    content = read_yaml(path)
    if "parts" in content:
        raise ConfigError(f"{path} is a sweep file (it has `parts`), not a run file: `diablo-theory sweep` runs it")
    if unknown := [key for key in content if key.partition(".")[0] not in RunConfig.model_fields]:
        known = [*RunConfig.model_fields, "parts"]
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}.{nearest(unknown[0], known)}")
    if "suite" in content:
        raise ConfigError(f"{path}: suite is the name of the folder, leave it out")
    return content | {"suite": path.resolve().parent.name}


def layers(differences: Mapping[str, Any], scale: Scale) -> list[Mapping[str, Any]]:
    """What a run file says, and over it, for a small run, ``experiments/small.yaml``: what it becomes on a laptop.

    Args:
        differences: From :func:`read_run_file`.
        scale: As for :func:`load_run`.
    """
    if scale == "full":
        return [differences]
    small = read_yaml(experiments_folder() / "small.yaml")
    # Of a key that the file does not set, there is no part to make smaller.
    parts = {key: value for key, value in small.items() if "." not in key or differences.get(key.partition(".")[0])}
    return [differences, parts]
