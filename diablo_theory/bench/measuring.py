"""Timing steps in pairs, and counting the bytes that they hold."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pandas as pd
import torch

MIB = 2**20
WARMUP_ROUNDS = 1
PHASES = ("forward", "backward", "optimizer")


class Contender(Protocol):
    """What can be timed: a step in three phases, told apart by calls of ``mark``."""

    label: str

    def step(self, mark: Callable[[], None] = ...) -> None:
        """Do one step; call ``mark`` after the forward pass, after the backward pass and at the end."""


class _Clock:
    """Times between marks, on the CPU's clock or, without waiting in between, on a GPU's own."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if self._gpu:
            torch.cuda.synchronize(self._device)
            return [first.elapsed_time(second) / 1000 for first, second in itertools.pairwise(self._marks)]
        return [second - first for first, second in itertools.pairwise(self._marks)]


def paired(
    contenders: Sequence[Contender], rounds: int, device: torch.device, advance: Callable[[int], None]
) -> pd.DataFrame:
    """Time one step of each contender in every round, in one process: A B C, B C A, ...

    Args:
        contenders: What to time.
        rounds: Counted rounds, at least 1, after one that is not counted.
        device: Where the work is done.
        advance: Told the number of rounds finished, warm-up included.

    Returns:
        Columns ``round, method, phase, seconds``: a line for each of :data:`PHASES` and one for the whole ``step``.
    """
    lines: list[dict[str, Any]] = []
    for index in range(-WARMUP_ROUNDS, rounds):
        # Rotated, so that no method always runs behind the same one.
        turn = index % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            clock = _Clock(device)
            clock.mark()
            contender.step(clock.mark)
            seconds = clock.seconds()
            if index >= 0:
                parts = dict(zip(PHASES, seconds, strict=True)) | {"step": sum(seconds)}
                lines += [
                    {"round": index, "method": contender.label, "phase": phase, "seconds": value}
                    for phase, value in parts.items()
                ]
        advance(1)
    return pd.DataFrame(lines)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that ``work`` holds at once, beyond what was allocated before it began.

    From the CUDA allocator's own counter on a GPU; on a CPU from the allocations that torch's profiler records.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
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


def keep_pages() -> bool:
    """Let the C library keep freed memory for this process instead of handing it back after every step.

    A training step frees and allocates the same large tensors again and again. glibc maps each of them anew, and the
    kernel clears every page: a seventh of a step of a small model on two cores, and more noise than the methods
    differ. Kept pages take that out of all contenders alike. The same effect without code: ``MALLOC_MMAP_MAX_=0
    MALLOC_TRIM_THRESHOLD_=-1`` in the environment, or another allocator.

    Returns:
        Whether the C library has the setting (glibc does).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # names of the parameters in malloc.h
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))
