"""The notebooks run from top to bottom, within their time, and their assertions hold."""

import errno
import runpy
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LIMIT = 120  # seconds, on two cores
NEEDS_MODEL = {"4_a_real_model"}
NOTEBOOKS = [
    pytest.param(path, marks=pytest.mark.model if path.stem in NEEDS_MODEL else pytest.mark.slow, id=path.stem)
    for path in sorted(FOLDER.glob("*.ipynb"))
]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs_within_its_time(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.monotonic() - started < LIMIT


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_is_saved_was_run_and_ends_in_assertions(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert "assert " in cells[-1].source


def test_a_notebook_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), path)
    before = path.read_bytes()

    def full(notebook, place):
        Path(place).write_text("half of a noteb")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NotebookClient, "execute", lambda self: None)
    monkeypatch.setattr(nbformat, "write", full)
    with pytest.raises(OSError, match="No space left"):
        runpy.run_path(str(FOLDER / "execute.py"))["main"]([str(path)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_there_are_four():
    assert len(list(FOLDER.glob("*.ipynb"))) == 4
