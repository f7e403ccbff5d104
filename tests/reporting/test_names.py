"""The names that claims and tables may use are those of the rooms that they are of."""

from pathlib import Path
from typing import get_args

import pytest

from diablo_theory import bench
from diablo_theory.errors import ResultsError
from diablo_theory.finetune.tasks import TASKS
from diablo_theory.methods import Method
from diablo_theory.reading import read_yaml
from diablo_theory.reporting import names
from diablo_theory.reporting.overview import SUITES
from diablo_theory.reporting.tables import TASK_NAMES
from diablo_theory.theory.checks import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (names.METHODS, get_args(Method)),
        (names.TASKS, [name for name, task in TASKS.items() if task.metrics]),
        (names.CHECKS, CHECKS),
        (names.CONTENDERS, bench.METHODS),
        (names.PROFILES, read_yaml(ROOT / "experiments" / "reproduce.yaml")),
    ],
)
def test_a_name_is_here_if_it_is_there(here, there):
    assert sorted(here) == sorted(there)


def test_suites_of_runs_are_folders_of_run_files():
    assert {"commonsense", "word_problems", "patterns"} <= set(names.suites())
    assert all(list((ROOT / "experiments" / suite).glob("*.yaml")) for suite in names.suites())
    assert "sweeps" not in names.suites()


def test_every_published_suite_has_a_place_in_the_report():
    shown = {suite for published, _ in SUITES.values() for suite in published}
    assert shown | {"parameters"} == set(names.PUBLISHED)  # parameters stand beside true counts


def test_what_readers_call_a_task_is_of_one_that_there_is():
    assert set(TASK_NAMES) <= {*names.TASKS, *(table for tables in names.PUBLISHED.values() for table in tables)}


def test_a_name_that_is_none_is_told_with_the_nearest():
    assert names.known("task", "boolq", names.TASKS) == "boolq"
    with pytest.raises(ResultsError, match=r"unknown task 'bolq'\. Did you mean 'boolq'\?"):
        names.known("task", "bolq", names.TASKS)
