"""Draw every figure again from saved results, as `diablo-theory figures` does, and renew README's tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from diablo_theory.errors import DiabloTheoryError, ResultsError
from diablo_theory.files import write_text
from diablo_theory.reporting.claims import readable_claims
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.figures import draw_figures
from diablo_theory.reporting.overview import counted, decided_claims
from diablo_theory.reporting.results import collect
from diablo_theory.reporting.speeds import read_speeds, readable_speeds
from diablo_theory.reporting.steps import aims, read_steps, readable_steps, side_measures, summarise
from diablo_theory.reporting.suite_tables import readable_sections
from diablo_theory.reporting.suites import Suites, read_suites
from diablo_theory.reporting.tables import Tables, build, markdown, readable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SAVED = ROOT / "paper_results" / "reproduced"
README = ROOT / "README.md"
SPEEDS = ROOT / "paper_results" / "speed"
STEPS = ROOT / "paper_results" / "steps"
SUITES = SAVED / "suites"
END = "<!-- end of generated -->"
IN_README = ("results", "differences", "costs")


def with_section(readme: str, name: str, body: str) -> str:
    """README's text with what lies between the markers of a generated section renewed.

    Raises:
        ResultsError: If a marker is missing.
    """
    begin = f"<!-- generated from {name};"
    before, found, rest = readme.partition(begin)
    first_line, newline, old = rest.partition("\n")
    _, end, after = old.partition(END)
    if not (found and newline and end):
        raise ResultsError(f"README.md lacks the lines that begin with {begin!r} and {END!r}")
    return f"{before}{begin}{first_line}\n\n{body}\n{end}{after}"


def with_tables(readme: str, tables: Tables, speeds: pd.DataFrame, steps: Path, suites: Suites | None) -> str:
    """README's text with the tables of the saved results renewed."""
    words = readable(tables)
    times, contenders = read_steps(steps)
    sections = {
        "paper_results/reproduced": [words[name] for name in IN_README if name in words],
        "paper_results/speed": [readable_speeds(speeds)],
        "paper_results/steps": [
            readable_steps(summarise(times, contenders)),
            _measured_twice(aims(times, contenders), steps / "again"),
            side_measures(steps),
        ],
    }
    decided = [found for found in decided_claims(Evidence(SAVED, ROOT / "paper_results")) if found.claim.by == "paper"]
    sections["paper_results/claims.yaml"] = [readable_claims(decided)[["Claim", "Outcome", "Evidence", "Scale"]]]
    where = {"paper_results/speed": measured_on(speeds), "paper_results/steps": measured_on(contenders)}
    where["paper_results/claims.yaml"] = counted(decided)
    for name, frames in sections.items():
        body = "\n".join(markdown(frame) for frame in frames)
        readme = with_section(readme, name, body + (f"\n{where[name]}\n" if name in where else ""))
    if suites is None:
        return readme
    return with_section(readme, "paper_results/reproduced/suites", readable_sections(suites))


def _measured_twice(asked: pd.DataFrame, again: Path) -> pd.DataFrame:
    """The aims with what a second measurement gave, on another day, where it is kept."""
    if not again.is_dir():
        return asked
    second = aims(*read_steps(again)).rename(columns={"Measured": "Measured again", "Met": "Met again"})
    return asked.merge(second[["Measure", "N", "Measured again", "Met again"]], how="left")


def saved_suites() -> Suites | None:
    """The collected runs of the paper's suites, or None while there are none."""
    return read_suites(SUITES) if SUITES.is_dir() else None


def measured_on(lines: pd.DataFrame) -> str:
    """Where saved measures come from, in a sentence for each machine."""
    places = lines[["cpu", "threads", "torch", "date"]].drop_duplicates().itertuples(index=False)
    return "\n".join(
        f"Measured on {cpu}, {threads} threads, torch {torch}, on {date}." for cpu, threads, torch, date in places
    )


def main(arguments: list[str] | None = None) -> int:
    """Draw the figures, renew README's tables, and say what was written and what skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python figures/make_figures.py --out /tmp/figures"
    )
    parser.add_argument(
        *("--out",),
        type=Path,
        default=HERE,
        help="where PDF, SVG and PNG files go (default: %(default)s); anywhere else README stays as it is",
    )
    options = parser.parse_args(arguments)
    try:
        written, skipped = draw_figures(ROOT / "paper_results", options.out)
        if options.out == HERE:
            tables = build(collect(SAVED))
            renewed = with_tables(
                README.read_text(encoding="utf-8"), tables, read_speeds(SPEEDS), STEPS, saved_suites()
            )
            write_text(README, renewed)
            written.append(README)
    except (DiabloTheoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path}")
    for stem, why in skipped.items():
        print(f"skipped {stem}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
