"""A sweep from its tasks to one table: what is done is read, the rest is run, kept and put in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from diablo_theory.errors import SweepError
from diablo_theory.files import locked
from diablo_theory.sweeps.cluster import connected
from diablo_theory.sweeps.folder import SweepFolder
from diablo_theory.sweeps.task import Function, Outcome, run_task
from diablo_theory.sweeps.workers import outcomes

#: How many failed tasks an error lists.
LISTED = 5


def sweep(
    function: Function,
    tasks: Sequence[dict[str, Any]],
    *,
    folder: Path | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    attempts: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Call a function on every task, in parallel, and put the rows into one table.

    The table is the same to the last bit wherever the tasks run, in whatever order they finish and however often the
    sweep was interrupted, if the function depends on its arguments only, computes in torch, and the machines are of
    one kind: every task runs on one torch thread.

    Args:
        function: Module-level function of keyword arguments; returns a list of rows, dictionaries of str, int, float
            or bool, every float finite. Workers must be able to import it.
        tasks: Keyword arguments of each call, plain JSON; at least one.
        folder: Where finished tasks are kept as they finish, one file each; made if need be. Tasks that are there are
            not computed again. It knows the function by its name and by the version of this package: after a change
            of the code take another one. By default nothing is kept.
        jobs: Tasks at a time: 1 in this process, more in as many processes on this machine.
        cluster: Address of a dask scheduler such as ``"tcp://host:8786"``: the tasks run on the workers that it has.
        attempts: How many workers may die with a task under way before it is given up; from the second on it has
            one to itself. On a cluster its scheduler counts (``distributed.scheduler.allowed-failures``).
        progress: Called with the numbers of finished tasks and of all tasks, at the start and after each.

    Returns:
        The rows of the first task, then those of the second, and so on.

    Raises:
        TypeError: If a task is not plain JSON.
        ValueError: If the function cannot be imported by its name, there are no tasks, or jobs or attempts is out of
            range.
        SweepError: If tasks failed; it names them and has the first one's exception as its cause. All others have
            finished and are kept. Or if the cluster cannot be used.
        ResultsError: If the folder belongs to another sweep, or another process is at work in it. It is left as it is.
    """
    _check(function, tasks, jobs, cluster, attempts)
    tell = progress or (lambda finished, total: None)
    failed: dict[int, Exception] = {}
    with _opened(folder, _name(function), tasks) as store:
        done = store.finished() if store else {}
        tell(len(done), len(tasks))
        calls = {
            index: joblib.delayed(run_task)(function, index, task)
            for index, task in enumerate(tasks)
            if index not in done
        }
        with closing(_run(calls, jobs, cluster, attempts)) as results:
            for index, outcome in results:
                if isinstance(outcome, Exception):
                    failed[index] = outcome
                    continue
                done[index] = json.loads(outcome)
                if store:
                    store.keep(index, done[index])
                tell(len(done), len(tasks))
    if failed:
        raise _error(_name(function), tasks, failed, folder) from failed[min(failed)]
    return pd.DataFrame([row for index in range(len(tasks)) for row in done[index]])


def _check(function: Function, tasks: Sequence[dict[str, Any]], jobs: int, cluster: str | None, attempts: int) -> None:
    if "<" in getattr(function, "__qualname__", "<none>"):  # <lambda>, <locals>
        raise ValueError(f"function must be one that a module defines, so that workers can import it, got {function}")
    if not tasks:
        raise ValueError("tasks must hold at least one task, got none")
    for task in tasks:
        if not _is_plain(task):
            raise TypeError(f"tasks must be plain JSON (str as keys, lists for tuples, no NaN), got {task!r}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if cluster is not None and jobs != 1:
        raise ValueError(f"jobs must be left at 1 with a cluster, which has its own number of workers, got {jobs}")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")


def _is_plain(task: object) -> bool:
    try:
        return isinstance(task, dict) and bool(json.loads(json.dumps(task, allow_nan=False)) == task)
    except (TypeError, ValueError):
        return False


def _name(function: Function) -> str:
    return f"{function.__module__}.{function.__qualname__}"


@contextmanager
def _opened(folder: Path | None, function: str, tasks: Sequence[dict[str, Any]]) -> Iterator[SweepFolder | None]:
    if folder is None:
        yield None
    else:
        with locked(folder):
            yield SweepFolder(folder, function, tasks)


def _run(calls: dict[int, Any], jobs: int, cluster: str | None, attempts: int) -> Generator[Outcome]:
    if not calls:
        return
    with nullcontext("loky") if cluster is None else connected(cluster) as backend:
        parallel = joblib.Parallel(
            n_jobs=min(jobs, len(calls)), backend=backend, return_as="generator_unordered", batch_size=1
        )
        yield from outcomes(parallel, calls, attempts if cluster is None else 1)


def _error(
    function: str, tasks: Sequence[dict[str, Any]], failed: dict[int, Exception], folder: Path | None
) -> SweepError:
    lines = [f"{len(failed)} of {len(tasks)} tasks of {function} failed:"]
    lines += [
        f"  {tasks[index]}: {type(failed[index]).__name__}: {failed[index]}" for index in sorted(failed)[:LISTED]
    ]
    if len(failed) > LISTED:
        lines.append(f"  and {len(failed) - LISTED} more")
    if folder is not None:
        lines.append(f"The others are kept in {folder}: the same sweep again computes these only.")
    return SweepError("\n".join(lines))
