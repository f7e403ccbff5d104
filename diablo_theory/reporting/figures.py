"""Every figure of the saved results: what it reads, how it is drawn, and which command makes what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import joblib
import pandas as pd
from matplotlib.figure import Figure

from diablo_theory.errors import ResultsError
from diablo_theory.reporting import beside_published, plots, published_bars
from diablo_theory.reporting.captures import capture_figure, measured_at, read_captures
from diablo_theory.reporting.certificates import certificates, read_layers
from diablo_theory.reporting.convergence import convergence, read_descent
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.gradient_norms import gradient_norms
from diablo_theory.reporting.layout import COLUMN, drawn_for
from diablo_theory.reporting.method_diagram import method_diagram
from diablo_theory.reporting.plans import NothingToDrawError, Plan, save_plans
from diablo_theory.reporting.published_parameters import parameters
from diablo_theory.reporting.results import ResultsData, collect
from diablo_theory.reporting.steps import draw_steps
from diablo_theory.reporting.suite_plots import TITLES, methods, settings
from diablo_theory.reporting.suites import ROWS
from diablo_theory.reporting.tables import build
from diablo_theory.reporting.time_memory import time_memory

_COLLECT = (
    "`diablo-theory sweep experiments/sweeps/small_scale.yaml --out results/small_scale` and "
    "`diablo-theory collect results/small_scale --out paper_results/reproduced/suites` produce"
)
_DIAGNOSE = "`diablo-theory diagnose --out paper_results/diagnosis` produces"
_BENCH = "`diablo-theory bench --out paper_results/steps` produces"
_TRANSCRIBED = "transcribed by hand and kept in the repository, which has"
_PUBLISHED, _COUNTS, _STEPS = "published", "counts.csv", "steps/contenders.csv"
_SUITES = f"reproduced/suites/{ROWS}"


@dataclass(frozen=True)
class Entry:
    """A figure that is always known, whether or not its data are there.

    Attributes:
        draw: From saved results.
        reads: What must be there, below the root.
        made_by: Which command produces it, up to the verb.
        caption: What a reader sees on it.
    """

    draw: Callable[[Evidence], Figure]
    reads: tuple[str, ...] = ()
    made_by: str = ""
    caption: str = ""


#: All but the figures of a reproduction's folder, which :func:`~.plots.plans` knows, by stem.
ENTRIES = {
    "method": Entry(
        lambda _: method_diagram(),
        caption="What trains: LoRA's two factors beside the weight, DiaBlo's blocks on its diagonal.",
    ),
    "published_commonsense": Entry(
        lambda saved: published_bars.commonsense(saved.published, saved.conflicts),
        (_PUBLISHED,),
        _TRANSCRIBED,
        "Published commonsense averages, of the paper and of the papers that it quotes. None of them was reproduced.",
    ),
    "published_arithmetic": Entry(
        lambda saved: published_bars.arithmetic(saved.published),
        (_PUBLISHED,),
        _TRANSCRIBED,
        "Published arithmetic scores. None of them was reproduced.",
    ),
    "published_quantised": Entry(
        lambda saved: beside_published.quantised(saved.published, saved.sections),
        (_PUBLISHED,),
        _TRANSCRIBED,
        "Quantised bases: published scores, and what was run here, each on an axis of its own.",
    ),
    "published_patterns": Entry(
        lambda saved: beside_published.patterns(saved.published, saved.sections),
        (_PUBLISHED,),
        _TRANSCRIBED,
        "Sparsity patterns at equal counts: published scores, and what was run here, each on an axis of its own.",
    ),
    "published_parameters": Entry(
        lambda saved: parameters(saved.published, saved.counts),
        (_PUBLISHED, _COUNTS),
        "`diablo-theory count --out paper_results` produces",
        "Published averages against trainable parameters, as quoted and as counted again on the true shapes.",
    ),
    "time_memory": Entry(
        lambda saved: time_memory(saved.published, _beside_lora(saved)),
        (_PUBLISHED, _STEPS),
        _BENCH,
        "Time and memory: what papers print, and what was measured here.",
    ),
    "steps": Entry(
        lambda saved: draw_steps(saved.step_summary),
        (_STEPS,),
        _BENCH,
        "Whole training steps as ratios to the frozen floor, with 95% intervals, and memory.",
    ),
    "convergence": Entry(
        lambda saved: convergence(read_descent(saved.papers / "descent")),
        ("descent/descent.csv",),
        "`diablo-theory descend --out paper_results/descent` produces",
        "Gradient descent on the linear problem, within the premise and beyond it, with predicted limits and rates.",
    ),
    "certificates": Entry(
        lambda saved: certificates(read_layers(saved.papers / "diagnosis" / "layers.csv"), saved.layers_model),
        ("diagnosis/layers.csv",),
        _DIAGNOSE,
        "A real model's layers: what bounds the full gradient (S3), in its own units.",
    ),
    "captures": Entry(
        lambda saved: capture_figure(
            read_captures(saved.papers / "diagnosis" / "captures.csv", saved.layers),
            measured_at(saved.layers, saved.layers_model),
        ),
        ("diagnosis/captures.csv", "diagnosis/layers.csv"),
        _DIAGNOSE,
        "A real model's layers: what each method could capture of the change that full fine-tuning asks for.",
    ),
    "suites_methods": Entry(
        lambda saved: methods(_some(saved, ("methods",))["methods"], _note(saved)),
        (_SUITES,),
        _COLLECT,
        "Methods that were run here: scores with 95% intervals over problems and seeds.",
    ),
    "suites_settings": Entry(
        lambda saved: settings(_some(saved, TITLES), _note(saved)),
        (_SUITES,),
        _COLLECT,
        "Run here: numbers of blocks, sparsity patterns, quantised bases, learning rates.",
    ),
    "gradient_norms": Entry(
        lambda saved: gradient_norms(saved.suites, _note(saved)),
        (_SUITES,),
        _COLLECT,
        "Gradient norms of the runs, of LoRA's two factors apart.",
    ),
}


def plans(saved: Evidence) -> dict[str, Plan]:
    """The figures of :data:`ENTRIES` by stem, those whose data are missing included."""
    found = {}
    for stem, entry in ENTRIES.items():
        missing = [name for name in entry.reads if not (saved.papers / name).exists()]
        why_not = f"{entry.made_by} {' and '.join(f'{saved.papers.name}/{name}' for name in missing)}"
        found[stem] = Plan(partial(entry.draw, saved), why_not, not missing)
    return found


def all_plans(root: Path) -> dict[str, Plan]:
    """Those of a folder's reproduction, and all others.

    Args:
        root: A folder laid out as ``paper_results``.

    Raises:
        ResultsError: If the root is no folder, or its reproduction is damaged.
    """
    if not root.is_dir():
        raise ResultsError(f"{root} is no folder of saved results, such as paper_results")
    reproduced = root / "reproduced"
    there = (reproduced / "manifest.json").is_file()
    data = collect(reproduced) if there else ResultsData(path=reproduced, manifest={})
    return plots.plans(data, build(data)) | plans(Evidence(reproduced, root))


def draw_figures(root: Path, out: Path) -> tuple[list[Path], dict[str, str]]:
    """Draw every figure whose data are there, across a page and for one column of two; nothing is trained or solved.

    Args:
        root: A folder laid out as ``paper_results``.
        out: Where the files go; those for a column, as PDF alone, into its ``column``.

    Returns:
        The files written, and for each figure that was skipped which command produces what it reads.

    Raises:
        ResultsError: If saved results are damaged; it names the file.
    """
    stems, cores = list(all_plans(root)), joblib.cpu_count()
    draw = joblib.delayed(_draw)
    done = joblib.Parallel(n_jobs=cores)(draw(root, stems[first::cores], out) for first in range(cores))
    written, skipped = zip(*done, strict=True)
    return list(chain(*written)), dict(chain(*(why.items() for why in skipped)))


def _draw(root: Path, stems: Iterable[str], out: Path) -> tuple[list[Path], dict[str, str]]:
    """Some of the figures for both pages."""
    known = all_plans(root)
    some = {stem: known[stem] for stem in stems}
    written, skipped = save_plans(some, out)
    with drawn_for(COLUMN):
        written += save_plans(some, out / "column", (".pdf",))[0]
    return written, skipped


def _some(saved: Evidence, names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Those of the sections that collected runs have; at least one."""
    found = {name: saved.sections[name] for name in names if name in saved.sections}
    if not found:
        raise NothingToDrawError(f"no collected run is of {' or '.join(names)}; {_COLLECT} some")
    return found


def _beside_lora(saved: Evidence) -> pd.DataFrame:
    """The step benchmark, in ratios to LoRA's step."""
    summary = saved.step_summary
    largest = summary[summary["num_blocks"] == summary["num_blocks"].max()]
    if "lora" not in set(largest["name"]):
        raise NothingToDrawError(f"the step benchmark was run without LoRA at its largest N; {_BENCH} it")
    return summary


def _note(saved: Evidence) -> str:
    """Which models were run here, at which scale and on what."""
    configs = saved.suites.configs
    models, scales, dtypes = (" and ".join(dict.fromkeys(configs[name])) for name in ("model", "scale", "dtype"))
    machines = configs["device"].mask(configs["device"] == "cpu", configs["cpu"])
    warning = "; not comparable to the paper's 7B numbers" if "small" in set(configs["scale"]) else ""
    return f"{scales.capitalize()} scale: {models}, {dtypes}, on {' and '.join(dict.fromkeys(machines))}{warning}."
