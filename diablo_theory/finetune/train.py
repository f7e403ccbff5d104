"""Training on transformers' Trainer: small whole checkpoints, gradient norms by group, a stop at the first NaN."""

from __future__ import annotations

import errno
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from diablo_theory.errors import NonFiniteError
from diablo_theory.files import fsync, read_json, write_json, write_tensors
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.data import Encoded, collate
from diablo_theory.finetune.models import pick_device
from diablo_theory.methods import GRADIENT_GROUPS, load_trainable_state, trainable_state

WEIGHTS = "trainable.safetensors"
#: Written last into a checkpoint, after everything else has reached the disk: a folder without it is half-written.
SEAL = "complete.json"


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer that saves the trainable parameters alone and stops before a non-finite step.

    Args:
        groups: Column suffix to a part of parameter names; each group's gradient norm is logged every step.
        weights_on_stop: Where the last good trainable parameters are kept when a loss or gradient is not finite.
        kwargs: As for Trainer.
    """

    def __init__(self, groups: Mapping[str, str], weights_on_stop: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._groups = groups
        self._weights_on_stop = weights_on_stop
        self._norms: dict[str, float] = {}
        self._timer = _Timer()
        self.add_callback(self._timer)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward, then the norms of each group's gradient, before clipping."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        norms = {f"grad_norm/{name}": _gradient_norm(model, part) for name, part in self._groups.items()}
        if not all(map(math.isfinite, (loss.item(), *norms.values()))):
            save_trainable(model, self._weights_on_stop)
            step = self.state.global_step
            raise NonFiniteError(
                f"loss {loss.item()} with gradient norms {norms} at step {step + 1}: training stopped before the "
                f"update. The state after step {step} is kept in {self._weights_on_stop}. "
                "Usual causes: a learning rate that is too large, or NaN in the data or the model."
            )
        self._norms = norms
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the group norms and the step's seconds to the per-step entries."""
        ours = {**self._norms, "seconds": self._timer.seconds} if "loss" in logs else {}
        super().log({**logs, **ours}, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what training changes: the base model is the same for everybody."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        save_trainable(self.model, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable_state(model or self.model, load_file(Path(resume_from_checkpoint) / WEIGHTS))


class _Timer(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Seconds of the last whole step: forward, backward, clipping and the optimizer's update."""

    seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._started


class _Seal(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # the trained parameters are saved right after, without the optimizer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            fsync(file)
        write_json(folder / SEAL, {"step": state.global_step})


class _Advance(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)


def train(
    model: nn.Module,
    data: list[Encoded],
    config: RunConfig,
    folder: Path,
    pad_id: int,
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """Train a prepared model in place, going on from the last whole checkpoint of the folder if there is one.

    Args:
        model: From :func:`diablo_theory.methods.prepare`.
        data: ``steps x batch_size`` encoded examples, used once, in this order.
        config: The run.
        folder: Where ``checkpoints/`` and, if training has to stop, ``last_good.safetensors`` go.
        pad_id: Token id of the padding.
        advance: Told the number of steps finished, those of an earlier attempt included.

    Returns:
        The log, a row a step: step, loss, learning_rate, grad_norm (all before clipping), a grad_norm/GROUP column a
        group, seconds.

    Raises:
        NonFiniteError: If a loss or gradient is not finite; the last good parameters are kept.

    Source: optimiser and schedule as the authors' scripts have them (AdamW, no weight decay, Trainer's clipping).
    """
    checkpoints = folder / "checkpoints"
    trainer = AdapterTrainer(
        groups=GRADIENT_GROUPS[config.method],
        weights_on_stop=folder / "last_good.safetensors",
        model=model,
        args=_arguments(config, checkpoints),
        train_dataset=data,
        data_collator=functools.partial(collate, pad_id=pad_id),
        callbacks=[_Seal(), _Advance(advance)],
    )
    trainer.remove_callback(PrinterCallback)  # a line a step; the progress bar and the log file say it better
    resume = last_whole_checkpoint(checkpoints)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):  # torch's word for a full disk
            raise OSError(errno.EIO, "a checkpoint could not be written (disk full?)", str(checkpoints)) from error
        raise
    norms = [f"grad_norm/{group}" for group in GRADIENT_GROUPS[config.method]]
    columns = ["step", "loss", "learning_rate", "grad_norm", *norms, "seconds"]
    return pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry], columns=columns)


def _arguments(config: RunConfig, checkpoints: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(config.warmup_steps, config.steps - 1),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        # The order of the data is that of the list, the same for every method and after every interruption.
        train_sampling_strategy="sequential",
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,  # the older one stays until the newer is sealed
        logging_steps=1,
        logging_nan_inf_filter=False,  # by default Trainer writes NaN losses as zero
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=pick_device(config.device).type == "cpu",
    )


def save_trainable(model: nn.Module, path: Path) -> None:
    """The trainable parameters as safetensors, whole or not at all.

    Raises:
        OSError: If they cannot be written, a full disk for one.
    """
    write_tensors(path, trainable_state(model))


def last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    whole = [seal.parent for seal in checkpoints.glob(f"checkpoint-*/{SEAL}")]
    return max(whole, key=lambda folder: int(read_json(folder / SEAL)["step"]), default=None)


def _gradient_norm(model: nn.Module, part: str) -> float:
    gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None and part in f".{name}"]
    return float(torch.nn.utils.get_total_norm(gradients))
