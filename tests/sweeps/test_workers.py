import itertools
import os
import signal
import threading
import time

import joblib
import psutil
import pytest
from joblib.externals.loky.process_executor import TerminatedWorkerError
from sweep_tasks import calls_of, noted_outcome

from diablo_theory.errors import WorkerDiedError
from diablo_theory.sweeps.workers import outcomes


def run(tasks, attempts=3):
    parallel = joblib.Parallel(n_jobs=2, return_as="generator_unordered", batch_size=1)
    calls = {index: joblib.delayed(noted_outcome)(index, **task) for index, task in enumerate(tasks)}
    return outcomes(parallel, calls, attempts)


def noted_tasks(log, deaths):
    return [{"name": name, "log": str(log), "delay": 0.05, "deaths": deaths.get(name, 0)} for name in "abcdef"]


def workers():
    return [child for child in psutil.Process().children() if "LokyProcess" in " ".join(child.cmdline())]


def test_a_killed_worker_costs_only_what_was_under_way(tmp_path):
    found = dict(run(noted_tasks(tmp_path, {"d": 1})))
    assert sorted(found) == list(range(6))
    assert not any(isinstance(rows, Exception) for rows in found.values())
    calls = calls_of(tmp_path)
    assert calls["d"] == 2
    assert calls["a"] == 1  # finished before
    assert sum(calls.values()) <= 6 + 2 + 2  # those of two workers, and two that they may have gone on with


def test_a_task_that_always_kills_is_given_up_and_takes_no_other_with_it(tmp_path):
    found = dict(run(noted_tasks(tmp_path, {"b": 99}), attempts=3))
    error = found.pop(1)
    assert sorted(found) == [0, 2, 3, 4, 5]
    assert not any(isinstance(rows, Exception) for rows in found.values())
    assert isinstance(error, WorkerDiedError)
    assert "SIGKILL" in str(error.__cause__)
    assert calls_of(tmp_path)["b"] == 3


def test_who_was_under_way_at_two_deaths_runs_alone_before_the_rest_goes_on():
    begun = []

    def two_workers(calls):
        """Begins two calls at a time; both end where call 2 is among them."""
        while pair := list(itertools.islice(calls, 2)):
            begun.append(pair)
            if 2 in pair:
                raise TerminatedWorkerError
            yield from ((index, "[]") for index in pair)

    found = dict(outcomes(two_workers, {index: index for index in range(6)}, attempts=4))
    assert begun == [[0, 1], [2, 3], [2, 3], [2], [2], [3], [4, 5]]
    assert [index for index in sorted(found) if isinstance(found[index], WorkerDiedError)] == [2]


@pytest.fixture
def listening():
    """Ctrl-C raises here, even in a run that a shell has put into the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_an_interrupt_ends_the_workers(tmp_path):
    tasks = noted_tasks(tmp_path, {})
    for task in tasks[1:]:
        task["delay"] = 60.0
    results = run(tasks)
    assert next(results)[0] == 0
    assert workers()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    psutil.wait_procs(workers(), timeout=10)
    assert not workers()


def test_results_that_nobody_wants_any_more_end_the_workers(tmp_path, recwarn):
    tasks = noted_tasks(tmp_path, {})
    for task in tasks[1:]:
        task["delay"] = 60.0
    results = run(tasks)
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 20
    assert not workers()
    assert not recwarn.list
