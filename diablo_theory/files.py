"""Files that appear whole or not at all: written aside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from diablo_theory.errors import ConfigError, ResultsError

if TYPE_CHECKING:
    from torch import Tensor

#: How the names of files and folders begin that are not whole yet.
PARTIAL = ".partial-"
#: What to do with a damaged file that is made again.
AGAIN = "Delete it and run the same command again."
#: The file whose lock holds a folder, and seconds to wait for it: who only asks has it for a moment.
LOCK, PATIENCE = ".lock", 2.0


def cache_folder() -> Path:
    """``$DIABLO_THEORY_CACHE``, or ``diablo_theory`` in the user's cache folder."""
    if chosen := os.environ.get("DIABLO_THEORY_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "diablo_theory"


def paper_results() -> Path | None:
    """The repository's folder of published and saved results; None where the package is installed without it."""
    folder = Path(__file__).resolve().parents[1] / "paper_results"
    return folder if (folder / "claims.yaml").is_file() else None


def experiments_folder() -> Path:
    """The folder of run files: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "experiments", package / "experiments"):
        if (folder / "defaults.yaml").is_file():
            return folder
    raise ConfigError(f"experiments/defaults.yaml is missing beside {package}: reinstall or repair the checkout")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process while the block lasts; it is made if need be.

    Raises:
        ResultsError: If another process holds it, and goes on doing so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout:
        raise ResultsError(f"another process is at work in {folder}: wait for it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder; nothing is written where none ever did."""
    if not (folder / LOCK).is_file():
        return False
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except PermissionError:  # somebody else's folder, to be read and no more: their lock cannot be tried
        return False
    lock.release()
    return False


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder. The caller holds the lock of that folder."""
    for left in folder.glob(f"{PARTIAL}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush one file or directory to the disk, so that a power cut cannot undo a rename that follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place when the block ends without an error.

    Args:
        path: The final file. Its parent folders are made if need be.

    Yields:
        A path with the same suffix, to be written by the caller. If the caller fails (a full disk, Ctrl-C), it is
        removed and whatever stood at ``path`` before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=PARTIAL, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o666 & ~_umask())  # mkstemp makes files private; ours are ordinary ones
        fsync(aside)
        aside.replace(path)
        fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; move it into place when the block ends without an error.

    Args:
        path: The final folder. It is replaced if it exists (an unfinished or outdated one).

    Yields:
        The folder to fill. If the caller fails, it is removed with its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        for file in aside.rglob("*"):
            fsync(file)
        if path.exists():
            shutil.rmtree(path)
        aside.replace(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON (indented, keys in the given order, NaN refused), whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """A file that holds one JSON object.

    Args:
        path: The file.
        advice: What to do if it is damaged.

    Raises:
        ResultsError: If it does not; the message says which file and what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # too much nesting is damage, too
        raise ResultsError(f"{path} is truncated or damaged ({error}). {advice}") from error
    if not isinstance(value, dict):
        raise ResultsError(f"{path} holds a {type(value).__name__}; a JSON object is needed. {advice}")
    return value


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` (such as ``frame.to_csv``) produce a file, whole or not at all."""
    with atomic_path(path) as aside:
        write(aside)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: If it cannot be written, a full disk for one; safetensors has an error of its own for that.
    """
    import safetensors.torch

    with atomic_path(path) as aside:
        try:
            safetensors.torch.save_file(tensors, aside, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, f"could not be written ({error})", str(path)) from error


def read_tensors(path: Path, advice: str = AGAIN) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: The file.
        advice: What to do if it is damaged.

    Raises:
        ResultsError: If it is damaged.
    """
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ResultsError(f"{path} is truncated or damaged ({error}). {advice}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
