"""Tasks side by side in joblib's workers, of which some may die."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from diablo_theory.errors import WorkerDiedError
from diablo_theory.sweeps.task import Outcome


def outcomes(parallel: joblib.Parallel, calls: dict[int, Any], attempts: int) -> Iterator[Outcome]:
    """What comes of every task, as they finish.

    When a worker dies, joblib ends the others too and cannot say which task was to blame. What was under way is begun
    again, and a task that is under way at a second death has a worker to itself from then on: so a chance death costs
    little, and a task that kills every worker takes no other one down with it.

    Args:
        parallel: Returns results as an unordered generator, in batches of one.
        calls: By index, ``joblib.delayed`` calls that return an :data:`Outcome`.
        attempts: Deaths with a task under way after which it is given up, if it was alone at the last.

    Yields:
        One outcome a call; a :class:`~diablo_theory.errors.WorkerDiedError` for a task that was given up.
    """
    together, alone = list(calls), list[int]()
    deaths: Counter[int] = Counter()
    while together or alone:
        batch = alone[:1] or together
        begun, finished, accused = set[int](), set[int](), set[int]()
        try:
            with _closing(parallel(_noting(calls, batch, begun))) as results:
                for index, outcome in results:
                    if isinstance(outcome, WorkerDiedError):  # of a cluster, which knows whom to blame
                        accused.add(index)
                        last_death: Exception = outcome
                    else:
                        finished.add(index)
                        yield index, outcome
        except TerminatedWorkerError as error:
            accused, last_death = begun - finished, error
        deaths.update(accused)
        if alone and accused and deaths[alone[0]] >= attempts:
            finished.add(alone[0])
            yield alone[0], _given_up(last_death)
        left = [index for index in (*alone, *together) if index not in finished]
        alone = [index for index in left if deaths[index] >= min(2, attempts)]
        together = [index for index in left if index not in alone]


def _noting(calls: dict[int, Any], batch: list[int], begun: set[int]) -> Iterator[Any]:
    """The calls of a batch; joblib takes each shortly before it begins."""
    for index in batch:
        begun.add(index)
        yield calls[index]


def _given_up(last_death: Exception) -> WorkerDiedError:
    error = WorkerDiedError("the workers that ran it died, the last one with nothing else to do")
    error.__cause__ = last_death
    return error


@contextmanager
def _closing(results: Generator[Outcome]) -> Iterator[Generator[Outcome]]:
    """Stop the workers if the block ends before the results do."""
    try:
        yield results
    finally:
        with warnings.catch_warnings():  # joblib advises to ask for fewer results
            warnings.filterwarnings("ignore", category=UserWarning, module="joblib")
            results.close()
