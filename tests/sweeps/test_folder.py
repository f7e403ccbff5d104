import json

import pytest

from diablo_theory.errors import ResultsError
from diablo_theory.sweeps import folder as folders
from diablo_theory.sweeps.folder import SweepFolder

TASKS = [{"size": 1}, {"size": 2}, {"size": 3}]
ROWS = [{"size": 2, "gap": 0.1}, {"size": 2, "gap": -0.0}]


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_kept_is_found_again(tmp_path):
    SweepFolder(tmp_path, "module.f", TASKS).keep(1, ROWS)
    assert SweepFolder(tmp_path, "module.f", TASKS).finished() == {1: ROWS}
    assert sorted(content(tmp_path)) == ["sweep.json", "tasks/000001.json"]


def test_every_file_says_what_it_is(tmp_path):
    SweepFolder(tmp_path, "module.f", TASKS).keep(1, ROWS)
    part = json.loads((tmp_path / "tasks" / "000001.json").read_text())
    assert part == {"function": "module.f", "package_version": folders.__version__, "task": TASKS[1], "rows": ROWS}


@pytest.mark.parametrize(
    ("function", "tasks", "version", "message"),
    [
        ("module.g", TASKS, "1.0", "holds a sweep of module.f, not of module.g. Choose another folder"),
        ("module.f", TASKS, "2.0", "holds a sweep of version 1.0; this is 2.0"),
        ("module.f", TASKS[:2], "1.0", "holds a sweep over other tasks"),
        ("module.f", [{"size": 1.0}, *TASKS[1:]], "1.0", "holds a sweep over other tasks"),
    ],
)
def test_the_folder_of_another_sweep_is_refused_and_left_alone(
    tmp_path, monkeypatch, function, tasks, version, message
):
    monkeypatch.setattr(folders, "__version__", "1.0")
    SweepFolder(tmp_path, "module.f", TASKS).keep(1, ROWS)
    (tmp_path / ".partial-x").touch()
    before = content(tmp_path)
    monkeypatch.setattr(folders, "__version__", version)
    with pytest.raises(ResultsError, match=message) as caught:
        SweepFolder(tmp_path, function, tasks)
    assert str(tmp_path) in str(caught.value)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace("rows", "columns"),
        lambda text: text.replace("module.f", "module.g"),
        lambda text: text.replace('"task": {\n    "size": 2', '"task": {\n    "size": 3'),
    ],
)
def test_a_damaged_or_foreign_task_counts_as_not_done_and_says_so(tmp_path, damage):
    folder = SweepFolder(tmp_path, "module.f", TASKS)
    folder.keep(0, [])
    folder.keep(1, ROWS)
    path = tmp_path / "tasks" / "000001.json"
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    with pytest.warns(
        RuntimeWarning, match=r"000001\.json is damaged or of another sweep: its task is computed again"
    ):
        assert folder.finished() == {0: []}


def test_what_killed_writers_left_is_removed(tmp_path):
    SweepFolder(tmp_path, "module.f", TASKS).keep(1, ROWS)
    for place in (tmp_path, tmp_path / "tasks"):
        (place / ".partial-left.json").touch()
    SweepFolder(tmp_path, "module.f", TASKS)
    assert sorted(content(tmp_path)) == ["sweep.json", "tasks/000001.json"]
