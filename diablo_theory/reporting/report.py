"""The report: rows, tables, figures, Markdown and one self-contained HTML page, from a results folder alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from diablo_theory.files import write_text, write_with
from diablo_theory.reporting.claims import readable_claims
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.figures import ENTRIES
from diablo_theory.reporting.figures import plans as plans_of_papers
from diablo_theory.reporting.findings import Finding, findings
from diablo_theory.reporting.overview import CLAIMS_TEXT, decided_claims, grouped_claims, overview, summarised
from diablo_theory.reporting.parts import Part
from diablo_theory.reporting.plans import save_plans
from diablo_theory.reporting.plots import plans, scale_note
from diablo_theory.reporting.results import ResultsData, by_method, collect, tidy_rows
from diablo_theory.reporting.tables import Tables, build, markdown, readable, task_name, write_all, write_tables
from diablo_theory.reporting.terminal import ascii_text, terminal_table

EXAMPLES = 3
PROFILE_OPTIONS = {"quick": ["--quick"], "full": ["--full"]}
LONGEST = 700  # characters of a prompt or completion that the report shows
CAPTIONS = {
    "verdicts": "Verdicts. How far each measured quantity was from its tolerance: claims must lie right of zero, "
    "controls, whose premise is broken on purpose, left of it.",
    "theory_map": "Theory map. The linear problem at equal numbers of parameters: the share of what full fine-tuning "
    "captures that each method's best member misses (numbers: per cent), and whose is smallest. LoRA with a frozen "
    "random A has as many parameters as DiaBlo.",
    "results": "Scores on unseen problems. Whiskers are 95% intervals; the loss is over answer tokens only.",
    "training": "Training. Bold: running mean; thin: every step. Gradient norms of different parameters are not on "
    "one scale: compare their course, not their height. LoRA's A has no gradient at first, since B starts at zero.",
    "cost": "Cost. Steps are timed in paired rounds in one process; the ratio is the median over rounds. "
    "Memory at rest is parameters and optimizer state; a step adds gradients and activations.",
    "learning_rates": "Learning-rate search, on validation problems that no score above uses.",
    **{stem: entry.caption for stem, entry in ENTRIES.items()},
}
#: Sections on the results folder itself: id, heading, table, figures; each is there if one of these is.
SECTIONS = (
    ("theory", "Theory", "verdicts", ("method", "verdicts", "theory_map", "convergence")),
    ("results", "Results", "results", ("results",)),
    ("differences", "Differences", "differences", ()),
    ("training", "Training", "", ("training",)),
    ("cost", "Cost", "costs", ("cost",)),
    ("rates", "Learning rates", "learning_rates", ("learning_rates",)),
)
TABLE_NOTES = {
    "verdicts": "A claim must hold in every trial. A control breaks the premise on purpose, and its claim must fail: "
    "it passes when it does. Margins are positive where a statement holds; a claim's is in decades, log10 of the "
    "tolerance over what was measured. The worst margin is the one closest to the wrong side.",
    "results": "In brackets: 95% intervals (Wilson for one seed and independent problems, otherwise the bootstrap "
    "over clusters, with the spread between seeds added). Problems of one cluster, such as the same sum in other "
    "words, are not independent.",
    "differences": "Paired over the same problems and seeds; intervals as above. One seed says nothing about the "
    "spread between seeds. An interval that contains zero reads “no difference seen”.",
}


def write_report(results: Path, papers: Path | None = None, today: date | None = None) -> Path:
    """Write rows, tables, figures and the report into a results folder.

    Args:
        results: The folder that ``diablo-theory reproduce`` wrote.
        papers: The folder with published numbers, claims, collections and benchmarks, such as ``paper_results``;
            without it the report is of the results folder alone.
        today: The day from which ages are counted; left out, that of the clock.

    Returns:
        The HTML report, one file that needs nothing else.

    Raises:
        ResultsError: If a folder cannot be read, or rows are of different schema versions.
    """
    data = collect(results)
    tables = build(data)
    evidence = None if papers is None else Evidence(data.path, papers)
    decided = [] if evidence is None else decided_claims(evidence)
    parts = [] if evidence is None else overview(evidence, today or datetime.now(UTC).date(), _own_input(data))
    rows = tidy_rows(data)
    write_with(data.path / "rows.csv", lambda path: rows.to_csv(path, index=False))
    write_tables(tables, data.path / "tables")
    others = {} if evidence is None else plans_of_papers(evidence)
    written, skipped = save_plans(plans(data, tables) | others, data.path / "figures")
    claims = {"claims": grouped_claims(decided), "claims_text": CLAIMS_TEXT}
    context = _context(data, tables, skipped) | {"parts": parts} | claims
    if evidence is not None:
        context["findings"] = [*_by_topic(summarised(evidence, decided)), *context["findings"]]
    if decided:
        write_all(readable_claims(decided), data.path / "tables", "claims")
    for name, frame in named_tables(parts):
        write_all(frame, data.path / "tables", name)
    images = {path.stem: path for path in written if path.suffix == ".png"}
    context["targets"] = {
        *(f"figure-{stem}" for stem in images),
        *(name for part in parts for name in (part.id, *(name for shown in part.shown for name in shown.ids))),
        *(name for name in context["row_ids"] if name),
    }
    environment = Environment(
        loader=PackageLoader("diablo_theory.reporting", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=True,
    )
    encoded = {stem: _embedded(path) for stem, path in images.items()}
    write_text(
        data.path / "report.html", environment.get_template("report.html.jinja").render(context, images=encoded)
    )
    write_text(data.path / "report.md", _markdown(context, list(images)))
    return data.path / "report.html"


def _embedded(picture: Path) -> str:
    """A drawing for the page, in base64: with a palette of its own it is a third as large, and looks the same."""
    page = io.BytesIO()
    Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(page, "PNG", optimize=True)
    return base64.b64encode(page.getvalue()).decode()


def summary(data: ResultsData) -> RenderableType:
    """The verdict and result tables and the findings, for the terminal.

    Args:
        data: What :func:`diablo_theory.reporting.results.collect` read.

    Returns:
        Something that ``rich.print`` shows; its own text is plain ASCII.
    """
    tables = build(data)
    words = readable(tables)
    parts: list[RenderableType] = []
    if "verdicts" in words:
        counts = tables.verdicts.groupby(["check", "role"], sort=False)[["passed", "total"]].sum().reset_index()
        counts["As predicted"] = counts["passed"].astype(str) + " of " + counts["total"].astype(str)
        shown = counts.rename(columns={"check": "Check", "role": "Role"})[["Check", "Role", "As predicted"]]
        parts.append(terminal_table(shown, "Theory"))
    if "results" in words:
        columns = ["Task", "Method", "Exact match, %", "Held-out loss, nats/token", "Trainable parameters"]
        parts.append(terminal_table(words["results"][columns], scale_note(data)))
    for finding in findings(data, tables):
        parts.append(Text(ascii_text(f"* {finding.topic}: {finding.text}"), style="bold red" if finding.alarm else ""))
    return Group(*parts)


def examples(data: ResultsData) -> pd.DataFrame:
    """A few right and a few wrong answers of each method's first seed, in the order of the test problems."""
    chosen = []
    for task, runs in data.runs.groupby("task"):
        for label, _ in by_method(runs):
            first = runs.loc[runs["label"] == label, "run_id"].iloc[0]
            items = data.items[data.items["run_id"] == first].sort_values("item")
            for right in (1, 0):
                some = items[items["exact"] == right].head(EXAMPLES)
                chosen.append(some.assign(task_name=task_name(str(task)), right=bool(right)))
    if not chosen:
        return pd.DataFrame()
    frame: pd.DataFrame = pd.concat(chosen)[["task_name", "label", "right", "item", "prompt", "answer", "completion"]]
    for name in ("prompt", "answer", "completion"):
        frame[name] = frame[name].map(_shorten)
    return frame


def provenance(data: ResultsData) -> dict[str, str]:
    """What was run where: versions, hardware, commit, seeds and time, in words."""
    manifest = data.manifest
    named = {
        "Package": ("package_version",),
        "Commit": ("commit",),
        "Python": ("python",),
        "torch": ("torch",),
        "transformers": ("transformers",),
        "peft": ("peft",),
        "Platform": ("platform",),
        "Processor": ("cpu", "threads"),
        "Device": ("device",),
        "Started": ("started",),
        "Finished": ("finished",),
    }
    lines = {}
    for name, keys in named.items():
        values = [str(manifest[key]) for key in keys if manifest.get(key) is not None]
        lines[name] = ", ".join(values) or "not recorded"
    if manifest.get("threads") is not None:
        lines["Processor"] += " thread(s)"
    if len(commits := [str(commit) for commit in manifest.get("commits", [])]) > 1:
        lines["Commit"] = f"begun at {commits[0]}, gone on with {', '.join(commits[1:])}"
    if manifest.get("dirty"):
        lines["Commit"] += ", with uncommitted changes"
    model = manifest.get("model", {})
    lines["Model"] = (
        ", ".join(str(model[key]) for key in ("name", "source", "sha256") if model.get(key)) or "not recorded"
    )
    for name, key, unit in (("Memory", "memory_gib", "GiB"), ("Peak memory of the process", "peak_rss_gib", "GiB")):
        lines[name] = f"{manifest[key]:.1f} {unit}" if manifest.get(key) is not None else "not recorded"
    stages = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in manifest.get("stages", {}).items())
    total = _duration(manifest["seconds"]) if manifest.get("seconds") is not None else "not recorded"
    lines["Active time"] = f"{total} ({stages})" if stages else total
    lines["Training seeds"] = ", ".join(str(seed) for seed in sorted(data.runs["seed"].unique())) or "none"
    return lines


def _context(data: ResultsData, tables: Tables, skipped: dict[str, str]) -> dict[str, Any]:
    frame = examples(data)
    groups = list(frame.groupby(["task_name", "label"], sort=False)) if not frame.empty else []
    return {
        "title": "DiaBlo: theory checks and fine-tuning results",
        "note": scale_note(data),
        "findings": _by_topic(findings(data, tables)),
        "tables": readable(tables),
        "sections": SECTIONS,
        "row_ids": _row_ids(tables),
        "table_notes": TABLE_NOTES,
        "captions": CAPTIONS,
        "skipped": {stem.replace("_", " "): why for stem, why in skipped.items()},
        "examples": [(task, label, rows.to_dict("records")) for (task, label), rows in groups],
        "provenance": provenance(data),
        "rerun": _rerun(data.manifest),
    }


def named_tables(parts: list[Part]) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every table of the parts with a name for its files."""
    for part in parts:
        tables = [shown for shown in part.shown if not shown.frame.empty]
        for place, shown in enumerate(tables):
            yield shown.ids[0] if shown.ids else f"{part.id}-{place + 1}" if place else part.id, shown.frame


def _row_ids(tables: Tables) -> list[str]:
    """What claims call the rows of the verdicts' table by: of each check the first, and nothing for the others."""
    ids = [f"check-{check}" for check in tables.verdicts.get("check", ())]
    return [name if ids.index(name) == place else "" for place, name in enumerate(ids)]


def _own_input(data: ResultsData) -> pd.DataFrame:
    """The folder itself, as a line beside :func:`~.overview.inputs`."""
    manifest = data.manifest
    keys = ("commit", "dirty", "cpu", "device", "torch", "peft", "transformers")
    line = {key: manifest.get(key) for key in keys} | {"input": "this folder", "runs": len(data.runs)}
    seeds = ", ".join(map(str, sorted(data.runs["seed"].unique())))
    return pd.DataFrame([line | {"seeds": seeds, "date": str(manifest.get("finished") or "")[:10]}])


def _rerun(manifest: dict[str, Any]) -> str:
    overrides = manifest.get("settings", {}).get("overrides", {})
    options = PROFILE_OPTIONS.get(manifest.get("profile", ""), [])
    return " ".join(["diablo-theory reproduce", *options, *(f"{key}={value}" for key, value in overrides.items())])


def _by_topic(found: list[Finding]) -> list[tuple[str, list[Finding]]]:
    return [(topic, list(same)) for topic, same in groupby(found, key=lambda finding: finding.topic)]


def _markdown(context: dict[str, Any], figures: list[str]) -> str:
    parts = [f"# {context['title']}", f"*{context['note']}*", "## Summary"]
    parts.append(
        "\n".join(f"- **{topic}.** {finding.text}" for topic, same in context["findings"] for finding in same)
    )
    parts += ["## Claims", CLAIMS_TEXT] if context["claims"] else []
    for heading, group in context["claims"]:
        parts += [f"**{heading}**", markdown(readable_claims(group))]
    for _, heading, table, pictures in SECTIONS:
        body = [TABLE_NOTES[table]] if table in TABLE_NOTES and table in context["tables"] else []
        body += [markdown(context["tables"][table])] if table in context["tables"] else []
        body += _pictures(pictures, figures)
        parts += [f"## {heading}", *body] if body else []
    for part in context["parts"]:
        parts += _part_in_markdown(part, figures)
    parts += [
        "## What was run where",
        markdown(pd.DataFrame(context["provenance"].items(), columns=["What", "Value"])),
    ]
    parts += [f"- No figure “{stem}”: {why}." for stem, why in context["skipped"].items()]
    parts += ["## Rerun", f"```\n{context['rerun']}\n```"]
    return "\n\n".join(parts) + "\n"


def _part_in_markdown(part: Part, figures: list[str]) -> list[str]:
    lines = [f"## {part.heading}", part.text]
    for shown in part.shown:
        lines += [f"**{shown.title}**" if shown.title else "", "" if shown.frame.empty else markdown(shown.frame)]
        lines += _pictures(shown.figures, figures)
    return [line for line in lines if line]


def _pictures(wanted: Iterable[str], drawn: list[str]) -> list[str]:
    return [f"![{CAPTIONS[stem]}](figures/{stem}.png)\n\n*{CAPTIONS[stem]}*" for stem in wanted if stem in drawn]


def verdict_table(verdicts: pd.DataFrame) -> Table:
    """Verdicts as ``diablo-theory verify --csv`` writes them, a line a check and role, for the terminal."""
    data = ResultsData(path=Path(), manifest={}, verdicts=verdicts)
    columns = ["Check", "Role", "Statement", "Passed", "Worst claim margin, decades"]
    return terminal_table(readable(build(data))["verdicts"][columns], "Theory")


def learning_rate_table(rates: pd.DataFrame) -> Table:
    """A learning-rate search (the rows of ``learning_rates.csv``) for the terminal."""
    data = ResultsData(path=Path(), manifest={}, learning_rates=rates)
    return terminal_table(readable(build(data))["learning_rates"], "Learning rates")


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} […]"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
