"""The theory's commands: verify, map, descend, speed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from diablo_theory.cli.common import app, console, numbers, options_checked, require_folder, say, working, wrote


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CHECK]...", help="Such as `L2 S1`; all checks without one.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Random instances of each check.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Where all random draws come from.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Precision in which instances are given: float64 or float32.")
    ] = "float64",
    device: Annotated[str, typer.Option(help="Where instances live, such as cpu or cuda.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for verdicts.csv and the figure of the margins (PDF, PNG).")
    ] = None,
) -> None:
    """Check the theory on random problems, each claim beside a control that must fail.

    Exits with 1 when a verdict fails: a claim that does not hold, or a control that does.

    Example: `diablo-theory verify L2 S1 --trials 20 --out results/verdicts`
    """
    from diablo_theory.files import write_with
    from diablo_theory.reporting.report import verdict_table
    from diablo_theory.reporting.style import save
    from diablo_theory.reporting.verdicts import verdict_margins
    from diablo_theory.theory.arithmetic import arithmetic_of
    from diablo_theory.theory.checks import CHECKS, run_checks

    require_folder(out)
    arithmetic = arithmetic_of(dtype, device)
    with working("checking") as status:
        verdicts = run_checks(names or None, trials, seed, arithmetic, progress=lambda text: status.update(Text(text)))
    console.print(verdict_table(verdicts))
    if out is not None:
        write_with(out / "verdicts.csv", lambda path: verdicts.to_csv(path, index=False))
        wrote([out / "verdicts.csv", *save(verdict_margins(verdicts), out, "verdicts")])
    for name in dict.fromkeys(verdicts["check"]):
        say((name, "bold"), f" {CHECKS[name].statement}")
    console.print(
        "A claim passes when premise and statement hold; a control breaks the premise, and passes when neither does."
    )
    if not verdicts["passed"].all():
        raise typer.Exit(1)


@app.command(name="map")
def gap_map(
    out: Annotated[Path, typer.Option("--out", help="Folder for map.csv and the figures; finished work is kept.")],
    ranks: Annotated[str, typer.Option(help="Ranks of X.")] = "1,2,4,8,16,32,64",
    blocks: Annotated[str, typer.Option(help="Numbers of blocks N.")] = "1,2,4,8,16,32",
    target: Annotated[str, typer.Option(help="generic, low-rank, block-aligned, sparse or noise.")] = "generic",
    target_ranks: Annotated[str, typer.Option(help="Ranks of the update behind a low-rank target.")] = "1",
    noises: Annotated[str, typer.Option(help="Norm of the noise relative to the signal's.")] = "0",
    conditions: Annotated[str, typer.Option(help="Conditioning of X.")] = "1",
    rows: Annotated[int, typer.Option(help="Tokens b.")] = 128,
    size: Annotated[int, typer.Option(help="Inputs m1.")] = 64,
    outputs: Annotated[int, typer.Option(help="Outputs m2.")] = 64,
    draws: Annotated[int, typer.Option(help="Independent targets to average over in a cell.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Where all random draws come from.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    cluster: Annotated[
        str | None, typer.Option(help="Address of a dask scheduler, such as tcp://host:8786 (extra `cluster`).")
    ] = None,
) -> None:
    """Map where DiaBlo, LoRA and LoRA with a frozen A miss least of full fine-tuning, at equal parameters.

    Lists are comma-separated; every combination is a cell, with exact gaps from closed forms. The figure has the rank
    of X across and N upwards; coordinates that vary besides become rows and columns of small maps (two at most).
    Stopped and started again, finished work is not done again.

    Example: `diablo-theory map --out results/map --target low-rank --target-ranks 1,4,16,64 --noises 0,0.1,1 --jobs 2`
    """
    from diablo_theory.files import write_with
    from diablo_theory.progress import Board
    from diablo_theory.reporting.maps import draw_map, map_table
    from diablo_theory.reporting.style import save
    from diablo_theory.sweeps import sweep
    from diablo_theory.theory.maps import Grid, map_cells

    with options_checked():
        grid = Grid(
            ranks=numbers("--ranks", ranks, int),
            block_counts=numbers("--blocks", blocks, int),
            conditions=numbers("--conditions", conditions, float),
            target=target,
            target_ranks=numbers("--target-ranks", target_ranks, int),
            noises=numbers("--noises", noises, float),
            rows=rows,
            size=size,
            outputs=outputs,
            draws=draws,
            seed=seed,
        )
    tasks = grid.tasks()
    with Board(console).piece(f"map of {grid.num_cells:,} cells, input by input", len(tasks)) as advance:
        known = [0]

        def tell(finished: int, total: int) -> None:
            advance(finished - known[0])
            known[0] = finished

        with options_checked():
            cells = sweep(map_cells, tasks, folder=out, jobs=jobs, cluster=cluster, progress=tell)
    write_with(out / "map.csv", lambda path: cells.to_csv(path, index=False))
    console.print(map_table(cells))
    wrote([out / "map.csv", *(path for stem, figure in draw_map(cells) for path in save(figure, out, stem))])


@app.command()
def descend(
    out: Annotated[Path, typer.Option("--out", help="Folder for descent.csv, provenance.json and the figure.")],
    iterations: Annotated[int, typer.Option(min=1, help="Steps of gradient descent.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Where the problems and LoRA's factors come from.")] = 0,
) -> None:
    """Follow gradient descent of DiaBlo, LoRA, LoRA with a frozen A and full fine-tuning on two linear problems.

    In one every X_i has the rank of X, which is the theorem's premise, and in the other none has. Each method takes
    steps of 1/lambda_max of its own; what it approaches and how fast come from closed forms. Takes seconds.

    Example: `diablo-theory descend --out paper_results/descent`
    """
    import torch

    from diablo_theory.files import write_json, write_with
    from diablo_theory.provenance import provenance
    from diablo_theory.reporting.convergence import convergence
    from diablo_theory.reporting.style import save
    from diablo_theory.theory.descent import descents

    require_folder(out)
    with working("descending"):
        table = descents(seed, iterations)
    write_with(out / "descent.csv", partial(table.to_csv, index=False, float_format="%.8g"))
    write_json(out / "provenance.json", {"seed": seed, "iterations": iterations} | provenance(torch.device("cpu")))
    wrote([out / "descent.csv", out / "provenance.json", *save(convergence(table), out, "convergence")])


@app.command()
def speed(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[BENCHMARK]...", help="map, layer, growth; all without one.")
    ] = None,
    width: Annotated[int, typer.Option(min=128, help="Inputs and outputs of the layer.")] = 4096,
    tokens: Annotated[int, typer.Option(min=4096, help="Tokens of the layer, a multiple of 2048.")] = 65_536,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a CSV file of each benchmark, with versions and hardware.")
    ] = None,
) -> None:
    """Time the closed forms: 10,000 cells against a plain scipy loop, a layer of a 7B model, and how time grows.

    Ratios are of things run in turn in this process; leave the machine alone meanwhile. All three take about
    three minutes on two cores; the layer takes about 1.5 GiB.

    Example: `diablo-theory speed layer --width 1024 --tokens 8192`
    """
    import torch

    from diablo_theory import speed as benchmarks
    from diablo_theory.errors import ConfigError, nearest
    from diablo_theory.files import write_with
    from diablo_theory.provenance import provenance
    from diablo_theory.reporting.speeds import PROVENANCE, speed_table

    require_folder(out)
    with options_checked("--tokens"):
        benchmarks.require_batches(tokens)
    known = {
        "map": lambda tell: benchmarks.map_against_loop(progress=tell),
        "layer": lambda tell: benchmarks.layer_at_scale(width, tokens, progress=tell),
        "growth": lambda tell: benchmarks.growth(progress=tell),
    }
    for name in names or ():
        if name not in known:
            raise ConfigError(f"unknown benchmark {name!r}.{nearest(name, known)}")
    for name in dict.fromkeys(names or known):
        with working(name) as status:
            lines = known[name](lambda text, name=name, status=status: status.update(Text(f"{name}: {text}")))
        console.print(speed_table(lines))
        if out is not None:
            here = provenance(torch.device("cpu"))
            lines = lines.assign(**{key: here[key] for key in PROVENANCE})
            write_with(out / f"{name}.csv", partial(lines.to_csv, index=False))
            wrote([out / f"{name}.csv"])
