"""What a run is: one defaults file, one small file of differences, overrides on the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diablo_theory.errors import ConfigError, nearest
from diablo_theory.methods import Method

Positive = Annotated[int, Field(ge=1, strict=True)]


class RunConfig(BaseModel):
    """One training run with its evaluation. There are no defaults here: ``experiments/defaults.yaml`` has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["word_problems", "docstrings"]
    model: str
    method: Method
    num_blocks: Positive
    target_modules: tuple[str, ...] = Field(min_length=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    steps: Positive
    batch_size: Positive
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(gt=0, allow_inf_nan=False)
    eval_split: Literal["test", "validation"]
    eval_items: Positive
    eval_batch_size: Positive
    save_every: Positive
    keep_weights: bool
    seed: int = Field(ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"]
    scale: Literal["small", "full"]


def experiments_folder() -> Path:
    """The folder of run files: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "experiments", package / "experiments"):
        if (folder / "defaults.yaml").is_file():
            return folder
    raise ConfigError(f"experiments/defaults.yaml is missing beside {package}: reinstall or repair the checkout")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: If it is missing (naming the nearest file there is), unreadable, or no mapping.
    """
    if not path.is_file():
        known = (str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else ()
        raise ConfigError(f"no such file: {path}.{nearest(str(path), known)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


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
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: {value!r} is not a YAML value") from None
    return overrides


def resolve(*layers: Mapping[str, Any]) -> RunConfig:
    """Defaults, then each layer over the one before.

    Args:
        layers: Mappings of known keys, the last one wins.

    Raises:
        ConfigError: For an unknown key (naming the nearest) or a value that is not allowed (naming what is).
    """
    merged = read_yaml(experiments_folder() / "defaults.yaml")
    for layer in layers:
        for key, value in layer.items():
            if key not in RunConfig.model_fields:
                raise ConfigError(f"unknown key {key!r}.{nearest(key, RunConfig.model_fields)}")
            merged[key] = value
    # YAML 1.1 reads 1e-3 (no dot) as text; pydantic turns it into the number that was meant.
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{where}={problem['input']!r} is not allowed: {problem['msg']}") from None


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a file of differences describes, with command-line overrides on top.

    A path such as ``experiments/word_problems/lora.yaml`` also finds the file that an installed package carries.
    """
    if not path.is_file() and (packaged := experiments_folder().parent / path).is_file():
        path = packaged
    return resolve(read_yaml(path), parse_overrides(overrides))
