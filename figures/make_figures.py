"""Draw every figure again from saved results, and renew README's tables: nothing is trained or solved here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from diablo_theory.errors import DiabloTheoryError, ResultsError
from diablo_theory.files import write_text
from diablo_theory.reporting.plots import save_figures
from diablo_theory.reporting.results import collect
from diablo_theory.reporting.speeds import read_speeds, readable_speeds
from diablo_theory.reporting.steps import aims, draw_steps, read_steps, readable_steps, side_measures, summarise
from diablo_theory.reporting.style import save
from diablo_theory.reporting.suite_plots import methods, settings
from diablo_theory.reporting.suite_tables import build_sections, readable_sections
from diablo_theory.reporting.suites import Suites, read_suites
from diablo_theory.reporting.tables import Tables, build, markdown, readable

HERE = Path(__file__).resolve().parent
SAVED = HERE.parent / "paper_results" / "reproduced"
README = HERE.parent / "README.md"
SPEEDS = HERE.parent / "paper_results" / "speed"
STEPS = HERE.parent / "paper_results" / "steps"
SUITES = SAVED / "suites"
SMALL = "Small scale: SmolLM2-135M on two CPU cores; not comparable to the paper's 7B numbers"
COLLECT = (
    "nothing saved for it yet; `diablo-theory sweep experiments/sweeps/small_scale.yaml --out results/small_scale` "
    "and `diablo-theory collect results/small_scale --out paper_results/reproduced/suites` produce it"
)
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
            aims(times, contenders),
            side_measures(steps),
        ],
    }
    where = {"paper_results/speed": measured_on(speeds), "paper_results/steps": measured_on(contenders)}
    for name, frames in sections.items():
        body = "\n".join(markdown(frame) for frame in frames)
        readme = with_section(readme, name, body + (f"\n{where[name]}\n" if name in where else ""))
    if suites is None:
        return readme
    return with_section(readme, "paper_results/reproduced/suites", readable_sections(suites))


def saved_suites() -> Suites | None:
    """The collected runs of the paper's suites, or None while there are none."""
    return read_suites(SUITES) if SUITES.is_dir() else None


def measured_on(lines: pd.DataFrame) -> str:
    """Where saved measures come from, in a sentence for each machine."""
    places = lines[["cpu", "threads", "torch"]].drop_duplicates().itertuples(index=False)
    return "\n".join(f"Measured on {cpu}, {threads} threads, torch {torch}." for cpu, threads, torch in places)


def main(arguments: list[str] | None = None) -> int:
    """Read the saved results, write the figures and README's tables, and say what was written and what skipped."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python figures/make_figures.py --results results --out /tmp/figures",
    )
    parser.add_argument(
        *("--results",),
        type=Path,
        default=SAVED,
        help="folder that `diablo-theory reproduce` wrote (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help=f"where PDF and PNG files go (default for the saved results: {HERE})")
    options = parser.parse_args(arguments)
    if options.out is None and options.results != SAVED:
        parser.error("--results needs --out: the figures beside this script are those of the saved results")
    options.out = options.out or HERE
    try:
        data = collect(options.results)
        tables = build(data)
        written, skipped = save_figures(data, tables, options.out)
        if options.results == SAVED:
            written += save(draw_steps(summarise(*read_steps(STEPS))), options.out, "steps")
            suites = saved_suites()
            if suites is None:
                skipped["suites_methods, suites_settings"] = COLLECT
            else:
                sections = build_sections(suites)
                written += save(methods(sections["methods"], SMALL), options.out, "suites_methods")
                written += save(settings(sections, SMALL), options.out, "suites_settings")
            renewed = with_tables(README.read_text(encoding="utf-8"), tables, read_speeds(SPEEDS), STEPS, suites)
            write_text(README, renewed)
            written.append(README)
    except DiabloTheoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path}")
    for stem, why in skipped.items():
        print(f"skipped {stem}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
