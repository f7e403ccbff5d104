"""Draw every figure again from saved results: nothing is trained or solved here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diablo_theory.errors import DiabloTheoryError
from diablo_theory.reporting.plots import save_figures
from diablo_theory.reporting.results import collect
from diablo_theory.reporting.tables import build

HERE = Path(__file__).resolve().parent
SAVED = HERE.parent / "paper_results" / "reproduced"


def main(arguments: list[str] | None = None) -> int:
    """Read the saved results, write the figures, and say what was written and what was skipped."""
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
    parser.add_argument("--out", type=Path, default=HERE, help="where PDF and PNG files go (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        data = collect(options.results)
        written, skipped = save_figures(data, build(data), options.out)
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
