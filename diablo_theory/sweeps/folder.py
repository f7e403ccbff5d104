"""The folder of a sweep: what it is of, and one small file for every finished task."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diablo_theory import __version__, files
from diablo_theory.errors import ResultsError
from diablo_theory.sweeps.task import Row


class SweepFolder:
    """The finished tasks of one sweep on the disk. Whoever uses it holds the folder's lock.

    Args:
        folder: Where; it exists.
        function: Qualified name of the function.
        tasks: All tasks of the sweep, plain JSON.

    Raises:
        ResultsError: If the folder belongs to another sweep. It is left as it is.
    """

    def __init__(self, folder: Path, function: str, tasks: Sequence[dict[str, Any]]) -> None:
        self._folder = folder
        self._parts = folder / "tasks"
        self._tasks = tasks
        self._origin = {"function": function, "package_version": __version__}
        self._claim()
        for place in (folder, self._parts):
            files.remove_partial(place)

    def _claim(self) -> None:
        path = self._folder / "sweep.json"
        ours = self._origin | {"tasks": list(self._tasks)}
        if not path.is_file():
            files.write_json(path, ours)
            return
        found = files.read_json(path)
        differences = {
            "function": f"a sweep of {found.get('function')}, not of {ours['function']}",
            "package_version": f"a sweep of version {found.get('package_version')}; this is {__version__}",
            "tasks": "a sweep over other tasks",
        }
        for key, difference in differences.items():
            if not _same(found.get(key), ours[key]):
                raise ResultsError(
                    f"{self._folder} holds {difference}. Choose another folder, or move this one away; it was left as "
                    "it is."
                )

    def finished(self) -> dict[int, list[Row]]:
        """Rows of every task that an earlier attempt finished, by its place in the sweep.

        A file that is damaged or of another sweep counts as not written, with a warning.
        """
        done = {}
        for index in range(len(self._tasks)):
            rows = self._read(index)
            if rows is not None:
                done[index] = rows
        return done

    def _read(self, index: int) -> list[Row] | None:
        path = self._part(index)
        if not path.is_file():
            return None
        part: dict[str, Any] = {}
        with contextlib.suppress(ResultsError):
            part = files.read_json(path)
        rows = part.pop("rows", None)
        if isinstance(rows, list) and _same(part, self._header(index)):
            return rows
        warnings.warn(
            f"{path} is damaged or of another sweep: its task is computed again", RuntimeWarning, stacklevel=2
        )
        return None

    def keep(self, index: int, rows: list[Row]) -> None:
        """Write a finished task, whole or not at all."""
        files.write_json(self._part(index), self._header(index) | {"rows": rows})

    def _header(self, index: int) -> dict[str, Any]:
        return self._origin | {"task": self._tasks[index]}

    def _part(self, index: int) -> Path:
        return self._parts / f"{index:06d}.json"


def _same(one: object, other: object) -> bool:
    """Whether two values are the same JSON; for Python 1, 1.0 and True would be equal."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
