"""The commands on real models: reproduce, tune, diagnose, report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diablo_theory.cli.common import Overrides, app, console, options_checked, require_folder, say, working, wrote

Out = Annotated[Path, typer.Option("--out", help="Results folder; an unfinished one is continued.")]


@app.command()
def reproduce(
    overrides: Overrides = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 3 minutes: 12 training steps, 100 problems.")
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
        say(("failed:", "bold red"), f" {failure}")
    if reproduction.failures or not passed:
        raise typer.Exit(1)


@app.command()
def tune(
    task: Annotated[
        str,
        typer.Argument(
            help="A task with run files in experiments/TASK, such as word_problems; any other name lists them."
        ),
    ],
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
        raise ConfigError(f"unknown task {task!r}.{nearest(task, tuning.tunable())}")
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


#: Options of diagnose that say what to record.
_RECORDING = ("model", "task", "items", "modules", "depths", "device")


@app.command()
def diagnose(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Known name, local folder or hub id.")] = "SmolLM2-135M-Instruct",
    task: Annotated[
        str, typer.Option(help="Any task with training examples: the text, and the loss on its answers.")
    ] = ("docstrings"),
    items: Annotated[int, typer.Option(min=1, help="Training examples to look at.")] = 64,
    blocks: Annotated[int, typer.Option(min=1, help="Number of blocks N.")] = 64,
    modules: Annotated[str, typer.Option(help="Comma-separated last parts of layer names.")] = (
        "q_proj,k_proj,v_proj,up_proj,down_proj"
    ),
    depths: Annotated[int, typer.Option(min=1, help="Blocks of the model to look at, evenly spaced.")] = 4,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU when there is one.")
    ] = "auto",
    rtol: Annotated[
        float | None,
        typer.Option(
            help="Singular values of a layer's inputs at or below this share of the largest count as zero: from "
            "sqrt(eps) = 1.5e-8 to below 1. The default for inputs in float32, 4.9e-4, is the worst that rounding may "
            "do to them; where one feature is far larger than the others it may keep only a few directions, and a "
            "lower one keeps more."
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="A statistics.safetensors that an earlier diagnose wrote: its layers again, with other --blocks or "
            "--rtol, without recording again. The model is not loaded, so PiSSA and CorDA, starts of LoRA that look "
            "at its weights, are left out of captures.csv."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for layers.csv, captures.csv, statistics.safetensors, the figure, and two JSON files that "
            "say how sums and tables were made."
        ),
    ] = None,
) -> None:
    """Say of a real model's layers which side of the theorem they are on, and what each method could capture.

    Nothing is trained: one pass over the examples records inputs and output gradients. For each layer: the rank that
    holds 99% of its inputs' energy beside the block height d1, and the share of the change that the loss asks for that
    DiaBlo, LoRA (its best member, and the directions open at its usual start) and LoRA with a frozen A can make.

    Example: `diablo-theory diagnose --items 32 --depths 2 --out results/diagnosis`, then
    `diablo-theory diagnose --statistics results/diagnosis/statistics.safetensors --blocks 32 --rtol 1e-6`
    """
    from diablo_theory import diagnose as diagnosis
    from diablo_theory.errors import ConfigError, nearest
    from diablo_theory.files import write_json, write_with
    from diablo_theory.finetune.models import load_model, loading, pick_device
    from diablo_theory.finetune.tasks import TASKS, Wanted
    from diablo_theory.progress import Board
    from diablo_theory.provenance import provenance
    from diablo_theory.reporting.captures import capture_figure, layer_table, measured_at
    from diablo_theory.reporting.style import save
    from diablo_theory.theory.recording import linear_layers
    from diablo_theory.theory.statistics import load_statistics, require_rtol, save_statistics

    require_folder(out)
    if rtol is not None:
        with options_checked("--rtol"):
            require_rtol(rtol)
    board, size = Board(console), 8
    if statistics is not None:
        for name in _RECORDING:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise typer.BadParameter(f"--{name} says what to record: leave it out with --statistics")
        network, sums = None, load_statistics(statistics)
        _require_blocks(sums, blocks)
    else:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}.{nearest(task, TASKS)}")
        with board.piece(loading(model), 1) as advance:
            loaded = load_model(model, device)
            advance(1)
        network, layers = loaded.model, diagnosis.layers_at(loaded.model, modules.split(","), depths)
        _require_blocks(linear_layers(network, layers), blocks)
        examples = TASKS[task].examples(Wanted("train", items))
        with board.piece(f"record {len(layers)} layers", -(-len(examples) // size)) as advance, options_checked():
            sums = diagnosis.record_layers(loaded, examples, layers, size, lambda _: advance(1))
        if out is not None:
            save_statistics(out / "statistics.safetensors", sums)
            chosen = {name: context.params[name] for name in _RECORDING}
            write_json(out / "statistics.json", chosen | provenance(pick_device(device)))
    with board.piece("captures and certificates", len(sums)) as advance, options_checked():
        found, table = diagnosis.diagnose_layers(sums, blocks, network, rtol, progress=lambda _: advance(1))
    console.print(layer_table(table))
    if out is not None:
        write_with(out / "layers.csv", lambda path: table.to_csv(path, index=False))
        write_with(out / "captures.csv", lambda path: found.to_csv(path, index=False))
        diagnosed = {"blocks": blocks, "rtol": rtol, "statistics": statistics and str(statistics)}
        write_json(out / "diagnose.json", diagnosed | provenance(next(iter(sums.values())).sums.device))
        about = measured_at(table, model if statistics is None else "a real model")
        recorded = [out / name for name in ("statistics.safetensors", "statistics.json")] if statistics is None else []
        files = [*recorded, out / "layers.csv", out / "captures.csv", out / "diagnose.json"]
        wrote([*files, *save(capture_figure(found, about), out, "captures")])


def _require_blocks(layers: Mapping[str, Any], blocks: int) -> None:
    """Refuse a number of blocks that one of the layers has no room for; they have in_features and out_features."""
    from diablo_theory.blocks import BlockLayout

    with options_checked("--blocks"):
        for layer in layers.values():
            BlockLayout(layer.in_features, layer.out_features, blocks)


@app.command()
def report(
    out: Out = Path("results/default"),
    papers: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Published numbers, claims, collected runs and benchmarks (default: the repository's).",
        ),
    ] = None,
) -> None:
    """Write figures, tables and the report again from saved results; nothing is trained.

    The report has every claim of the paper with its outcome, published numbers beside reproduced ones, conflicts
    between sources, deviations, and how old what it is made from is.

    Example: `diablo-theory report --out results/quick`
    """
    from diablo_theory.files import paper_results
    from diablo_theory.reporting.report import write_report

    with working("drawing figures"):
        page = write_report(out, papers or paper_results())
    if not _show(out, page):
        raise typer.Exit(1)


def _show(out: Path, page: Path) -> bool:
    """Print the summary; whether every verdict passed."""
    from diablo_theory.reporting.report import summary
    from diablo_theory.reporting.results import collect

    data = collect(out)
    console.print()
    console.print(summary(data))
    say("\nReport: ", (str(page), "bold"))
    return data.verdicts.empty or bool(data.verdicts["passed"].all())
