"""The commands on runs: train, plan, evaluate, sweep, status, show, collect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from diablo_theory.cli.common import Overrides, app, console, require_folder, say

if TYPE_CHECKING:
    from diablo_theory.finetune.sweep import Planned
    from diablo_theory.progress import Board

SCALE = typer.Option(
    help="full: as the file says; small: the same recipe with a small model and a slice of the data (small.yaml)."
)
Scale = Annotated[Literal["small", "full"], SCALE]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, such as results/runs/word_problems/lora.")
]


@app.command()
def train(
    run_file: Annotated[Path, typer.Argument(metavar="FILE", help="Such as experiments/word_problems/diablo.yaml.")],
    overrides: Overrides = None,
    scale: Scale = "full",
    out: Annotated[Path | None, typer.Option("--out", help="Run folder (default: results/runs/SUITE/FILE).")] = None,
) -> None:
    """Train and evaluate one run: a file that says how it differs from experiments/defaults.yaml.

    The folder gets config.json, environment.json, log.csv (loss and gradient norms), the adapter, predictions/ (every
    answer) and metrics.json. Stopped and started again, it goes on from the last checkpoint, to the same numbers.

    Several devices: `accelerate launch --num_processes 4 -m diablo_theory train FILE` (DDP; `--use_fsdp` shards).

    Example: `diablo-theory train experiments/word_problems/lora.yaml learning_rate=1e-3 steps=30`
    """
    from diablo_theory.finetune.config import load_run
    from diablo_theory.finetune.runs import execute

    config = load_run(run_file, overrides or [], scale)
    name = run_file.stem + ("-small" if scale == "small" else "")
    folder = out or Path("results") / "runs" / config.suite / name
    require_folder(out)
    _tell(execute(config, folder, _board()), folder, config.eval_split)


@app.command()
def plan(
    run_file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file.")],
    overrides: Overrides = None,
    scale: Scale = "full",
    device: Annotated[str, typer.Option(help="Such as A100-80GB, H100-80GB, L40, RTX-4090; cpu is measured.")] = (
        "A100-80GB"
    ),
    devices: Annotated[int, typer.Option(min=1, help="How many of them share the run.")] = 1,
    sharding: Annotated[
        Literal["ddp", "fsdp"], typer.Option(help="ddp: each holds the model; fsdp: they divide it.")
    ] = "ddp",
    header: Annotated[bool, typer.Option("--header", help="Only the comment for the head of the run file.")] = False,
) -> None:
    """Say what a run costs before it is started: parameters, operations, memory and time, and how each is computed.

    Counts are exact; times are ranges, from a share of the device's peak rate that is an assumption and stated.

    Example: `diablo-theory plan experiments/commonsense/llama3-8b_diablo.yaml --device H100-80GB`
    """
    from rich.table import Table

    from diablo_theory.finetune import planning
    from diablo_theory.finetune.config import load_run

    config = load_run(run_file, overrides or [], scale)
    found = planning.plan(planning.work_of(config, devices, sharding), device)
    if header:
        print(planning.header(found))
        return
    table = Table("quantity", "value", "how", box=None, pad_edge=False)
    for row in found.table().to_dict("records"):
        table.add_row(*(str(row[key]) for key in ("quantity", "value", "how")))
    console.print(table)


@app.command()
def evaluate(
    run: RunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Where it is done now: data_root, device, eval_batch_size (default: as it was trained).",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Comma-separated; default: those of the run's own configuration.")
    ] = "",
) -> None:
    """Score a trained run on tasks, those of its own file or others.

    What is scored already is not done again. Needs the run's trained parameters (keep_weights). Data that have moved
    since, or that are not on a hub, are named by data_root; other contents than the run's are refused.

    Example: `diablo-theory evaluate results/runs/commonsense/diablo data_root=FOLDER --tasks boolq,arc_easy`
    """
    from diablo_theory.finetune.config import parse_overrides
    from diablo_theory.finetune.folder import state
    from diablo_theory.finetune.runs import add_scores

    elsewhere = parse_overrides(overrides or [])
    metrics = add_scores(run, tasks.split(",") if tasks else [], _board(), elsewhere=elsewhere)
    _tell(metrics, run, state(run)["split"])


@app.command()
def sweep(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Run files, folders of them, or one sweep file (it has `parts`)."),
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key over every file's; repeatable.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=A,B,...", help="A run for each value; repeatable, all combinations."),
    ] = None,
    scale: Annotated[Literal["small", "full"] | None, SCALE] = None,
    out: Annotated[Path, typer.Option("--out", help="Holds a folder a run.")] = Path("results/sweep"),
    cluster: Annotated[
        Literal["slurm", "local"] | None,
        typer.Option(help="Hand the runs to `slurm` by submitit, or one to a process in the background (`local`)."),
    ] = None,
    cluster_options: Annotated[
        list[str] | None,
        typer.Option(
            "--cluster-option",
            metavar="KEY=VALUE",
            help="timeout_min=600 (needed: minutes a job may take), slurm_partition=gpu, ...",
        ),
    ] = None,
    collection: Annotated[
        Path | None,
        typer.Option("--collected", help="Skip what this collection (see collect) holds of the same configuration."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check and list the runs.")] = False,
) -> None:
    """Do many runs in order; finished ones are skipped, and a failing one does not stop the others.

    Files, keys and values are checked before the first run starts, data and models when theirs does. Exits with 1 when
    a run has failed. A sweep may be divided among machines and days: collect what is finished on one, and go on with
    --collected on the next.

    Example: `diablo-theory sweep experiments/word_problems --vary seed=0,1,2 --out results/words`
    """
    from diablo_theory.finetune import sweep as sweeps
    from diablo_theory.finetune.config import parse_overrides

    require_folder(out)
    if cluster_options and cluster is None:
        raise typer.BadParameter("--cluster-option needs --cluster")
    chosen, overrides = _sweep(files, vary or [], scale), parse_overrides(settings or [])
    runs = sweeps.planned(chosen, overrides)
    known = _collected(collection, runs) if collection else set()
    runs = [run for run in runs if run.name not in known]
    if dry_run:
        for run in runs:
            say(f"{run.name}  {run.config.method} on {run.config.train_on}")
        say(f"{len(runs)} runs" + (f", and {len(known)} in {collection}" if collection else ""))
        return
    if cluster is not None:
        from diablo_theory.finetune.cluster import submit

        outcomes = submit(runs, out, cluster, parse_overrides(cluster_options or []))
    else:
        outcomes = sweeps.run_all(runs, out, _board())
    counts = {
        state: sum(o.state == state for o in outcomes)
        for state in ("finished", "before", "submitted", "queued", "running", "failed")
    }
    told = [f"{count} {state}" for state, count in counts.items() if count]
    told += [f"{len(known)} collected before"] if known else []
    say(f"{', '.join(told)}; in {out}")
    for outcome in outcomes:
        if outcome.state == "failed":
            say(("failed:", "bold red"), f" {outcome.name}: {outcome.note}")
    if counts["failed"]:
        raise typer.Exit(1)


def _collected(collection: Path, runs: list[Planned]) -> set[str]:
    from diablo_theory.reporting.joining import collected

    return collected(collection, {run.name: run.config.identity for run in runs})


def _sweep(files: list[Path], vary: list[str], scale: Literal["small", "full"] | None) -> Any:
    from diablo_theory.errors import ConfigError
    from diablo_theory.finetune import sweep as sweeps

    found = [inner for file in files for inner in (sorted(file.glob("*.yaml")) if file.is_dir() else [file])]
    if not found:
        raise ConfigError(f"no run files in {', '.join(map(str, files))}")
    several = [file for file in found if file.is_file() and sweeps.is_sweep(file)]
    if several and len(found) > 1:
        raise ConfigError(
            f"one sweep file at a time, and nothing beside it: {several[0]} is one of the {len(found)} files here"
        )
    if several:
        if vary or scale:
            raise typer.BadParameter("a sweep file says itself what varies and at which scale")
        return sweeps.read_sweep(found[0])
    return sweeps.SweepFile(scale=scale or "full", parts=(sweeps.Part(files=tuple(found), vary=_values(vary)),))


def _values(vary: list[str]) -> dict[str, tuple[Any, ...]]:
    from diablo_theory.errors import ConfigError
    from diablo_theory.finetune.config import parse_overrides

    values: dict[str, tuple[Any, ...]] = {}
    for pair in vary:
        key, equals, several = pair.partition("=")
        if not equals:
            raise ConfigError(f"--vary must read KEY=A,B,..., got {pair!r}")
        if key in values:
            raise ConfigError(f"--vary {key} is given twice: name all its values at once, {key}=A,B,...")
        values[key] = tuple(parse_overrides([f"{key}={value}"])[key] for value in several.split(","))
    return values


@app.command()
def status(
    root: Annotated[Path, typer.Argument(metavar="FOLDER", help="Run folders lie here, at any depth.")] = Path(
        "results"
    ),
) -> None:
    """List the runs below a folder: finished, running, stopped, failed; how far; their scores with 95% intervals.

    Example: `diablo-theory status results/sweep`
    """
    from rich.table import Table

    from diablo_theory.cli.scores import score_lines
    from diablo_theory.errors import ConfigError
    from diablo_theory.finetune.folder import run_folders, state

    folders = run_folders(root)
    if not folders:
        raise ConfigError(f"no runs below {root}")
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "steps", "scores", "minutes"):
        table.add_column(name, overflow="fold")  # names of runs often differ at their end
    states = {folder: state(folder) for folder in folders}
    lines = score_lines({folder: found for folder, found in states.items() if found["metrics"]})
    for folder, found in states.items():
        metrics = found["metrics"]
        minutes = f"{metrics['train_seconds'] / 60:.1f}" if metrics and metrics["train_seconds"] else ""
        scores = lines[folder] if metrics else str(found["note"]).split("\n")[0][:80]
        table.add_row(str(folder.relative_to(root)), found["state"], _steps(found), scores, minutes)
    console.print(table)


def _steps(found: dict[str, Any]) -> str:
    """``3/60``, with a question mark for what is not known."""
    return "/".join("?" if found[key] is None else str(found[key]) for key in ("step", "steps"))


@app.command()
def show(
    run: RunFolder,
    task: Annotated[str, typer.Option(help="Of several tasks, this one (default: all).")] = "",
    errors: Annotated[
        bool, typer.Option("--errors", help="Only answers that the first metric counts as wrong.")
    ] = False,
    count: Annotated[int, typer.Option("-n", min=1, help="Answers to show of each task.")] = 10,
) -> None:
    """Read a run: its configuration where it differs from the defaults, its scores with intervals, its answers.

    Example: `diablo-theory show results/runs/word_problems/lora --errors -n 3`
    """
    from diablo_theory.cli.scores import score_lines
    from diablo_theory.errors import ConfigError, ResultsError, nearest
    from diablo_theory.files import experiments_folder, read_json
    from diablo_theory.finetune.folder import state
    from diablo_theory.finetune.saved import PUT_BACK
    from diablo_theory.reading import read_yaml
    from diablo_theory.records import CONFIG, ERROR, PREDICTIONS, read_predictions
    from diablo_theory.reporting.ended_runs import rescored

    if not (run / CONFIG).is_file() and not (run / ERROR).is_file():
        raise ResultsError(f"{run} holds no run: there is no {CONFIG}")
    found = state(run)
    say((str(run), "bold"), f": {found['state']}, step {_steps(found)} {found['note']}".rstrip())
    if not (run / CONFIG).is_file():  # it failed before it could start
        return
    defaults = read_yaml(experiments_folder() / "defaults.yaml")
    different = {key: value for key, value in read_json(run / CONFIG, PUT_BACK).items() if defaults.get(key) != value}
    say("  " + ", ".join(f"{key}={value}" for key, value in different.items()))
    if found["metrics"]:
        say("  " + score_lines({run: found})[run])
    files = {file.stem: file for file in sorted((run / PREDICTIONS).glob("*.csv"))}
    if task and task not in files:
        raise ConfigError(f"{run} has no predictions on {task!r}.{nearest(task, files)}")
    for name, file in files.items():
        if task in ("", name):
            _show_answers(name, read_predictions(file, rescored(run)), errors, count)


def _show_answers(task: str, items: Any, errors: bool, count: int) -> None:
    from diablo_theory.finetune.tasks import TASKS

    metric = next((name for name in TASKS[task].metrics if name in items), None) if task in TASKS else None
    wrong = items[items[metric] < 1] if metric else items
    chosen = wrong if errors else items
    say("\n", (task, "bold"), f": {len(wrong)} of {len(items)} wrong by {metric}")
    for row in chosen.head(count).to_dict("records"):
        mark = "" if metric is None else f" ({metric} {row[metric]:g})"
        say((f"problem {row['item']}{mark}", "dim"))
        for part in ("prompt", "completion", "answer"):
            say((f"  {part}: ", "bold"), repr(row[part]))


def _board() -> Board:
    """Progress on the console; of several processes only the first one shows it."""
    from diablo_theory.progress import Board

    return Board(console if _is_first() else Console(quiet=True))


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tell(metrics: dict[str, Any], folder: Path, split: str) -> None:
    from diablo_theory.cli.scores import score_lines

    if _is_first():
        scores = score_lines({folder: {"metrics": metrics, "split": split}})[folder]
        say(
            f"{metrics['label']}, {metrics['trainable_params']:,} trainable parameters "
            f"({metrics['trainable_pct']:.2f}%): {scores}. In {folder}"
        )


@app.command()
def collect(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders with run folders at any depth, and collections."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Gets rows.csv, configs.csv, outcomes.csv.gz, training.csv.gz.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Where two disagree on a run, take the first folder's.")
    ] = False,
) -> None:
    """Keep of finished runs what is worth keeping: scores with intervals, configurations, outcomes, losses and norms.

    No texts and no weights: small, and free of the data sets' licences. Figures and tables are made from these files.
    A collection may be one of the folders, also that of --out: what it holds is kept, and the other runs are added.

    Example: `diablo-theory collect results/small_scale --out paper_results/reproduced/suites`
    """
    from diablo_theory.cli.common import wrote
    from diablo_theory.files import locked
    from diablo_theory.reporting.ended_runs import not_ended
    from diablo_theory.reporting.joining import gather
    from diablo_theory.reporting.suite_tables import readable_sections
    from diablo_theory.reporting.suites import save_suites
    from diablo_theory.reporting.terminal import ascii_text

    require_folder(out)
    # Held from reading on: two that add to one collection would each leave out what the other adds.
    with locked(out):
        suites = gather(sources, replace=replace)
        files = save_suites(suites, out)
    # Not drawn as a table of the terminal's width: that cuts numbers off where it is narrow.
    say(ascii_text(readable_sections(suites)))
    for source in sources:
        if left := [folder.relative_to(source).as_posix() for folder in not_ended(source)]:
            say(f"left out, since they have not ended (see `diablo-theory status {source}`): {', '.join(left)}")
    wrote(files)
