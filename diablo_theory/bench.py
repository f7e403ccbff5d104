"""Step time and memory of the methods, paired: every round runs one training step of each, in turn, in one process."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from diablo_theory import methods
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.data import collate, encode
from diablo_theory.finetune.models import LoadedModel
from diablo_theory.finetune.tasks import TASKS

MIB = 2**20
WARMUP_ROUNDS = 1


class _Contender:
    """One method with its own model and optimizer, stepping on one fixed batch."""

    def __init__(self, prepared: methods.Prepared, batch: dict[str, Any]) -> None:
        self.label = prepared.label
        self._model = prepared.model.train()
        self._batch = batch
        self._device = batch["input_ids"].device
        parameters = [p for p in prepared.model.parameters() if p.requires_grad]
        # A rate of zero keeps every round the same work on the same numbers.
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def step(self) -> None:
        self._model(**self._batch, use_cache=False).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def seconds(self) -> float:
        _synchronize(self._device)
        started = time.perf_counter()
        self.step()
        _synchronize(self._device)
        return time.perf_counter() - started

    def static_bytes(self) -> int:
        """Parameters and optimizer state: what lies in memory between two steps."""
        state = itertools.chain.from_iterable(entry.values() for entry in self._optimizer.state.values())
        return sum(t.nbytes for t in itertools.chain(self._model.parameters(), state) if isinstance(t, torch.Tensor))


def compare(
    loaded: LoadedModel,
    config: RunConfig,
    contenders: Sequence[methods.Method],
    rounds: int,
    advance: Callable[[int], None],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Time one training step (forward, backward, AdamW) of each method, A B C, B C A, ..., and measure its memory.

    Args:
        loaded: The model; each method gets a copy.
        config: Gives task, batch size, num_blocks and target modules.
        contenders: Methods to compare.
        rounds: Counted rounds, at least 1, after one that is not counted.
        advance: Told the number of rounds finished, warm-up included.

    Returns:
        Step times (round, method, seconds), and memory (method, static_mib: parameters and optimizer state;
        step_peak_mib: the most that a step adds to it).

    Raises:
        ValueError: If rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    examples = TASKS[config.task].examples("train", config.batch_size, config.seed)
    device = next(loaded.model.parameters()).device
    batch = collate(encode(examples, loaded.tokenizer), loaded.tokenizer.pad_token_id)
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    running = [_Contender(_prepare(loaded.model, method, config), batch) for method in contenders]
    times: list[dict[str, Any]] = []
    for index in range(-WARMUP_ROUNDS, rounds):
        # Rotated, so that no method always runs behind the same one.
        for contender in running[index % len(running) :] + running[: index % len(running)]:
            seconds = contender.seconds()
            if index >= 0:
                times.append({"round": index, "method": contender.label, "seconds": seconds})
        advance(1)
    memory = [
        {
            "method": contender.label,
            "static_mib": contender.static_bytes() / MIB,
            "step_peak_mib": peak_bytes(contender.step, device) / MIB,
        }
        for contender in running
    ]
    return pd.DataFrame(times), pd.DataFrame(memory)


def _prepare(model: nn.Module, method: methods.Method, config: RunConfig) -> methods.Prepared:
    return methods.prepare(copy.deepcopy(model), method, config.num_blocks, config.target_modules, config.seed)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that ``work`` holds at once, beyond what was allocated before it began.

    From the CUDA allocator's own counter on a GPU; on a CPU from the allocations that torch's profiler records.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise writes its own start and stop to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    # events() folds allocations into operators; the raw records keep their order, which a peak needs.
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    changes: list[int] = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
