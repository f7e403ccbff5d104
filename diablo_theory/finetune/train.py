"""Training on transformers' Trainer: small whole checkpoints, gradient norms by group, a stop at the first NaN.

One process or several: under ``accelerate launch`` (DDP, FSDP) the processes share each batch, and the first of them
writes.
"""

from __future__ import annotations

import errno
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from diablo_theory.errors import ConfigError, NonFiniteError
from diablo_theory.files import read_tensors, write_tensors
from diablo_theory.finetune.checkpoints import last_whole_checkpoint, seal
from diablo_theory.finetune.config import RunConfig, require_warmup
from diablo_theory.finetune.data import Ordered, collate
from diablo_theory.finetune.models import pick_device
from diablo_theory.methods import Prepared, classes_in_state, load_trainable_state, move_state, trainable_state

WEIGHTS = "trainable.safetensors"
#: Of a batch whose loss is not finite, so many examples are named.
NAMED = 16
#: Column of the log on a GPU: the most MiB that tensors have held there since training began.
MEMORY = "memory_mib"
#: A loss scale below this means that no scale helps. Source: fairseq's ``min_loss_scale``.
SMALLEST_SCALE = 1e-4


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer that saves the trainable parameters alone and stops before a non-finite step.

    Args:
        prepared: The method: its optimizer if it has one of its own, its parameter groups, whose gradient norms are
            logged every step, and what it does after a step.
        config: The run.
        weights_on_stop: Where the last good trainable parameters are kept when a loss or gradient is not finite.
        kwargs: As for Trainer.
    """

    def __init__(self, prepared: Prepared, config: RunConfig, weights_on_stop: Path, **kwargs: Any) -> None:
        super().__init__(model=prepared.model, **kwargs)
        self._prepared = prepared
        self._config = config
        self._weights_on_stop = weights_on_stop
        self._norms: dict[str, float] = {}
        self._losses: list[Tensor] = []  # of the micro-batches so far
        self._timer = _Timer()
        self.add_callback(self._timer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's own optimizer, or Trainer's AdamW."""
        args, make = self.args, self._prepared.optimizer
        if make is None:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        else:
            betas = (args.adam_beta1, args.adam_beta2)
            optimizer = make(args.learning_rate, args.weight_decay, betas)
        self.optimizer = optimizer
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; at the end of a batch also the norms of each group's gradient, before clipping."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            started = time.perf_counter()
            scaler = self.accelerator.scaler  # in float16 on a GPU: gradients are those of the loss times its scale
            scale = None if scaler is None else scaler.get_scale()
            norms = {name: _gradient_norm(model, part) for name, part in self._prepared.groups.items()}
            self._norms = {f"grad_norm/{name}": norm / (scale or 1.0) for name, norm in norms.items()}
            # Trainer has divided the micro-batches' losses: their sum is the batch's, finite only if all of them are.
            whole = torch.stack(self._losses).sum()
            self._losses.clear()
            if self._has_diverged(whole, scale):
                self._stop(whole.item())
            self._timer.aside += time.perf_counter() - started
        return loss

    def _has_diverged(self, loss: Tensor, scale: float | None) -> bool:
        """Whether to stop, given a process's loss on the whole batch; all processes say the same.

        A loss that is not finite makes the gradients so, and their norms are the same in all processes. Under a
        scaler they also overflow when the scale is too large: it leaves such a step out and takes a smaller scale.
        """
        if scale is None:
            return not all(map(math.isfinite, (*self._norms.values(), loss.item())))
        losses: Tensor = self.accelerator.gather(loss)
        return scale < SMALLEST_SCALE or not bool(losses.isfinite().all())

    def _stop(self, loss: float) -> None:
        state = whole_state(self.model_wrapped)
        if self.is_world_process_zero():
            write_tensors(self._weights_on_stop, state)
        step, size = self.state.global_step, self._config.batch_size
        examples = self.train_dataset.order[step * size : (step + 1) * size]
        shown = ", ".join(map(str, examples[:NAMED])) + (", ..." if size > NAMED else "")
        checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
        raise NonFiniteError(
            f"loss {loss} with gradient norms {self._norms} at step {step + 1} (training examples {shown}): training "
            f"stopped before the update. The state after step {step} is kept in {self._weights_on_stop}; the last "
            f"checkpoint is {checkpoint or 'none'}. "
            "Usual causes: a learning rate that is too large, or NaN in the data or the model."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the group norms, the step's seconds and, on a GPU, the peak of memory to the per-step entries."""
        if "loss" in logs:
            logs = {**logs, **self._norms, "seconds": self._timer.seconds}
            if self.args.device.type == "cuda":
                logs[MEMORY] = torch.cuda.max_memory_allocated(self.args.device) / 2**20
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what training changes: the base model is the same for everybody."""
        state = whole_state(self.model_wrapped)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / WEIGHTS, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with torch.serialization.safe_globals(classes_in_state()):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            move_state(self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_whole_state(model or self.model, read_tensors(Path(resume_from_checkpoint) / WEIGHTS))


class _Timer(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Seconds of the last whole step: forward, backward, clipping and the optimizer's update.

    What is measured for the log alone (``aside``) does not count: methods have different numbers of groups.
    """

    seconds = 0.0
    aside = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.aside = 0.0
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._started - self.aside


class _Seal(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # the trained parameters are saved right after, without the optimizer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)


class _Steps(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Tells the progress bar, and the method, of each step."""

    def __init__(self, advance: Callable[[int], None], after_step: Callable[[int], None] | None) -> None:
        self._advance, self._after_step = advance, after_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._after_step is not None:
            self._after_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)


def train(
    prepared: Prepared, data: Ordered, config: RunConfig, folder: Path, pad_id: int, advance: Callable[[int], None]
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Train a prepared model in place, going on from the last whole checkpoint of the folder if there is one.

    Args:
        prepared: From :func:`diablo_theory.methods.prepare`.
        data: ``steps x batch_size`` examples, used once, in this order.
        config: The run.
        folder: Where ``checkpoints/`` and, if training has to stop, ``last_good.safetensors`` go.
        pad_id: Token id of the padding.
        advance: Told the number of steps finished, those of an earlier attempt included.

    Returns:
        The log, a row a step: step, loss, learning_rate, grad_norm (all before clipping), a grad_norm/GROUP column a
        group, seconds, and on a GPU memory_mib. And the trained parameters, whole, in the first process.

    Raises:
        NonFiniteError: If a loss or gradient is not finite; the last good parameters are kept.
        ConfigError: If the batch does not divide among the processes, there are several GPUs in one process, or the
            warm-up is as long as the training.

    Source: optimiser as the authors' scripts have it (AdamW, Trainer's clipping and epsilon).
    """
    checkpoints = folder / "checkpoints"
    trainer = AdapterTrainer(
        prepared,
        config,
        folder / "last_good.safetensors",
        args=_arguments(config, checkpoints, len(data) // config.batch_size),
        train_dataset=data,
        data_collator=functools.partial(collate, pad_id=pad_id, everything=config.loss_on == "everything"),
        callbacks=[_Seal(), _Steps(advance, prepared.after_step)],
    )
    trainer.remove_callback(PrinterCallback)  # a line a step; the progress bar and the log file say it better
    resume = last_whole_checkpoint(checkpoints)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):  # torch's word for a full disk
            raise OSError(errno.EIO, "a checkpoint could not be written (disk full?)", str(checkpoints)) from error
        raise
    norms = [f"grad_norm/{group}" for group in prepared.groups]
    columns = ["step", "loss", "learning_rate", "grad_norm", *norms, "seconds"]
    columns += [MEMORY] if trainer.args.device.type == "cuda" else []
    log = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry], columns=columns)
    return log, whole_state(trainer.model_wrapped)


def _arguments(config: RunConfig, checkpoints: Path, steps: int) -> TrainingArguments:
    processes = PartialState().num_processes
    each = config.micro_batch_size or config.batch_size // processes
    if each == 0 or config.batch_size % (each * processes):
        raise ConfigError(
            f"batch_size {config.batch_size} must be a multiple of the number of processes ({processes})"
            + (f" times micro_batch_size ({each})" if config.micro_batch_size else "")
        )
    require_warmup(config.warmup_steps, steps)
    # Weights in half precision with float32 adapters are multiplied in half precision; all in one needs no casting.
    casts = config.dtype != config.adapter_dtype
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=each,
        gradient_accumulation_steps=config.batch_size // (each * processes),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        bf16=casts and config.dtype == "bfloat16",
        fp16=casts and config.dtype == "float16",
        activation_checkpointing=config.gradient_checkpointing,
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
    if arguments.n_gpu > 1:  # Trainer would give each of them a batch, and a step would be another one
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs and a run takes one: set CUDA_VISIBLE_DEVICES=0 before Python "
            "starts, or share the run with `accelerate launch`"
        )
    return arguments


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP, of either version, holds a part of the model in each process."""
    return any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules())


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by their names in the bare model, on the CPU; every process has to ask.

    Under FSDP they are put together, and only the first process gets them.
    """
    if not is_sharded(model):
        return trainable_state(_bare(model))
    trained = {name.replace("_fsdp_wrapped_module.", "") for name, p in model.named_parameters() if p.requires_grad}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: value.contiguous() for name, value in state.items() if name in trained}


def load_whole_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what :func:`whole_state` returned; every process has to, with the whole of it."""
    if is_sharded(model):
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))
    else:
        load_trainable_state(_bare(model), state)


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _gradient_norm(model: nn.Module, part: str) -> float:
    gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None and part in f".{name}"]
    if not is_sharded(model):
        return float(torch.nn.utils.get_total_norm(gradients))
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
    square = torch.stack([torch.zeros(()), *(part.float().square().sum().cpu() for part in local)]).sum()
    square = square.to(next(model.parameters()).device)
    dist.all_reduce(square)
    return float(square.sqrt())
