"""What a fine-tuning run does, in numbers: the question that a plan answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diablo_theory import methods
from diablo_theory.errors import ConfigError, nearest
from diablo_theory.finetune.data import number_of_steps
from diablo_theory.quantise import QuantiseConfig

#: As in the authors' Llama scripts.
PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

#: Of lengths that are computed, in tokens.
ROUNDING = 1e-6

Logits = Literal["answers", "all"]
Sharding = Literal["ddp", "fsdp"]

_AT_LEAST_ONE = ("num_blocks", "examples", "batch_size", "devices", "rank", "steps", "micro_batch", "max_tokens")
_NOT_NEGATIVE = ("prompt_tokens", "answer_tokens", "eval_prompt_tokens")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Problems of a task that a run decodes.

    Attributes:
        items: How many.
        new_tokens: Tokens decoded for each.
        beams: Beams of a beam search.
        samples: Samples of each problem.
        batch_size: Sequences (problems times samples) decoded at once, before beams.

    Raises:
        ConfigError: If a value is not allowed; the message names it and what is.
    """

    items: int
    new_tokens: int
    beams: int = 1
    samples: int = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        _require_at_least_one(self, "items", "beams", "samples", "batch_size")
        _require_not_negative(self, "new_tokens")

    @property
    def at_once(self) -> int:
        """Sequences in one forward pass of decoding, beams counted apart."""
        return min(self.batch_size, self.items * self.samples) * self.beams


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run: model, method, data, batches, precision, devices and evaluation.

    Attributes:
        model: As :func:`model_shapes` takes it.
        method: ``none``, ``full``, or a name in ``methods.FAMILIES``.
        num_blocks: DiaBlo's N; it sets the other methods' budget unless ``rank`` is given.
        rank: The knob of a method other than DiaBlo; left out, the nearest to DiaBlo's budget.
        target_modules: The adapted matrices, as ``methods.target_layers`` takes them.
        examples: Training examples of one epoch.
        examples_assumed: Their number is an assumption, which no published count and no file has confirmed.
        prompt_tokens: Mean tokens of a prompt, template included.
        answer_tokens: Mean tokens of an answer, end token included.
        padding: Positions that are computed over real tokens: batches are padded to their longest example.
        max_tokens: Tokens of the longest example: what memory must hold. Left out, the mean computed length.
        epochs: Passes over the examples.
        steps: Optimizer steps, instead of epochs.
        drop_last: An epoch has whole batches only; otherwise batches go on into the next one.
        batch_size: Examples of one optimizer step, over all devices.
        micro_batch: Examples that one device holds at once; left out, ``batch_size / devices``.
        dtype: Of weights and activations.
        adapter_dtype: Of what trains, its gradients and AdamW's states; for ``full``, of the targets' weights
            (another one than ``dtype`` then means autocast, whose cast copies are counted).
        dropout: On the adapter's input; it keeps DiaBlo out of merged mode.
        gradient_checkpointing: Keep each layer's input alone and compute the layer again in the backward pass.
        logits: The output matrix is applied to the answers' positions alone (as ``finetune.data.collate`` asks), or
            to all.
        quantise: How the base is quantised; None for not at all.
        devices: How many.
        sharding: ``ddp`` (each device holds everything) or ``fsdp`` (weights, gradients and states are divided).
        scored: What is decoded, task by task.
        eval_prompt_tokens: Mean tokens of their prompts, which are never cut; left out, ``prompt_tokens``.

    Raises:
        ConfigError: If a value is not allowed; the message names it and what is.
    """

    model: str
    method: str = "diablo"
    num_blocks: int = 64
    rank: int | None = None
    target_modules: tuple[str, ...] = PAPER_TARGETS
    examples: int
    examples_assumed: bool = False
    prompt_tokens: float
    answer_tokens: float
    padding: float = 1.0
    max_tokens: int | None = None
    epochs: float = 1.0
    steps: int | None = None
    drop_last: bool = False
    batch_size: int = 16
    micro_batch: int | None = None
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    logits: Logits = "answers"
    quantise: QuantiseConfig | None = None
    devices: int = 1
    sharding: Sharding = "ddp"
    scored: tuple[Scored, ...] = ()
    eval_prompt_tokens: float | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        known_methods = [*methods.WITHOUT_ADAPTER, *methods.FAMILIES]
        choices = {
            "method": known_methods,
            "dtype": list(DTYPE_BYTES),
            "adapter_dtype": list(DTYPE_BYTES),
            "logits": get_args(Logits),
            "sharding": get_args(Sharding),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(allowed)}, got {value!r}.{nearest(str(value), allowed)}"
                )
        if self.drop_last and self.examples < self.batch_size:
            raise ConfigError(f"with drop_last examples must fill a batch of {self.batch_size}, got {self.examples}")
        if self.batch_size % (self.micro * self.devices):
            raise ConfigError(
                f"batch_size must be a multiple of micro_batch * devices = {self.micro} * {self.devices}, "
                f"got {self.batch_size}"
            )

    def _check_numbers(self) -> None:
        _require_at_least_one(self, *_AT_LEAST_ONE)
        _require_not_negative(self, *_NOT_NEGATIVE)
        for name, low in {"padding": 1.0, "dropout": 0.0}.items():
            if not low <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be at least {low:g}, got {getattr(self, name)!r}")
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs must be above 0, got {self.epochs!r}")
        if self.dropout >= 1:
            raise ConfigError(f"dropout must be below 1, got {self.dropout!r}")
        if self.batch_size < self.devices:
            raise ConfigError(f"batch_size must be at least devices = {self.devices}, got {self.batch_size}")
        if self.max_tokens is not None and self.max_tokens < self.length - ROUNDING:
            raise ConfigError(
                f"max_tokens must be at least the mean computed length, {self.length:.1f} positions with padding, "
                f"got {self.max_tokens}"
            )
        if self.prompt_tokens + self.answer_tokens < 1:
            raise ConfigError("prompt_tokens and answer_tokens together must be at least 1")

    @property
    def micro(self) -> int:
        """Examples that one device holds at once."""
        return self.micro_batch or self.batch_size // self.devices

    @property
    def accumulation(self) -> int:
        """Micro batches that one device adds up for one optimizer step."""
        return self.batch_size // (self.micro * self.devices)

    @property
    def stores_integers(self) -> bool:
        """The base is quantised for good: its layers hold integers, not floats on a grid."""
        return self.quantise is not None and not self.quantise.is_simulated

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as the run itself counts them."""
        if self.method == "none":
            return 0
        return self.steps or number_of_steps(self.examples, self.epochs, self.batch_size, drop_last=self.drop_last)

    @property
    def length(self) -> float:
        """Mean positions computed for an example, padding included."""
        return (self.prompt_tokens + self.answer_tokens) * self.padding

    @property
    def kept(self) -> float:
        """Mean positions of an example whose logits are computed."""
        answers = self.answer_tokens * self.padding + 1
        return self.length if self.logits == "all" else min(answers, self.length)

    @property
    def longest(self) -> int:
        """Positions of an example in the longest batch."""
        return self.max_tokens or math.ceil(self.length)

    @property
    def longest_kept(self) -> int:
        """Positions whose logits are computed there, answers being in their mean proportion."""
        return min(self.longest, math.ceil(self.kept * self.longest / self.length))

    @property
    def eval_items(self) -> int:
        """Problems to decode, of all tasks."""
        return sum(task.items for task in self.scored)

    @property
    def eval_prompt(self) -> float:
        """Mean positions computed for a prompt that is decoded, padding included."""
        tokens = self.prompt_tokens if self.eval_prompt_tokens is None else self.eval_prompt_tokens
        return tokens * self.padding

    @property
    def padded(self) -> bool:
        """A micro batch needs a mask."""
        return self.micro > 1 and self.padding > 1


def _require_at_least_one(numbers: Scored | Work, *names: str) -> None:
    for name in names:
        if (value := getattr(numbers, name)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


def _require_not_negative(numbers: Scored | Work, *names: str) -> None:
    for name in names:
        if (value := getattr(numbers, name)) is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be at least 0, got {value!r}")
