"""Functions to sweep, in a module of their own because workers import them by name.

torch is loaded where it is used: a worker that a test kills is soon there again without it.
"""

import os
import signal
import time
from pathlib import Path


def cell(size, delay=0.0):
    """A few rows whose last bits depend on the number of threads; the longer the delay, the later they finish."""
    import torch

    time.sleep(delay)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    total = float((matrix @ matrix).sum())
    threads = torch.get_num_threads()
    return [
        {"size": size, "side": side, "total": total / 3, "threads": threads, "even": size % 2 == 0}
        for side in ("left", "right")
    ]


def noted(name, log, delay=0.0, deaths=0):
    """Leave a mark for every call, and kill the worker in the first ``deaths`` of them."""
    calls = len(list(Path(log).glob(f"{name}-*")))
    (Path(log) / f"{name}-{calls}").touch()
    time.sleep(delay)
    if calls < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"name": name, "process": os.getpid()}]


def noted_outcome(index, **task):
    return index, noted(**task)


def calls_of(log):
    """How often each task was called, by name."""
    names = [path.name.rpartition("-")[0] for path in Path(log).iterdir()]
    return {name: names.count(name) for name in set(names)}


class AwkwardError(Exception):
    """Cannot be pickled back: its constructor wants what pickling does not give it."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def picky(value):
    """Return, or raise, what a name stands for."""
    if value == "fails":
        raise ZeroDivisionError("by nought")
    if value == "awkward":
        raise AwkwardError("this", "that")
    if value == "interrupted":
        raise KeyboardInterrupt
    import torch

    odd = {"nan": float("nan"), "infinite": float("-inf"), "tensor": torch.ones(()), "none": None}
    shapes = {"row": {"a": 1}, "rows of numbers": [1], "number as name": [{1: 1}]}
    return shapes.get(value, [{"value": odd.get(value, value)}])
