"""Checkpoints that count: sealed when everything in them has reached the disk, and as long as it is all there."""

from __future__ import annotations

from pathlib import Path

from diablo_theory.files import fsync, read_json, write_json

#: Written last into a checkpoint; a folder without it is half-written.
SEAL = "complete.json"


def seal(folder: Path, step: int) -> None:
    """Say that a checkpoint is whole: after which step, and how many bytes its files have."""
    files = sorted(filter(Path.is_file, folder.rglob("*")))
    for file in files:
        fsync(file)
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    write_json(folder / SEAL, {"step": step, "files": sizes})


def last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written to its end and has lost nothing since, or None.

    A Trainer that misses the optimizer's file would go on without a word, and to other numbers.

    Raises:
        ResultsError: If a seal is damaged.
    """
    whole = [file.parent for file in checkpoints.glob(f"checkpoint-*/{SEAL}") if _is_whole(file)]
    return max(whole, key=_step, default=None)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _is_whole(file: Path) -> bool:
    said, folder = read_json(file), file.parent
    sizes = said.get("files", {})  # earlier versions wrote the step alone
    if folder.name != f"checkpoint-{said.get('step')}" or not folder.name.rpartition("-")[2].isdecimal():
        return False
    return isinstance(sizes, dict) and all(_has_size(folder / name, size) for name, size in sizes.items())


def _has_size(file: Path, size: object) -> bool:
    return file.is_file() and file.stat().st_size == size
