"""``diablo-theory bench``: steps of every method beside the floor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diablo_theory.cli.common import app, console, numbers, options_checked, require_folder, wrote
from diablo_theory.progress import Board

if TYPE_CHECKING:
    import pandas as pd
    import torch


@app.command()
def bench(
    shape: Annotated[
        str,
        typer.Option(
            help="smollm2-135m, smollm2-360m, llama-3.2-1b, llama-2-7b, tiny, or a layer such as 4096x11008."
        ),
    ] = "smollm2-135m",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers (of a model).")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 256,
    blocks: Annotated[str, typer.Option(help="DiaBlo's N, a comparison each; it sets the budget.")] = "64,16",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated, of floor, inputs, diablo, diablo-additive, einsum, lora, dora, miss, c3a, "
            "lora-fa, shira, full; all of them when left out."
        ),
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds; 20 or more for an interval of 1%.")] = 20,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    kernels: Annotated[
        bool, typer.Option(help="Instead: the block product and its gradient against einsum, over shapes and N.")
    ] = False,
    growth: Annotated[
        bool, typer.Option(help="Instead: how merged mode's cost above the floor grows with N and with tokens.")
    ] = False,
    loading: Annotated[
        bool, typer.Option(help="Instead: loading an adapter of a 1B model and merging it (8 GiB of memory).")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for times.csv, contenders.csv and a figure.")] = None,
) -> None:
    """Time whole training steps of every method at equal budgets, in turn in one process, beside the floor.

    The floor is the same model with everything frozen: the forward pass and the gradient of the input only. "inputs"
    is the floor that also keeps and reads each adapted layer's input, as any method that trains a part of that
    layer's weight must. Ratios are medians over paired rounds with a 95% interval; leave the machine alone meanwhile.
    All methods on the default model take about 12 minutes on two cores.

    Example: `diablo-theory bench --methods diablo,lora,einsum --blocks 64 --rounds 8`
    """
    import torch

    from diablo_theory.bench import METHODS, SHAPES, Suite, run_suite
    from diablo_theory.bench.workloads import Workload, linear, llama
    from diablo_theory.errors import ConfigError, nearest
    from diablo_theory.files import write_with
    from diablo_theory.finetune.models import pick_device
    from diablo_theory.reporting.steps import draw_steps, step_table, summarise
    from diablo_theory.reporting.style import save

    require_folder(out)
    if kernels:
        _kernels(pick_device(device), out)
        return
    if growth:
        _growth(pick_device(device), out)
        return
    if loading:
        _loading(out)
        return
    wanted = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip())) or list(METHODS)
    for name in wanted:
        if name not in METHODS:
            raise ConfigError(f"--methods: unknown method {name!r}.{nearest(name, METHODS)}")
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    where = pick_device(device)
    sizes = shape.split("x")
    workload: Workload
    if len(sizes) == 2 and all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        workload = linear(int(sizes[0]), int(sizes[1]), batch * length, where, dtypes[dtype])
    elif shape in SHAPES:
        workload = llama(shape, layers, batch, length, where, dtypes[dtype])
    else:
        raise ConfigError(f"--shape: no shape {shape!r} (or a layer such as 4096x11008).{nearest(shape, SHAPES)}")
    with options_checked():
        suite = Suite(workload, list(dict.fromkeys(numbers("--blocks", blocks, int))), wanted, rounds, where)
    with Board(console).piece(f"{workload.name}: {len(wanted)} methods", suite.work) as advance:
        times, contenders = run_suite(suite, advance)
    contenders = contenders.assign(dtype=dtype, **_made_with(where))
    summary = summarise(times, contenders)
    console.print(step_table(summary))
    if out is not None:
        write_with(out / "times.csv", partial(times.to_csv, index=False))
        write_with(out / "contenders.csv", partial(contenders.to_csv, index=False))
        wrote([out / "times.csv", out / "contenders.csv", *save(draw_steps(summary), out, "steps")])


def _kernels(device: torch.device, out: Path | None) -> None:
    from diablo_theory.bench.kernels import SHAPES, compare_kernels

    with Board(console).piece("kernels against einsum, shape by shape", len(SHAPES)) as advance:
        table = compare_kernels(advance, device=device)
    _show(table.sort_values("ratio", ascending=False), "kernels", device, out)


def _growth(device: torch.device, out: Path | None) -> None:
    from diablo_theory.bench import keep_pages
    from diablo_theory.bench.growth import growth, work

    keep_pages()
    with Board(console).piece("merged mode above the floor", work()) as advance:
        table = growth(advance, device=device)
    _show(table, "growth", device, out)


def _loading(out: Path | None) -> None:
    import torch

    from diablo_theory.bench.loading import loading, work

    with Board(console).piece("from an adapter's file to a merged model", work()) as advance:
        table = loading(advance)
    _show(table, "loading", torch.device("cpu"), out)


def _show(table: pd.DataFrame, name: str, device: torch.device, out: Path | None) -> None:
    from diablo_theory.files import write_with

    console.print(table.to_string(index=False), highlight=False, soft_wrap=True)
    if out is not None:
        table = table.assign(**_made_with(device))
        write_with(out / f"{name}.csv", partial(table.to_csv, index=False))
        wrote([out / f"{name}.csv"])


def _made_with(device: torch.device) -> dict[str, Any]:
    from diablo_theory.provenance import provenance
    from diablo_theory.reporting.speeds import PROVENANCE

    here = provenance(device)
    return {key: here[key] for key in (*PROVENANCE, "device", "cpu_kernels")}
