"""What a user chooses about a DiaBlo adapter, in the form that peft saves and loads."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from diablo_theory.errors import nearest
from diablo_theory.tuner.registration import DiaBloPeftType

#: Of the saved form; raised when files of an older package can no longer be read as they are.
FORMAT_VERSION = 1
DEFAULT_NUM_BLOCKS = 64
MODES = ("auto", "additive", "merged")
ADAPTER_DTYPES = ("float64", "float32", "bfloat16", "float16")


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DiaBloConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """Train only the diagonal blocks of chosen weight matrices.

    Args:
        num_blocks: N, the number of diagonal blocks of each matrix: an m1 x m2 matrix has about m1 m2 / N trainable
            entries (``BlockLayout.num_parameters``; sizes that N does not divide work). 64 where nothing else is said.
        parameter_budget: Instead of num_blocks: the one N is chosen for all targets whose trainable entries come
            nearest to this number, and written to num_blocks.
        num_blocks_pattern: Other block counts for some modules: name or regular expression (matched as in peft's
            rank_pattern) to N.
        target_modules: Names (the ends of full names), or a regular expression, or "all-linear". Left out, the
            attention and MLP projections that the paper adapts, where the architecture is known.
        exclude_modules: Names or a regular expression of modules to leave alone.
        layers_to_transform: Indices of the layers to adapt; all by default.
        layers_pattern: Name of the list of layers, with layers_to_transform.
        modules_to_save: Modules to train and save whole beside the adapter, such as a classification head.
        bias: "none", "all" or "diablo_only" (the adapted layers' biases): which biases train too.
        dropout: Probability with which an entry of the adapter's input is dropped in training, from 0 to below 1.
            Needs additive mode.
        init_weights: True: D = 0, the model starts as it was. False: small random D, for tests.
        mode: "merged" computes with W0 + D inside the weight (one product forward, one backward); "additive" adds a
            block product to the frozen layer's output; "auto" takes merged wherever it is valid and says why where
            it is not (``print_trainable_parameters``, ``print(model)``).
        adapter_dtype: "float64", "float32", "bfloat16" or "float16". Left out, peft's rule: the base's, but float32
            on a half-precision base.
        format_version: Of the saved form; written by this package.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a value is not allowed; the message names field, value and what is allowed.

    Source: arXiv 2506.03230v2, section 3; targets as in the authors' Llama scripts.
    """

    num_blocks: int | None = _option("Number N of diagonal blocks of each matrix (64 unless a budget is given)")
    parameter_budget: int | None = _option("Trainable entries to come near to, instead of num_blocks")
    num_blocks_pattern: dict[str, int] | None = _option("Module name or regex to another number of blocks")
    target_modules: list[str] | set[str] | str | None = _option("Modules to adapt: names, a regex, or 'all-linear'")
    exclude_modules: list[str] | set[str] | str | None = _option("Modules to leave alone: names or a regex")
    layers_to_transform: list[int] | int | None = _option("Indices of the layers to adapt")
    layers_pattern: list[str] | str | None = _option("Name of the list of layers, with layers_to_transform")
    modules_to_save: list[str] | None = _option("Modules to train and save whole")
    bias: Literal["none", "all", "diablo_only"] = _option("Which biases train too", "none")
    dropout: float = _option("Dropout of the adapter's input; needs additive mode", 0.0)
    init_weights: bool = _option("True: D = 0 at the start; False: small random numbers", True)
    mode: Literal["auto", "additive", "merged"] = _option("How the update is applied", "auto")
    adapter_dtype: str | None = _option("dtype of the blocks; by default the base's, float32 on half precision")
    format_version: int = _option("Of the saved form", FORMAT_VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DiaBloPeftType.DIABLO
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_version()
        self._check_sizes()
        self._check_choices()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used when target_modules is a regular expression")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("layers_pattern cannot be used when target_modules is a regular expression")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("layers_pattern needs layers_to_transform to be given too")

    def _check_version(self) -> None:
        if isinstance(self.format_version, bool) or not isinstance(self.format_version, int):
            raise TypeError(f"format_version must be an integer, got {self.format_version!r}")
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version {self.format_version} is not known: this package reads up to {FORMAT_VERSION}. "
                "The adapter was saved by a newer diablo-theory; upgrade it."
            )

    def _check_sizes(self) -> None:
        if self.num_blocks is not None and self.parameter_budget is not None:
            raise ValueError(
                f"give num_blocks or parameter_budget, not both (got {self.num_blocks} and {self.parameter_budget})"
            )
        if self.num_blocks is None and self.parameter_budget is None:
            self.num_blocks = DEFAULT_NUM_BLOCKS
        pattern = self.num_blocks_pattern if self.num_blocks_pattern is not None else {}
        if not isinstance(pattern, dict):
            raise TypeError(f"num_blocks_pattern must be a dictionary, got {pattern!r}")
        counts = {"num_blocks": self.num_blocks, "parameter_budget": self.parameter_budget}
        counts |= {f"num_blocks_pattern[{key!r}]": value for key, value in pattern.items()}
        for name, value in counts.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def _check_choices(self) -> None:
        allowed = {"mode": MODES, "bias": ("none", "all", "diablo_only"), "adapter_dtype": (None, *ADAPTER_DTYPES)}
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
                    + nearest(str(value), [choice for choice in choices if choice])
                )
        if not isinstance(self.init_weights, bool):
            raise TypeError(f"init_weights must be True or False, got {self.init_weights!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise TypeError(f"dropout must be a number, got {self.dropout!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.dropout and self.mode == "merged":
            raise ValueError(f"mode 'merged' has no dropout (got {self.dropout}): use mode 'auto' or 'additive'")

    @property
    def dtype(self) -> torch.dtype | None:
        """The blocks' dtype, where the user chose one."""
        dtype: torch.dtype | None = getattr(torch, self.adapter_dtype) if self.adapter_dtype else None
        return dtype

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> DiaBloConfig:
        """As peft's; a local weights file beside the configuration is checked too, before any model is touched.

        Raises:
            ValueError: If the weights file is truncated or is not a safetensors file.
        """
        config: DiaBloConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            try:
                with safe_open(weights, framework="pt") as file:
                    file.keys()
            except SafetensorError as error:
                raise ValueError(f"{weights} is truncated or is not a safetensors file ({error})") from None
        return config
