"""The kinds of error that a user can meet, so that the command line can print them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class DiabloTheoryError(Exception):
    """An expected failure: its message says what went wrong and what to do, and nothing on disk was harmed."""


class ConfigError(DiabloTheoryError, ValueError):
    """A configuration file, key or value that cannot be used."""


class ModelUnavailableError(DiabloTheoryError, OSError):
    """A pretrained model that is neither in the cache nor to be had from where the user pointed."""


class DataUnavailableError(DiabloTheoryError, OSError):
    """A data set that is neither in the folder that the user gave nor to be had from where it is published."""


class ChecksumError(ModelUnavailableError):
    """A download whose bytes are not the published ones."""


class NonFiniteError(DiabloTheoryError, ArithmeticError):
    """A NaN or an infinity in a loss, a gradient or a theory problem."""


class ResultsError(DiabloTheoryError, ValueError):
    """A results folder that this version cannot continue or read."""


class SweepError(DiabloTheoryError, RuntimeError):
    """Tasks of a sweep that failed, or a cluster that cannot be used."""


class WorkerDiedError(SweepError):
    """A process that ended in the middle of a task: killed, out of memory, or crashed in native code."""


class SandboxError(DiabloTheoryError, RuntimeError):
    """Generated code that could not be run at all, which says nothing about whether it is right."""


def nearest(name: str, known: Iterable[str], within: str = "") -> str:
    """Say which known name a misspelt one is closest to.

    Args:
        name: What the user wrote.
        known: The names that would have been accepted.
        within: What the user writes before such a name, as the ``quantise.`` of ``quantise.bits``.

    Returns:
        ``" Did you mean 'x'?"`` (with its leading space), the list of known names when none is close, or nothing when
        there is none.
    """
    if not (options := sorted(known)):
        return ""
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" Did you mean {within + close[0]!r}?" if close else f" Known: {', '.join(options)}."


def brief(error: BaseException) -> str:
    """What another library's error says, in a line: its first one, and the next where that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    sentence = isinstance(error, OSError | ValueError)  # the message of others is hardly one
    return said if sentence else f"{type(error).__name__}: {said.rstrip('.')}."


def refusal(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first thing that pydantic has found wrong, in the words of who writes YAML or JSON.

    Args:
        error: What it has found.
        model: What it was to be; an unknown key is told with the nearest known one of the same part.
    """
    problems = error.errors()
    # A misspelt key is missing as well: what was written tells more.
    problem = next((one for one in problems if one["type"] == "extra_forbidden"), problems[0])
    where = ".".join(map(str, problem["loc"]))
    if not where:  # keys that do not fit together
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "extra_forbidden":
        *within, name = map(str, problem["loc"])
        hint = nearest(name, _fields(model, within), "".join(f"{part}." for part in within))
        return f"unknown key {where!r}" + (f".{hint}" if hint else "")
    said = problem["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    return f"{where}={problem['input']!r:.200} is not allowed: {said}"


def _fields(model: type[BaseModel] | None, within: Iterable[str]) -> set[str]:
    """Names of the keys at a place; none where it is not known which model stands there."""
    models = [] if model is None else [model]
    for name in within:
        if tagged := [one for one in models if _is_tagged(one, name)]:
            models = tagged
        elif not name.isdecimal():  # the place in a list says nothing of what is in it
            fields = [one.model_fields[name] for one in models if name in one.model_fields]
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return {name for one in models for name in one.model_fields}


def _is_tagged(model: type[BaseModel], name: str) -> bool:
    """Whether a model is the one of a union that pydantic calls by this name: a key of it allows this value alone."""
    return any(get_args(field.annotation) == (name,) for field in model.model_fields.values())


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models in a type: of ``tuple[Part, ...] | None``, Part."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
