"""What all saved results say together: claims, published beside reproduced, conflicts, deviations, ages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from diablo_theory.files import read_json
from diablo_theory.reporting.claims import FILE, Decided, decide, read_claims
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.findings import Finding
from diablo_theory.reporting.parameters import readable_counts
from diablo_theory.reporting.parts import Part, Shown, made, measured_parts
from diablo_theory.reporting.published import (
    AVERAGE,
    METHOD_NAMES,
    OTHER_METRICS,
    PUBLISHED_FIGURES,
    odd_averages,
)
from diablo_theory.reporting.questions import Outcome
from diablo_theory.reporting.questions.runs import tables_of
from diablo_theory.reporting.suite_tables import NOTE, readable_section, summary, title
from diablo_theory.reporting.tables import task_name

#: Suites of the paper: heading, published suites, and sections of collected runs that belong beside them, each with
#: the tasks that do (none: all).
SUITES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "Commonsense reasoning": (("commonsense",), {"commonsense": (), "methods": ("boolq", "arc_easy")}),
    "Arithmetic reasoning": (
        ("arithmetic", "math_10k"),
        {"arithmetic": ("gsm8k_metamath", "math", AVERAGE), "methods": ("word_problems", "gsm8k")},
    ),
    "Arithmetic reasoning from 100,000 examples": (("arithmetic_100k",), {}),
    "GSM8K alone": (("gsm8k",), {"arithmetic": ("gsm8k",)}),
    "Quantised models": (("quantised", "quantised_gsm8k"), {"bases": ()}),
    "Quantisers alone": (("quantisers",), {}),
    "Sparsity patterns": (("patterns",), {"patterns": ()}),
    "Number of blocks, learning rates": ((), {"blocks": (), "learning_rates": ()}),
    "Code": (("code",), {"code": ()}),
    "Code from 100,000 examples": (("code_100k",), {}),
    "Safety": (("safety",), {"safety": ()}),
    "Efficiency": (("efficiency",), {"efficiency": ()}),
}
_DEVIATION = re.compile(r"^- `([a-z0-9-]+)`: (.*(?:\n  .*)*)", re.MULTILINE)


def decided_claims(evidence: Evidence) -> list[Decided]:
    """Every claim of claims.yaml with its outcome; none where there is no such file."""
    file = evidence.papers / FILE
    return [decide(claim, evidence) for claim in read_claims(file)] if file.is_file() else []


CLAIMS_TEXT = (
    "Every outcome is computed from saved verdicts, measurements and scores. What these do not decide stays open, "
    "with the command that would decide it and what it needs; published numbers are no evidence of their own."
)
#: Sections of the claims: heading, and whose.
CLAIMS_BY = {"The paper's claims": "paper", "Beyond the paper, and its questions at small scale": "ours"}


def grouped_claims(decided: list[Decided]) -> list[tuple[str, list[Decided]]]:
    """Claims under their headings, the paper's and this project's own apart."""
    groups = [(name, [found for found in decided if found.claim.by == who]) for name, who in CLAIMS_BY.items()]
    return [(name, group) for name, group in groups if group]


def counted(decided: list[Decided], by: str = "paper") -> str:
    """How many of the paper's claims, or of this project's own, came out how, in a sentence."""
    own = [found.outcome for found in decided if found.claim.by == by]
    told = [
        f"{own.count(outcome)} {words[own.count(outcome) != 1]}" for outcome, words in _VERBS.items() if outcome in own
    ]
    whose = {"paper": "of the paper", "ours": "of this project's own"}[by]
    return f"Of {len(own)} claims {whose} {', '.join(told)}."


def summarised(evidence: Evidence, decided: list[Decided]) -> list[Finding]:
    """What stands first in the report: how many claims came out how, and what was run."""
    whose = [by for by in CLAIMS_BY.values() if any(found.claim.by == by for found in decided)]
    found = [Finding("Claims", counted(decided, by)) for by in whose]
    suites = made(evidence, "suites")
    return found + ([] if suites is None else [Finding("Suites", f"Collected: {summary(suites)}")])


_VERBS = {
    Outcome.HOLDS: ("holds", "hold"),
    Outcome.CONDITIONAL: ("holds under stated conditions", "hold under stated conditions"),
    Outcome.FAILS: ("does not hold here", "do not hold here"),
    Outcome.OPEN: ("is not decidable here", "are not decidable here"),
}


def overview(evidence: Evidence, today: date, dates: pd.DataFrame) -> list[Part]:
    """What stands in the report after the results of its own folder.

    Args:
        evidence: Saved results.
        today: The day of the report.
        dates: Further inputs, as :func:`inputs` returns them.

    Raises:
        ResultsError: If something is damaged, or rows are of different schema versions.
    """
    return [
        *_suites(evidence),
        *_parameters(evidence),
        *measured_parts(evidence),
        *_conflicts(evidence),
        *_deviations(evidence.papers.parent / "README.md"),
        *_ages(pd.concat([dates, inputs(evidence)], ignore_index=True), today),
    ]


def _suites(evidence: Evidence) -> Iterable[Part]:
    published, sections = made(evidence, "published"), evidence.sections
    if published is None and not sections:
        return
    shown: list[Shown] = []
    others = _others(sections)
    headings = SUITES | ({"Beside the paper's suites": ((), others)} if others else {})
    for heading, (names, of_runs) in headings.items():
        if published is not None and names:
            frame = readable_published(published[published["suite"].isin(names)])
            ids, figures = tuple(f"published-{name}" for name in names), PUBLISHED_FIGURES.get(names[0], ())
            shown.append(Shown(f"{heading}: published, at full scale", frame, ids, figures))
        before = len(shown)
        for name, tasks in of_runs.items():
            frame = sections.get(name, pd.DataFrame(columns=["task"]))
            chosen = frame[frame["task"].isin(tasks)] if tasks else frame
            if not chosen.empty:
                models, scales = (" and ".join(dict.fromkeys(chosen[key])) for key in ("model", "scale"))
                what = f"{models} at {scales} scale"
                label = f"{heading}: reproduced, {what} ({title(name).lower()})"
                # The first id names its files, whichever suites are collected.
                key = names[0] if names else name
                whole = "-suite" if names and name == key and len(of_runs) > 1 else ""
                ids = (f"reproduced-{key}{whole}", *tables_of(chosen["suite"]))
                shown.append(Shown(label, readable_section(chosen.reset_index(drop=True)), ids))
        if before == len(shown):
            shown.append(Shown(f"{heading}: nothing reproduced here yet"))
    if sections:
        shown.append(Shown("Reproduced, in pictures", figures=("suites_methods", "suites_settings", "gradient_norms")))
    text = (
        "Published numbers are of models of 7 to 13 billion parameters; beside them stand runs of the same methods, "
        "each with its model and scale. Scores of small ones must not be compared with published ones. How sure: "
        "printed where the source says; quoted in somebody's note about it; or drawn, with the error of reading. "
        f"{NOTE}"
    )
    yield Part("suites", "Published beside reproduced", text, _once(shown))


def _others(sections: dict[str, pd.DataFrame]) -> dict[str, tuple[str, ...]]:
    """Sections, with their tasks, that belong beside no suite of the paper."""
    named = [of_runs for _, of_runs in SUITES.values()]
    found = {}
    for name, frame in sections.items():
        tasks = [of_runs[name] for of_runs in named if name in of_runs]
        rest = set(frame["task"]) - {task for some in tasks for task in some}
        if () not in tasks and rest:
            found[name] = tuple(sorted(rest))
    return found


def _once(shown: list[Shown]) -> list[Shown]:
    """Each id only where it stands first: what stands beside other suites has a place of its own."""
    seen: set[str] = set()
    found = []
    for part in shown:
        found.append(replace(part, ids=tuple(name for name in part.ids if name not in seen)))
        seen.update(part.ids)
    return found


def readable_published(rows: pd.DataFrame) -> pd.DataFrame:
    """Published rows of the paper's models in words; of others' rows with an average, that alone."""
    own = rows["file"].str.endswith("_diablo")
    rows = rows[rows["model"].isin(rows.loc[own, "model"])] if own.any() else rows
    averaged = rows.groupby(["file", "model", "method", "setting"], dropna=False)["table"].transform(
        lambda tables: (tables == AVERAGE).any()
    )
    own = rows["file"].str.endswith("_diablo")
    rows = rows[~averaged | (rows["table"] == AVERAGE) | own].assign(other=~own).sort_values("other", kind="stable")
    shares = [
        f"{pct:g}%" if pd.notna(pct) else f"{params / 1e6:,.1f} M" if pd.notna(params) else "—"
        for pct, params in zip(rows["trainable_pct"], rows["trainable_params"], strict=True)
    ]
    metrics = [
        {"exact_match": "accuracy, %", "safe": "safe, %"}.get(
            metric, " ".join([metric.replace("_", " "), OTHER_METRICS.get(metric, "%")])
        )
        for metric in rows["metric"]
    ]
    return pd.DataFrame(
        {
            "Model": rows["model"],
            "Method": rows["setting"],
            "Trainable": shares,
            "Task": [task_name(table) for table in rows["table"]],
            "Metric": metrics,
            "Value": rows["value"].map("{:g}".format),
            "Source": rows["origin"] + rows["note"].map(lambda note: f" ({note})" if note else ""),
            "How sure": rows["certainty"].map(_SURE),
        }
    )


_SURE = {"printed": "printed", "quoted": "quoted", "measured": "drawn, ± 0.05"}


def _parameters(evidence: Evidence) -> Iterable[Part]:
    counts = made(evidence, "counts")
    if counts is not None:
        text = (
            "What papers print of trainable parameters, counted again on the models' true shapes. With grouped-query "
            "attention the key and value matrices are narrower than the query's. Quotes without a rank or N are not "
            "counted, nor those of methods that are unknown here."
        )
        shown = Shown("", readable_counts(counts), figures=("published_parameters",))
        yield Part("parameters", "Trainable parameters", text, [shown])


def _conflicts(evidence: Evidence) -> Iterable[Part]:
    published = made(evidence, "published")
    if published is None:
        return
    found, odd = evidence.conflicts, odd_averages(published)
    apart = pd.DataFrame(
        {
            "Suite": found["suite"],
            "Model": found["model"],
            "Method": found["method"].map(lambda method: METHOD_NAMES.get(method, method)),
            "One source": [f"{f}: {s}" for f, s in zip(found["file_1"], found["setting_1"], strict=True)],
            "Its average": found["average_1"].map("{:g}".format),
            "Another": [f"{f}: {s}" for f, s in zip(found["file_2"], found["setting_2"], strict=True)],
            "Its average ": found["average_2"].map("{:g}".format),
            "Numbers that differ": [f"{d} of {n}" for d, n in zip(found["differing"], found["numbers"], strict=True)],
            "By at most": found["largest"].map("{:.1f}".format),
        }
    )
    means = pd.DataFrame(
        {
            "File": odd["file"],
            "Row": odd["model"] + ", " + odd["setting"],
            "Printed": odd["printed"].map("{:g}".format),
            "Mean of its parts": odd["mean"].map("{:.2f}".format),
        }
    )
    text = "Rows of published tables that ought to be the same and are not, and printed averages that are none."
    shown = [Shown("", apart), Shown("Averages that do not add up", means, ("averages",))]
    yield Part("conflicts", "Conflicts between sources", text, shown)


def _deviations(readme: Path) -> Iterable[Part]:
    """What README's list says is done otherwise than in the paper; a test holds that list to the code."""
    heading = "Deviations from the paper and its code"
    if not readme.is_file():
        yield Part(
            "deviations",
            heading,
            "Those of the code are listed in its README, which does not lie beside these papers.",
        )
        return
    found = _DEVIATION.findall(readme.read_text(encoding="utf-8"))
    frame = pd.DataFrame(
        [(name, " ".join(text.replace("`", "").split())) for name, text in found], columns=["Name", "What is done"]
    )
    if not frame.empty:
        yield Part("deviations", heading, "", [Shown("", frame)])


def inputs(evidence: Evidence) -> pd.DataFrame:
    """What the saved results were made from: a row an input, commit, machine and date.

    Returns:
        Columns input, runs, seeds, date (ISO, or empty where it was not noted) and last (where it was made on several
        days), commit, dirty, cpu, device, torch,
        peft, transformers.
    """
    rows: list[dict[str, Any]] = []
    suites = made(evidence, "suites")
    if suites is not None:
        keys = ["commit", "dirty", "cpu", "device", "torch", "peft", "transformers"]
        for values, group in suites.configs.groupby(keys, dropna=False, sort=False):
            seeds = ", ".join(map(str, sorted(set(group["seed"]))))
            about = {"input": "collected runs", "runs": len(group), "seeds": seeds}
            dates = sorted(str(day) for day in group["date"].dropna())
            days = {"date": dates[0], "last": dates[-1]} if dates else {}
            rows.append(about | dict(zip(keys, values, strict=True)) | days)
    steps = made(evidence, "steps")
    if steps is not None:
        for row in steps[1].drop_duplicates(["commit", "cpu"]).to_dict("records"):
            rows.append({"input": "step benchmark"} | {key: row.get(key) for key in _INPUT_KEYS})
    for what, name in _DATED.items():
        if (file := evidence.papers / name).is_file():
            rows.append({"input": what} | {key: read_json(file).get(key) for key in _INPUT_KEYS})
    return pd.DataFrame(rows, columns=list(_INPUTS))


_INPUT_KEYS = ("date", "commit", "dirty", "cpu", "device", "torch", "peft", "transformers")
_INPUTS = ("input", "runs", "seeds", "last", *_INPUT_KEYS)
#: Measurements that say in a file of their own when and where they were made.
_DATED = {"a real model's layers": "diagnosis/diagnose.json", "gradient descent": "descent/provenance.json"}


def _ages(dates: pd.DataFrame, today: date) -> Iterable[Part]:
    if dates.empty:
        return
    text = f"As of {today.isoformat()}."
    lines = []
    for row in dates.astype(object).fillna("").to_dict("records"):
        commit = str(row["commit"])[:10] + (" with changes" if str(row["dirty"]) == "True" else "")
        versions = [f"{name} {row[name]}" for name in ("torch", "peft", "transformers") if row[name]]
        lines.append(
            {
                "Input": row["input"],
                "Runs": str(int(row["runs"])) if row["runs"] else "—",
                "Seeds": str(row["seeds"]) or "—",
                "Made on": _days(str(row["date"])[:10], str(row.get("last", ""))[:10]),
                "Age": _age(str(row["date"])[:10], today),
                "Commit": commit or "—",
                "Machine": ", ".join(str(row[name]) for name in ("cpu", "device") if row[name]),
                "Versions": ", ".join(versions),
            }
        )
    yield Part("inputs", "How old the inputs are, and where they were made", text, [Shown("", pd.DataFrame(lines))])


def _days(first: str, last: str) -> str:
    return " to ".join(dict.fromkeys(day for day in (first, last) if day)) or "not noted"


def _age(made: str, today: date) -> str:
    try:
        days = (today - date.fromisoformat(made)).days
    except ValueError:
        return "—"
    return "today" if days == 0 else f"{days} day{'s' if days != 1 else ''}"
