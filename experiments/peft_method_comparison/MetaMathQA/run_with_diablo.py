"""Run a script of peft's method comparison with DiaBlo known to peft: ``python run_with_diablo.py run.py -v PATH``."""

import runpy
import sys
from pathlib import Path

from diablo_theory import DiaBloConfig  # noqa: F401  # enters DiaBlo into the tables of peft, which finds no tuner itself

if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
    sys.exit("usage: python run_with_diablo.py run.py [its arguments]; stand in peft's method_comparison/MetaMathQA")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as if the script had been started itself
runpy.run_path(sys.argv[0], run_name="__main__")
