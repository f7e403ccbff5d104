"""Many runs in order: what is done is skipped, what fails is noted."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diablo_theory.errors import ConfigError, DiabloTheoryError, ResultsError, refusal
from diablo_theory.files import locked, write_text
from diablo_theory.finetune.config import (
    RunConfig,
    Scale,
    layers,
    overridden,
    read_run_file,
)
from diablo_theory.finetune.folder import check_owner, finished
from diablo_theory.finetune.runs import execute
from diablo_theory.finetune.setup import Board
from diablo_theory.reading import read_yaml
from diablo_theory.records import ERROR

#: Bytes of a name in usual file systems.
LONGEST_NAME = 255


class Part(BaseModel):
    """Some run files, each with every combination of some values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: tuple[Path, ...] = Field(min_length=1)
    set: dict[str, Any] = {}
    vary: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}


class SweepFile(BaseModel):
    """A file that names many runs: ``parts`` in their order, all at one scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Scale = "full"
    parts: tuple[Part, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Planned:
    """A run of a sweep: its folder below the sweep's, and its configuration."""

    name: str
    config: RunConfig


@dataclass(frozen=True)
class Outcome:
    """How a run of a sweep ended: ``finished`` now, ``before``, or ``failed``.

    On a cluster: ``submitted``, or with an earlier job still ``queued`` or ``running``.
    """

    name: str
    state: str
    note: str = ""


class SweepBoard(Board, Protocol):
    """Where the progress of several runs is shown."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Show a heading for the block."""

    def skip(self, name: str) -> None:
        """Show that a run was finished before."""


def is_sweep(path: Path) -> bool:
    """Whether a YAML file names runs, rather than being one."""
    return "parts" in read_yaml(path)


def read_sweep(path: Path) -> SweepFile:
    """A sweep from its file.

    Raises:
        ConfigError: If it is missing or malformed.
    """
    try:
        return SweepFile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {refusal(error, SweepFile)}") from None


def planned(sweep: SweepFile, overrides: Mapping[str, Any] | None = None) -> list[Planned]:
    """All runs of a sweep, checked before the first one starts.

    Args:
        sweep: What to run; files are found from the working folder or below ``experiments/``.
        overrides: Keys over every file's.

    Raises:
        ConfigError: If a file, key or value is not allowed, a key is both set and varied, or two runs would share a
            folder.
    """
    runs: dict[str, Planned] = {}
    for part in sweep.parts:
        _require_apart(part.vary, part.set, "its own set")
        _require_apart(part.vary, overrides or {}, "--set")
        for file, values in itertools.product(part.files, _combinations(part.vary)):
            differences = read_run_file(file)
            name = "-".join([f"{differences['suite']}/{file.stem}", *map("{0[0]}={0[1]}".format, values.items())])
            _require_folder_name(name)
            try:
                config = overridden(layers(differences, sweep.scale), {**part.set, **values, **(overrides or {})})
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            if name in runs and runs[name].config != config:
                raise ConfigError(f"two different runs of this sweep are both called {name}: vary what differs")
            runs[name] = Planned(name, config)
    return list(runs.values())


def _require_apart(vary: Iterable[str], fixed: Iterable[str], where: str) -> None:
    """Refuse a key that is set and varied: runs would be named after values that they do not have."""
    for varied, key in itertools.product(vary, fixed):
        if varied == key or varied == key.partition(".")[0] or varied.partition(".")[0] == key:
            raise ConfigError(f"a sweep varies {varied}, and {where} gives {key} one value: leave out one of the two")


def _require_folder_name(name: str) -> None:
    """Refuse a run whose folder would lie outside the sweep's, or cannot be."""
    parts = Path(name).parts
    if ".." in parts or max(len(os.fsencode(part)) for part in parts) > LONGEST_NAME:
        raise ConfigError(
            f"{name:.80} cannot be the name of a run's folder (no '..', at most {LONGEST_NAME} bytes): give what it "
            "varies in a run file of its own"
        )


def _combinations(vary: Mapping[str, Sequence[Any]]) -> Iterable[dict[str, Any]]:
    for values in itertools.product(*vary.values()):
        yield dict(zip(vary, values, strict=True))


def run_all(runs: Sequence[Planned], out: Path, board: SweepBoard) -> list[Outcome]:
    """Do runs one after another.

    One that fails is noted, also in its folder, and the next one starts; only Ctrl-C and a full disk end the sweep.

    Args:
        runs: From :func:`planned`.
        out: Run ``name`` goes into ``out / name``.
        board: Shows progress.
    """
    headings = [f"{place}/{len(runs)} {run.name}" for place, run in enumerate(runs, start=1)]
    return [
        guarded(run, out / run.name, partial(_do, run, out / run.name, heading, board))
        for run, heading in zip(runs, headings, strict=True)
    ]


def _do(run: Planned, folder: Path, heading: str, board: SweepBoard) -> Outcome:
    if was_finished(run, folder):
        board.skip(run.name)
        return Outcome(run.name, "before")
    with board.stage(heading):
        execute(run.config, folder, board)
    return Outcome(run.name, "finished")


def was_finished(run: Planned, folder: Path) -> bool:
    """Whether a folder holds this run, finished.

    Raises:
        ResultsError: If it belongs to another run, or is damaged.
    """
    check_owner(folder, run.config)
    return finished(folder) is not None


def guarded(run: Planned, folder: Path, work: Callable[[], Outcome]) -> Outcome:
    """What some work on a run comes to; an error that says nothing about other runs is noted in the run's folder."""
    try:
        return work()
    except DiabloTheoryError as error:
        told = noted = str(error)
    except OSError:
        raise  # no space, no permission: the next run would meet it too
    except Exception as error:  # out of memory, a bug: the others do not depend on it
        told = traceback.format_exc()
        noted = f"{''.join(traceback.format_exception_only(error))}\n{told}"
    with suppress(ResultsError):  # the folder is another run's, or another process is at work in it
        check_owner(folder, run.config)
        with locked(folder):
            write_text(folder / ERROR, noted)
    return Outcome(run.name, "failed", told)
