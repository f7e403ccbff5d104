import os
import sys
import threading

import dask
import pytest
from distributed import LocalCluster
from pandas.testing import assert_frame_equal
from sweep_tasks import calls_of, cell, noted, picky

from diablo_theory.errors import SweepError
from diablo_theory.sweeps import cluster as clusters
from diablo_theory.sweeps import sweep

pytestmark = pytest.mark.timeout(120)


def local_cluster(workers):
    return LocalCluster(n_workers=workers, processes=True, threads_per_worker=1, dashboard_address=":0")


@pytest.fixture(scope="module")
def address():
    """The scheduler of two processes, which gives a task up when two workers have died with it."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), local_cluster(2) as cluster:
        yield cluster.scheduler_address


def noted_tasks(log, deaths):
    return [{"name": name, "log": str(log), "delay": 0.05, "deaths": deaths.get(name, 0)} for name in "abcdef"]


def test_a_cluster_gives_the_same_table_as_this_process(address, tmp_path):
    tasks = [{"size": 40 + index, "delay": 0.2 / (1 + index)} for index in range(5)]
    here = sweep(cell, tasks)
    assert_frame_equal(sweep(cell, tasks, cluster=address, folder=tmp_path), here, check_exact=True)
    assert_frame_equal(sweep(cell, tasks, folder=tmp_path), here, check_exact=True)


def test_tasks_run_on_the_two_workers_and_results_come_as_they_finish(address, tmp_path):
    tasks = noted_tasks(tmp_path, {})
    tasks[0]["delay"] = 1.0
    kept = []

    def progress(finished, total):
        kept.append({path.stem for path in (tmp_path / "sweep" / "tasks").glob("*.json")})

    table = sweep(noted, tasks, cluster=address, folder=tmp_path / "sweep", progress=progress)
    assert table["process"].nunique() == 2
    assert os.getpid() not in set(table["process"])
    assert [len(names) for names in kept] == list(range(7))
    assert "000000" not in kept[3]


def test_a_killed_worker_costs_only_its_own_task(address, tmp_path):
    table = sweep(noted, noted_tasks(tmp_path, {"c": 1}), cluster=address)
    assert list(table["name"]) == list("abcdef")
    calls = calls_of(tmp_path)
    assert calls["c"] == 2
    # The scheduler does again what the dead worker had finished and not handed over yet: one result at most.
    assert sum(calls.values()) <= 6 + 2


def test_a_task_that_always_kills_is_named_and_the_others_are_kept(address, tmp_path):
    (tmp_path / "log").mkdir()
    tasks = noted_tasks(tmp_path / "log", {"c": 99})
    with pytest.raises(SweepError, match=r"1 of 6 tasks of sweep_tasks.noted failed:\n  {'name': 'c'") as caught:
        sweep(noted, tasks, cluster=address, folder=tmp_path / "sweep")
    assert "all those workers died while running it" in str(caught.value.__cause__.__cause__)
    assert len(list((tmp_path / "sweep" / "tasks").iterdir())) == 5
    assert calls_of(tmp_path / "log")["c"] == 2 * 2  # given up by the scheduler, in company and alone


def test_an_exception_of_a_task_is_told_as_it_is_here(address):
    with pytest.raises(SweepError, match=r"1 of 2 tasks .*\n  {'value': 'fails'}: ZeroDivisionError") as caught:
        sweep(picky, [{"value": 1}, {"value": "fails"}], cluster=address)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_cluster_of_one_worker_is_used_and_its_end_in_the_middle_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "PATIENCE", 1.0)
    (tmp_path / "log").mkdir()
    tasks = noted_tasks(tmp_path / "log", {})
    with local_cluster(1) as cluster:
        table = sweep(noted, tasks, cluster=cluster.scheduler_address)
        assert os.getpid() not in set(table["process"])
        for task in tasks[1:]:
            task["delay"] = 1.5

        def end_it(finished, total):
            if finished == 1:
                threading.Thread(target=cluster.close).start()

        with pytest.raises(SweepError, match="the dask cluster failed"):
            sweep(noted, tasks, cluster=cluster.scheduler_address, folder=tmp_path / "sweep", progress=end_it)
    assert [path.stem for path in (tmp_path / "sweep" / "tasks").iterdir()] == ["000000"]


def test_a_cluster_without_workers_is_told(monkeypatch):
    monkeypatch.setattr(clusters, "PATIENCE", 0.5)
    with local_cluster(0) as cluster, pytest.raises(SweepError, match=r"has no worker after 0\.5 s"):
        sweep(picky, [{"value": 1}], cluster=cluster.scheduler_address)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "foo://host:1"])
def test_a_scheduler_that_does_not_answer_is_told_and_nothing_is_harmed(tmp_path, address):
    sweep(picky, [{"value": 1}], folder=tmp_path / "done")
    with pytest.raises(SweepError, match=f"no dask scheduler answers at cluster='{address}'"):
        sweep(picky, [{"value": 1}], folder=tmp_path / "new", cluster=address)
    assert list(sweep(picky, [{"value": 1}], folder=tmp_path / "new")["value"]) == [1]
    # What is done needs no cluster.
    assert list(sweep(picky, [{"value": 1}], folder=tmp_path / "done", cluster=address)["value"]) == [1]


def test_without_dask_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SweepError, match=r"needs dask, which is not installed: pip install diablo-theory\[cluster\]"):
        sweep(picky, [{"value": 1}], cluster="tcp://127.0.0.1:1")
