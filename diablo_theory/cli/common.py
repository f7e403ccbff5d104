"""What all commands share: the application, the console, and how a failure is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from diablo_theory import __version__
from diablo_theory.errors import ConfigError, DiabloTheoryError

Number = TypeVar("Number", int, float)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any key of experiments/defaults.yaml, such as `steps=100`."),
]
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help=(
        "Fine-tuning only the diagonal blocks of weight matrices (DiaBlo): the theory as executable checks, and real "
        "language models trained with it beside LoRA and full fine-tuning.\n\n"
        "Start with `diablo-theory reproduce --quick` (3 minutes on two CPU cores) and open the report it names."
    ),
)
#: What is printed holds paths, error messages and model output: nothing of it is markup or an emoji's name.
console = Console(markup=False, emoji=False)
INTERRUPTED = 130  # what shells report for Ctrl-C


def _version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options before the command."""


@contextmanager
def options_checked(option: str | None = None) -> Iterator[None]:
    """Tell of a value that the library refuses as of a mistake in the options, or in one, without a traceback."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{option}: {error}" if option else str(error)) from error


def require_folder(out: Path | None) -> None:
    """Refuse a --out that is a file before anything is computed for it."""
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder, got the file {out}")


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The values of an option such as ``--blocks 64,16``.

    Raises:
        ConfigError: If one is no number of the kind; the message names the option.
    """
    try:
        return tuple(kind(value) for value in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{option} must be comma-separated {what}, got {text!r}") from None


def say(*parts: str | tuple[str, str]) -> None:
    """Print a line as it is; a part may be a pair of text and style."""
    console.print(Text.assemble(*parts), soft_wrap=True)


def working(text: str) -> Status:
    """A spinner while the block lasts, beside a text as it is."""
    return console.status(Text(text))


def wrote(paths: list[Path]) -> None:
    """Say which files were written."""
    for path in paths:
        say(f"wrote {path}")


def main() -> None:
    """Entry point: expected failures become one message and a non-zero exit."""
    # One run uses one GPU: with several, Trainer would split batches over them and change what a step is.
    if "LOCAL_RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # Every download is explicit and named; nothing is to be asked of a hub behind the user's back.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught the Ctrl-C
            _fail(
                "stopped. What is already written to --out is whole; a run or a sweep started again goes on from it.",
                INTERRUPTED,
            )
        raise
    except DiabloTheoryError as error:
        _fail(str(error), 1)
    except OSError as error:
        what = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
        _fail(f"{what}. Nothing that was whole is lost: mend it and run the same command again.", 1)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    sys.exit(code)
