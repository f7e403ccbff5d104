import json
import math
import os
import stat
import threading
from pathlib import Path

import filelock
import pytest

from diablo_theory import files
from diablo_theory.errors import ResultsError


class DiskFullError(OSError):
    pass


def test_a_file_appears_with_its_folders_and_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "deep" / "a.txt"
    files.write_text(path, "Grüße\n")
    assert path.read_text(encoding="utf-8") == "Grüße\n"
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    assert os.listdir(path.parent) == ["a.txt"]


def test_nothing_stands_at_the_path_until_the_block_ends(tmp_path):
    path = tmp_path / "a.csv"
    with files.atomic_path(path) as aside:
        aside.write_text("x")
        assert aside.suffix == ".csv"
        assert aside.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "x"


@pytest.mark.parametrize("error", [DiskFullError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_then_fail():
        with files.atomic_path(path) as aside:
            aside.write_text("half of the n")
            raise error

    with pytest.raises(error):
        write_then_fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_rename_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(handle):
        raise DiskFullError

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskFullError):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "stale").touch()
    with files.atomic_folder(path) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "b.txt").write_text("b")
        assert (path / "stale").exists()
    assert sorted(p.name for p in path.rglob("*")) == ["b.txt", "deep"]
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [DiskFullError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_leaves_the_old_folder_and_no_other(tmp_path, error, existed):
    path = tmp_path / "run"
    if existed:
        path.mkdir()
        (path / "old").write_text("old")

    def fill_then_fail():
        with files.atomic_folder(path) as aside:
            (aside / "new").write_text("half")
            raise error

    with pytest.raises(error):
        fill_then_fail()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == (
        ["run", "run/old"] if existed else []
    )


def test_json_keeps_the_order_of_keys_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": [1.5, None]})
    assert list(json.loads(path.read_text())) == ["b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"b": math.nan})
    assert json.loads(path.read_text()) == {"b": 1, "a": [1.5, None]}


@pytest.mark.parametrize("text", [b"{", b"\xff", b"", b"[" * 5000])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(
        ResultsError, match=r"a\.json is truncated or damaged \(.*\)\. Delete it and run the same command"
    ):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(ResultsError, match=r"a\.json is truncated or damaged \(.*\)\. Ask\.$"):
        files.read_json(tmp_path / "a.json", "Ask.")
    (tmp_path / "a.safetensors").write_bytes(text)
    with pytest.raises(ResultsError, match=r"a\.safetensors is truncated or damaged \(.*\)\. Ask\.$"):
        files.read_tensors(tmp_path / "a.safetensors", "Ask.")


def test_write_with_passes_a_path_of_the_same_suffix(tmp_path):
    path = tmp_path / "a.npz"
    files.write_with(path, lambda aside: aside.write_bytes(aside.suffix.encode()))
    assert path.read_bytes() == b".npz"


def test_a_folder_is_held_by_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    folder = tmp_path / "new" / "results"
    for _ in range(2):  # free again after the first
        with files.locked(folder), pytest.raises(ResultsError, match=f"another process is at work in {folder}"):
            files.locked(folder).__enter__()


def test_who_asks_whether_a_folder_is_held_does_not_keep_it_from_others(tmp_path):
    asking = filelock.FileLock(tmp_path / files.LOCK, thread_local=False)
    asking.acquire()
    threading.Timer(0.2, asking.release).start()
    with files.locked(tmp_path):
        assert not asking.is_locked
        assert files.is_held(tmp_path)
    assert not files.is_held(tmp_path)


def test_asking_whether_a_folder_is_held_writes_nothing_there(tmp_path):
    assert not files.is_held(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_lock_that_may_not_be_tried_is_no_reason_to_fail(tmp_path, monkeypatch):
    (tmp_path / files.LOCK).touch()

    def refuse(self, timeout):
        raise PermissionError

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert not files.is_held(tmp_path)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DIABLO_THEORY_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/diablo_theory"),
        ({"HOME": "/home/me"}, "/home/me/.cache/diablo_theory"),
    ],
)
def test_cache_folder(monkeypatch, variables, expected):
    for name in ("DIABLO_THEORY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.cache_folder() == Path(expected)
