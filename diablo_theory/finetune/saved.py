"""What a run has noted of itself for its own next attempt, read back: it may be damaged, edited or newer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo_theory.errors import ConfigError, ResultsError
from diablo_theory.files import AGAIN, read_json
from diablo_theory.finetune.config import RunConfig, validated

#: For a file that says what a run is: without it nobody knows.
PUT_BACK = "Put back what was there, or choose another folder."


def read_config(path: Path) -> RunConfig:
    """The configuration that a run was begun with.

    Raises:
        ResultsError: If it is damaged, or not one of this version.
    """
    found = read_json(path, PUT_BACK)
    try:
        return validated(found)
    except ConfigError as error:
        raise ResultsError(f"{path} was edited, or is of another version: {error}") from None


def read_failure(path: Path) -> str:
    """Why training has diverged.

    Raises:
        ResultsError: If the file is damaged.
    """
    return str(read_json(path).get("error", f"{path} does not say why"))


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The environments of a run's attempts so far.

    Raises:
        ResultsError: If they are damaged, or lack what is read of them.
    """
    attempts: list[dict[str, Any]] = read_json(path).get("attempts", [])
    whole = isinstance(attempts, list) and all(isinstance(each, dict) for each in attempts)
    if not whole or any(name not in each for each in attempts for name in ("commit", "dirty")):
        raise ResultsError(f"{path}: attempts must each have commit and dirty. {AGAIN}")
    return attempts
