"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diablo_theory import __version__
from diablo_theory.errors import DiabloTheoryError

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
console = Console()
INTERRUPTED = 130  # what shells report for Ctrl-C

Out = Annotated[Path, typer.Option("--out", help="Results folder; an unfinished one is continued.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any key of experiments/defaults.yaml, such as `steps=100`."),
]


def _version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options before the command."""


@app.command()
def reproduce(
    overrides: Overrides = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 3 minutes: 20 training steps, 200 problems.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Overnight: learning-rate search, three seeds, a second task (docstrings).")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Results folder (default: results/PROFILE).")] = None,
) -> None:
    """Check the theory, fine-tune a real model four ways, and write figures, tables and a report.

    Without an option at most 10 minutes on two CPU cores; a GPU is used when there is one. Stopped and started again,
    it goes on where it was.

    Exits with 1 when a verdict or a run fails.

    Example: `diablo-theory reproduce --quick`
    """
    if quick and full:
        raise typer.BadParameter("choose one of --quick and --full")
    from diablo_theory.finetune.config import parse_overrides
    from diablo_theory.progress import Board
    from diablo_theory.reproduce import Reproduction

    profile = "quick" if quick else "full" if full else "default"
    out = out or Path("results") / profile
    reproduction = Reproduction(out, profile, parse_overrides(overrides or []))
    page = reproduction.run(lambda expected: Board(console, expected))
    passed = _show(out, page)
    for failure in reproduction.failures:
        console.print(f"[bold red]failed:[/bold red] {failure}", highlight=False)
    if reproduction.failures or not passed:
        raise typer.Exit(1)


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECK]...", help="Such as `L2 S1`; all checks without one.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Random instances of each check.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Where all random draws come from.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Also write every verdict to this file.")] = None,
) -> None:
    """Check the theory on random problems, each claim beside a control that must fail.

    Exits with 1 when a verdict fails: a claim that does not hold, or a control that does.

    Example: `diablo-theory verify L2 S1 --trials 20`
    """
    from diablo_theory.files import write_with
    from diablo_theory.reporting.report import verdict_table
    from diablo_theory.theory.checks import CHECKS, run_checks

    with console.status("checking") as status:
        verdicts = run_checks(names or None, trials, seed, progress=status.update)
    if csv is not None:
        write_with(csv, lambda path: verdicts.to_csv(path, index=False))
    console.print(verdict_table(verdicts))
    for name in dict.fromkeys(verdicts["check"]):
        console.print(f"[bold]{name}[/bold] {CHECKS[name].statement}", highlight=False)
    console.print(
        "A claim passes when premise and statement hold; a control breaks the premise, and passes when neither does."
    )
    if not verdicts["passed"].all():
        raise typer.Exit(1)


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="FILE", help="Such as experiments/word_problems/diablo.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder (default: results/runs/TASK-FILE).")] = None,
) -> None:
    """Train and evaluate one run: a file that says how it differs from experiments/defaults.yaml.

    The folder gets config.json, log.csv (loss and gradient norms), items.csv (every prediction), metrics.json and the
    trained parameters. Stopped and started again, it goes on from the last checkpoint.

    Example: `diablo-theory train experiments/word_problems/lora.yaml learning_rate=1e-3 steps=30`
    """
    from diablo_theory.finetune.config import load_run
    from diablo_theory.finetune.runs import execute
    from diablo_theory.progress import Board

    config = load_run(run_file, overrides or [])
    folder = out or Path("results") / "runs" / f"{config.task}-{run_file.stem}"
    metrics = execute(config, folder, Board(console))
    console.print(
        f"{metrics['label']}: exact match {100 * metrics['exact']:.1f}% of {metrics['n_test']} {config.eval_split} "
        f"problems, {metrics['loss_per_token']:.4f} nats per answer token; {metrics['trainable_params']:,} trainable "
        f"parameters ({metrics['trainable_pct']:.2f}%). In {folder}",
        highlight=False,
    )


@app.command()
def tune(
    task: Annotated[str, typer.Argument(help="word_problems or docstrings.")],
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "full,lora,diablo",
    grid: Annotated[str, typer.Option(help="Comma-separated learning rates; empty for the standard seven.")] = "",
    out: Out = Path("results/default"),
) -> None:
    """Choose learning rates: every method over the same grid, by loss on validation problems.

    Writes learning_rates.csv, which the report of that folder then shows, and keeps every run. Stopped and started
    again, finished runs are not done again.

    Example: `diablo-theory tune word_problems --methods diablo --grid 3e-3,1e-2,3e-2 steps=40`
    """
    from diablo_theory import tune as tuning
    from diablo_theory.errors import ConfigError, nearest
    from diablo_theory.finetune.config import parse_overrides
    from diablo_theory.finetune.tasks import TASKS
    from diablo_theory.methods import GRADIENT_GROUPS
    from diablo_theory.progress import Board
    from diablo_theory.reporting.report import learning_rate_table

    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}.{nearest(task, TASKS)}")
    known = [name for name in GRADIENT_GROUPS if name != "none"]
    chosen = [name for name in known if name in methods.split(",")]
    if unknown := [name for name in methods.split(",") if name not in known]:
        raise ConfigError(f"unknown method {unknown[0]!r}.{nearest(unknown[0], known)}")
    try:
        rates = [float(rate) for rate in grid.split(",")] if grid else list(tuning.GRID)
    except ValueError:
        raise ConfigError(f"--grid must be comma-separated numbers, got {grid!r}") from None
    rows = tuning.tune(task, chosen, rates, parse_overrides(overrides or []), out, Board(console))
    console.print(learning_rate_table(rows))


@app.command()
def report(out: Out = Path("results/default")) -> None:
    """Write figures, tables and the report again from saved results; nothing is trained.

    Example: `diablo-theory report --out results/quick`
    """
    from diablo_theory.reporting.report import write_report

    with console.status("drawing figures"):
        page = write_report(out)
    if not _show(out, page):
        raise typer.Exit(1)


def _show(out: Path, page: Path) -> bool:
    """Print the summary; whether every verdict passed."""
    from diablo_theory.reporting.report import summary
    from diablo_theory.reporting.results import collect

    data = collect(out)
    console.print()
    console.print(summary(data))
    console.print(f"\nReport: [bold]{page}[/bold]", highlight=False, soft_wrap=True)
    return data.verdicts.empty or bool(data.verdicts["passed"].all())


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
            _fail("stopped. Run the same command again: it goes on from the last finished piece.", INTERRUPTED)
        raise
    except DiabloTheoryError as error:
        _fail(str(error), 1)
    except OSError as error:
        what = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
        _fail(f"{what}. Nothing that was whole is lost: mend it and run the same command again.", 1)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(f"[bold red]error:[/bold red] {message}", highlight=False, soft_wrap=True)
    sys.exit(code)
