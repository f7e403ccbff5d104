"""The names that claims and saved tables may use: another one is misspelt, and no reason to leave a claim open.

Most are of rooms that a report does not load; ``tests/reporting/test_names.py`` holds them to those.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import AfterValidator

from diablo_theory.errors import ResultsError, nearest
from diablo_theory.files import experiments_folder

#: Of runs: ``methods.Method``.
METHODS = (
    *("none", "full", "diablo", "diablo-additive", "lora", "rslora", "dora", "pissa", "olora", "lora-ga", "eva"),
    *("corda", "lora-fa", "lora-plus", "adalora", "vera", "randlora", "miss", "bone", "c3a", "shira", "galore"),
    *("random-blocks", "permuted-blocks", "random-entries", "random-rows", "random-columns", "s2ft-rows"),
    "s2ft-columns",
)
_COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
#: What runs are scored on: those of ``finetune.tasks.TASKS`` that have a metric.
TASKS = (
    *("word_problems", "docstrings", *_COMMONSENSE, "gsm8k", "gsm8k_metamath", "gsm8k_math10k", "math", "svamp"),
    *("mawps", "aqua", "humaneval", "hexphi"),
)
#: Of the theory: ``theory.checks.CHECKS``.
CHECKS = ("G1", "G2", "L1", "L2", "L3", "L4", "L5", "L6", "L7", "S1", "S2", "S3", "D1", "D2")
#: Of reproductions: ``experiments/reproduce.yaml``.
PROFILES = ("quick", "default", "full")
#: Of the step benchmark: ``bench.workloads.METHODS``.
CONTENDERS = (
    *("floor", "inputs", "diablo", "diablo-additive", "einsum", "lora", "dora", "miss", "c3a", "lora-fa", "shira"),
    "full",
)
#: What captures of a layer are of, and where LoRA starts, with DiaBlo's start and LoRA's set of all updates of a rank:
#: ``theory.diagnosis``.
CAPTURED = ("diablo", "lora", "lora-frozen-a")
STARTS = ("zero", "any", "usual", "eva", "lora-ga", "pissa", "corda")
#: Of published numbers: every suite with its tables.
PUBLISHED = {
    "commonsense": (*_COMMONSENSE, "average"),
    "arithmetic": ("gsm8k", "math", "average"),
    "arithmetic_100k": ("gsm8k",),
    "math_10k": ("addsub", "aqua", "gsm8k", "mawps", "multiarith", "singleeq", "svamp", "average"),
    "gsm8k": ("gsm8k",),
    "code": ("humaneval",),
    "code_100k": ("humaneval",),
    "safety": ("hex_phi",),
    "quantised": ("average",),
    "quantised_gsm8k": ("gsm8k",),
    "quantisers": ("wikitext2", "c4"),
    "patterns": ("gsm8k", "cost"),
    "efficiency": ("cost",),
    "parameters": ("parameters",),
}


def suites() -> tuple[str, ...]:
    """Of runs: folders of run files, which give them their suites."""
    folder = experiments_folder()
    return tuple(sorted({file.parent.name for file in folder.glob("*/*.yaml")} - {"sweeps"}))


def known(what: str, name: str, names: Iterable[str]) -> str:
    """A name, if it is one of those that there are.

    Raises:
        ResultsError: If it is not; it tells the nearest one.
    """
    names = tuple(names)
    if name not in names:
        raise ResultsError(f"unknown {what} {name!r}.{nearest(name, names)}")
    return name


def one_of(what: str, names: Iterable[str]) -> AfterValidator:
    """What makes pydantic refuse another name, as :func:`known` does."""
    return AfterValidator(lambda name: known(what, name, names))
