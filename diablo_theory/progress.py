"""What is being done, how far it is and how long it will take: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


def clock(seconds: float) -> str:
    """``75`` as ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Board:
    """Shows pieces of work one after another, with an estimate for all that is left.

    Args:
        console: Where to write.
        expected: Seconds that each stage is expected to take on the reference machine, by stage name, for the estimate
            of the whole; it is corrected by how fast the finished stages were.
    """

    def __init__(self, console: Console, expected: dict[str, float] | None = None) -> None:
        self._console = console
        self._expected = dict(expected or {})
        self._spent = self._planned = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the pipeline: a heading with the estimate, then its pieces."""
        left = sum(self._expected.values())
        if self._planned > 0.1 * (self._planned + left):  # a few short stages say nothing about the machine's speed
            left *= self._spent / self._planned
        note = f" (about {clock(left)} left in all)" if name in self._expected else ""
        self._print((name, "bold"), (note, "dim"))
        started = time.monotonic()
        yield
        if planned := self._expected.pop(name, 0.0):
            self._spent += time.monotonic() - started
            self._planned += planned

    def skip(self, name: str) -> None:
        """A stage that an earlier attempt finished."""
        self._expected.pop(name, None)
        self._print((name, "bold"), (" (finished before)", "dim"))

    def _print(self, *parts: tuple[str, str]) -> None:
        # Names and texts may hold brackets, which are no markup.
        self._console.print(Text.assemble(*parts))

    @contextmanager
    def piece(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of ``total`` units; yields what to call with each number of finished units."""
        started = time.monotonic()
        bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task(text, total=total)
            yield lambda units: bar.advance(task, units)
        self._print((f"  {text} ", ""), (clock(time.monotonic() - started), "dim"))
