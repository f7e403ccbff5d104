"""One task of a sweep, in whatever process it runs: on one thread, its rows as text, its exception as a result."""

from __future__ import annotations

import json
import math
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diablo_theory.errors import NonFiniteError

Value = str | int | float | bool
Row = dict[str, Value]
Function = Callable[..., list[Row]]
#: The index of a task, with its rows as JSON or the exception that it ended in.
Outcome = tuple[int, str | Exception]


def run_task(function: Function, index: int, task: dict[str, Any]) -> Outcome:
    """Call the function on one task.

    Rows travel as JSON text whichever way the task is run, so that rows of this process, of another one and of a file
    are the same to the last bit: JSON writes a float with the digits that give it back exactly.

    Args:
        function: What the sweep is of.
        index: The task's place in the sweep.
        task: Keyword arguments.

    Returns:
        The index, with the rows as JSON or with what the function raised. An exception is returned, not raised: one
        that left a worker would end the sweep for all other tasks.
    """
    try:
        with one_thread():
            return index, rows_to_json(function(**task))
    except Exception as error:
        return index, _portable(error)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread here, then as many as before.

    The order of the sums in a product, and with it the last bits, depends on the number of threads; joblib's workers,
    dask's workers and this process would otherwise each have their own. One is also the number at which parallel tasks
    do not fight for cores. torch keeps the number by the calling thread, so tasks side by side do not meet here. That
    numpy's and scipy's BLAS stay as they are is on purpose: the theory computes in torch alone.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_to_json(rows: list[Row]) -> str:
    """Rows as JSON text, from which ``json.loads`` makes the same rows again.

    Raises:
        TypeError: If they are not a list of dictionaries of plain values; NumPy's and torch's scalars are not plain.
        NonFiniteError: If a value is NaN or infinite: JSON has no such numbers, and a map has no such cells.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"function must return a list of dictionaries, one a row, got {rows!r:.200}")
    for row in rows:
        for column, value in row.items():
            if not isinstance(column, str) or not isinstance(value, Value):
                raise TypeError(
                    f"column {column!r} holds {value!r:.80} ({type(value).__name__}); names must be str and values "
                    "str, int, float or bool"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise NonFiniteError(f"column {column!r} is {value}; every number must be finite")
    return json.dumps(rows)


def _portable(error: Exception) -> Exception:
    """An exception that another process can read, with where it was raised as a note: pickling drops the traceback."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception's own constructor makes of it
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the task:\n{where}")
    return error
