import functools
import os

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from sweep_tasks import calls_of, cell, noted, picky

from diablo_theory.errors import ResultsError, SweepError
from diablo_theory.files import locked
from diablo_theory.sweeps import sweep

#: The first takes longest, so that the order in which they finish is not the order of the tasks.
CELLS = [{"size": 40 + index, "delay": 0.3 / (1 + index)} for index in range(5)]


def noted_tasks(log, names="abcd", **slow):
    return [{"name": name, "log": str(log), "delay": slow.get(name, 0.0)} for name in names]


@pytest.fixture(scope="module")
def expected():
    """The rows of every task in turn, as a loop would make them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [row for task in CELLS for row in cell(task["size"])]
    torch.set_num_threads(before)
    return pd.DataFrame(rows)


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_rows_come_in_the_order_of_the_tasks_and_to_the_bit(tmp_path, expected, jobs, kept):
    folder = tmp_path / "sweep" if kept else None
    assert_frame_equal(sweep(cell, CELLS, jobs=jobs, folder=folder), expected, check_exact=True)
    if kept:  # read back from the folder alone
        assert_frame_equal(sweep(cell, CELLS, folder=folder), expected, check_exact=True)


def test_one_job_runs_here_and_more_in_other_processes(log):
    assert set(sweep(noted, noted_tasks(log))["process"]) == {os.getpid()}
    assert os.getpid() not in set(sweep(noted, noted_tasks(log), jobs=2)["process"])


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_are_kept_and_told_as_they_finish(tmp_path, log, jobs):
    told, kept = [], []

    def progress(finished, total):
        told.append((finished, total))
        kept.append({path.stem for path in (tmp_path / "sweep" / "tasks").glob("*.json")})

    sweep(noted, noted_tasks(log, a=0.5), folder=tmp_path / "sweep", jobs=jobs, progress=progress)
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(names) for names in kept] == [0, 1, 2, 3, 4]
    assert ("000000" in kept[3]) == (jobs == 1)  # side by side, the slow first task is the last to come


def test_a_restarted_sweep_computes_only_what_is_not_done(tmp_path, log):
    def interrupt(finished, total):
        if finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(noted, noted_tasks(log), folder=tmp_path / "sweep", progress=interrupt)
    assert calls_of(log) == {"a": 1, "b": 1}
    told = []
    again = functools.partial(sweep, noted, noted_tasks(log), folder=tmp_path / "sweep", jobs=2)
    table = again(progress=lambda finished, total: told.append(finished))
    assert told == [2, 3, 4]
    assert list(table["name"]) == list("abcd")
    assert calls_of(log) == dict.fromkeys("abcd", 1)
    (tmp_path / "sweep" / "tasks" / "000002.json").write_text('{"rows": [')
    with pytest.warns(RuntimeWarning, match=r"000002\.json is damaged"):
        assert list(again()["name"]) == list("abcd")
    assert calls_of(log) == {"a": 1, "b": 1, "c": 2, "d": 1}


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_others_finish_before_a_failure_is_told(tmp_path, jobs):
    values = ["fails", 1, "nan", 2]
    with pytest.raises(SweepError) as caught:
        sweep(picky, [{"value": value} for value in values], folder=tmp_path, jobs=jobs)
    assert str(caught.value).splitlines() == [
        "2 of 4 tasks of sweep_tasks.picky failed:",
        "  {'value': 'fails'}: ZeroDivisionError: by nought",
        "  {'value': 'nan'}: NonFiniteError: column 'value' is nan; every number must be finite",
        f"The others are kept in {tmp_path}: the same sweep again computes these only.",
    ]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert sorted(path.stem for path in (tmp_path / "tasks").iterdir()) == ["000001", "000003"]


def test_a_long_list_of_failures_is_cut_short():
    with pytest.raises(SweepError, match="7 of 7 tasks") as caught:
        sweep(picky, [{"value": "none"}] * 7)
    assert len(str(caught.value).splitlines()) == 1 + 5 + 1
    assert str(caught.value).endswith("  and 2 more")


def test_a_killed_task_is_named_and_the_others_are_kept(tmp_path, log):
    tasks = noted_tasks(log, names="abc")
    tasks[1]["deaths"] = 99
    with pytest.raises(SweepError, match=r"1 of 3 tasks .*\n  {'name': 'b'.*WorkerDiedError: the workers that ran it"):
        sweep(noted, tasks, folder=tmp_path / "sweep", jobs=2, attempts=1)
    assert sorted(path.stem for path in (tmp_path / "sweep" / "tasks").iterdir()) == ["000000", "000002"]
    assert calls_of(log)["b"] == 2  # even at one attempt, alone once more: the first death might have been another's


def test_an_interrupted_task_ends_the_sweep_and_keeps_what_is_done(tmp_path):
    values = [1, "interrupted", 2]
    with pytest.raises(KeyboardInterrupt):
        sweep(picky, [{"value": value} for value in values], folder=tmp_path)
    assert [path.stem for path in (tmp_path / "tasks").iterdir()] == ["000000"]


def test_the_folder_of_another_sweep_or_process_is_refused(tmp_path):
    sweep(picky, [{"value": 1}], folder=tmp_path)
    with pytest.raises(ResultsError, match=r"holds a sweep of sweep_tasks\.picky, not of sweep_tasks\.cell"):
        sweep(cell, [{"size": 2}], folder=tmp_path)
    with locked(tmp_path), pytest.raises(ResultsError, match="another process is at work"):
        sweep(picky, [{"value": 1}], folder=tmp_path)
    assert list(sweep(picky, [{"value": 1}], folder=tmp_path)["value"]) == [1]


@pytest.mark.parametrize("function", [lambda value: [], functools.partial(picky, value=1)])
def test_a_function_that_workers_cannot_import_is_refused(function):
    with pytest.raises(ValueError, match="function must be one that a module defines"):
        sweep(function, [{"value": 1}])


@pytest.mark.parametrize("task", [{"a": (1, 2)}, {"a": float("nan")}, {1: 1}, {"a": torch.ones(2)}, [1]])
def test_a_task_that_json_would_change_is_refused(task):
    with pytest.raises(TypeError, match="tasks must be plain JSON"):
        sweep(picky, [{"value": 1}, task])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks must hold at least one task, got none"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"jobs": 2, "cluster": "tcp://host:1"}, "jobs must be left at 1 with a cluster"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sweep(**{"function": picky, "tasks": [{"value": 1}]} | options)
