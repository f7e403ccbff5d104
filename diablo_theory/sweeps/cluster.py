"""A dask cluster as a backend for joblib."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import joblib

from diablo_theory.errors import SweepError, WorkerDiedError
from diablo_theory.sweeps.task import Outcome

#: Seconds that a scheduler has to answer, and its first worker to be there.
PATIENCE = 10.0


class ClusterBackend(joblib.ParallelBackendBase):  # type: ignore[misc]  # joblib is untyped
    """joblib's tasks as futures of a dask client.

    It stands in for joblib's own backend for dask, with which a sweep waits for ever once the scheduler gives up a
    task (its callback never comes), and which computes in the calling process if the cluster has one core.

    Args:
        client: A connected ``distributed.Client``.
        killed: The exception with which the scheduler gives up a task whose workers died.
    """

    supports_retrieve_callback = True

    def __init__(self, client: Any, killed: type[Exception]) -> None:
        super().__init__(nesting_level=0)
        self._client = client
        self._killed = killed

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Cores of the cluster; at least 2, since for joblib 1 means the calling process."""
        cores: int = sum(self._client.nthreads().values())
        return max(2, cores)

    def submit(self, func: Any, callback: Callable[[tuple[int, Any]], None]) -> Any:
        """Hand one of joblib's batches to the scheduler; ``callback`` hears of it whatever becomes of it."""
        [(_, (_, index, _), _)] = func.items  # a batch of one call: run_task(function, index, task)
        future = self._client.submit(func, key=f"sweep-{index}-{uuid.uuid4().hex}")
        future.add_done_callback(lambda future: callback((index, future)))
        return future

    def retrieve_result_callback(self, out: tuple[int, Any]) -> list[Outcome]:
        """The outcomes of a batch.

        Raises:
            SweepError: If the scheduler is gone, or its workers cannot even begin the task.
        """
        index, future = out
        try:
            outcomes: list[Outcome] = future.result()
        except self._killed as error:
            return [(index, WorkerDiedError(str(error)))]
        except Exception as error:
            raise SweepError(f"the dask cluster failed ({type(error).__name__}: {error})") from error
        return outcomes


@contextmanager
def connected(address: str) -> Iterator[ClusterBackend]:
    """The cluster of the scheduler at an address, for as long as the block lasts.

    Args:
        address: Such as ``"tcp://host:8786"``.

    Raises:
        SweepError: If dask is not installed, no scheduler answers, or it has no workers.
    """
    try:
        import distributed
    except ImportError:
        raise SweepError(
            f"cluster={address!r} needs dask, which is not installed: pip install diablo-theory[cluster]"
        ) from None
    try:
        # A client that could not connect blocks once more when it is collected, so see that somebody listens there.
        socket.create_connection(distributed.comm.get_address_host_port(address), PATIENCE).close()
        client = distributed.Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise SweepError(f"no dask scheduler answers at cluster={address!r}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise SweepError(f"the dask scheduler at {address} has no worker after {PATIENCE:g} s") from error
        yield ClusterBackend(client, distributed.KilledWorker)
