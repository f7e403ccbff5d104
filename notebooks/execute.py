"""Run notebooks from top to bottom and keep what they print and draw: `make notebooks`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from diablo_theory.files import write_with

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> None:
    """Execute the named notebooks in place, or all beside this file; a failing cell leaves its file as it was."""
    for path in map(Path, names) if names else sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        # Times of execution would change the file at every run.
        NotebookClient(
            notebook, timeout=300, record_timing=False, resources={"metadata": {"path": str(HERE)}}
        ).execute()
        write_with(path, partial(nbformat.write, notebook))
        print(f"ran {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
