"""Numbers in README's prose: each comes from a saved result or from the code, or is said below to be no result.

Generated tables are held to their data in tests/test_readme.py, and deviations are tagged in the code that makes them.
"""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.finetune import sweep
from diablo_theory.finetune.config import resolve
from diablo_theory.reading import read_yaml
from diablo_theory.reporting.intervals import CONFIDENCE
from diablo_theory.theory.maps import Grid

ROOT = Path(__file__).resolve().parents[1]
SAVED = ROOT / "paper_results"


def saved(name):
    return pd.read_csv(SAVED / name)


def descent():
    (full,) = saved("descent/descent.csv").query("method == 'full'")["parameters"].unique()
    return round(full**0.5), round(full**0.5)


def speed():
    layer, cells = (saved(f"speed/{name}.csv")["setting"].iloc[0] for name in ("layer", "map"))
    (size, tokens) = re.match(r"m1=m2=(\d+) tokens=([\d,]+)", layer).groups()
    return cells.split(" cells")[0], size, size, tokens


def notebook():
    cells = json.loads((ROOT / "notebooks" / "4_a_real_model.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", ()))
    found = re.findall(r"(\d+) tokens through (\d+) layers", text)
    (layers,) = {layers for _, layers in found}
    return layers, sum(int(tokens) for tokens, _ in found)


def diagnosis():
    layers = saved("diagnosis/layers.csv")
    return len(layers), layers["tokens"].iloc[0]


def trained():
    runs = list((SAVED / "reproduced" / "runs").iterdir())
    configs = [json.loads((run / "config.json").read_text(encoding="utf-8")) for run in runs]
    (steps,) = {config["steps"] for config in configs}
    return steps, len({config["seed"] for config in configs})


def searched():
    rates = saved("reproduced/learning_rates.csv")
    (steps,) = rates["steps"].unique()
    return rates["learning_rate"].nunique(), rates["method"].nunique(), steps, rates["seed"].nunique()


def workload():
    (name,) = saved("steps/contenders.csv")["workload"].unique()
    return re.fullmatch(r"smollm2-135m, (\d+) layers, (\d+) x (\d+) tokens", name).groups()


def kernels():
    sizes = saved("steps/kernels.csv")[["m1", "m2"]]
    return sizes.to_numpy().min(), sizes.to_numpy().max()


def quick():
    profiles, usual = read_yaml(ROOT / "experiments" / "reproduce.yaml"), resolve()
    less = profiles["quick"]["set"]
    return less["steps"], usual.steps, usual.eval_items - less["eval_items"], usual.eval_items


def whole():
    more = read_yaml(ROOT / "experiments" / "reproduce.yaml")["full"]["set"]
    return more["steps"], more["eval_items"]


#: What README says, and where its numbers come from, in their order.
MADE = {
    "{} runs of minutes": lambda: [
        len(sweep.planned(sweep.read_sweep(ROOT / "experiments" / "sweeps" / "small_scale.yaml")))
    ],
    "Intervals are {:.0%}": lambda: [CONFIDENCE],
    "random problems up to {} x {}": lambda: [Grid().rows, Grid().size],
    "beyond it | {} x {}, float64": descent,
    "a map of {} cells | {} x {}, {} tokens": speed,
    "SmolLM2-135M, {} layers, {:,} tokens": notebook,
    "; {} layers, {:,} tokens": diagnosis,
    "untouched, full, LoRA, DiaBlo | SmolLM2-135M, {} steps, {} seed": trained,
    "{} rates, {} methods, {} steps, {} seed": searched,
    "{} short problems a step": lambda: [resolve().batch_size],
    "SmolLM2's shapes, {} layers, {} x {} tokens": workload,
    "layers of {} to {:,}": kernels,
    "a model of {:.1f}B": lambda: [saved("steps/loading.csv")["parameters"].iloc[0] / 1e9],
    "({} instead of {}), {} of the {} test problems": quick,
    "{} steps, up to {:,} test problems": whole,
    "With Python {} or newer": lambda: re.findall(
        r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ),
}
#: Numbers that are no result, as patterns with what stands around them.
NO_RESULT = {
    r"ICLR 2026": "when the paper was published",
    r"grad A = 0": "a statement that G2 checks",
    r"from 4 x 4 matrices to a layer": "the smallest and largest of the tests",
    r"\b[248]-bit\b|\b[248] bits\b|2 to 8 bits|at 2 to 4 bits": "formats",
    r"bitsandbytes 0\.50": "a version",
    r"2 CPU cores": "the machine",
    r"notebook 4": "its name",
    r"FSDP 1 and 2": "versions",
    r"\(540 MB;": "135 million parameters of four bytes",
}
#: Not a part of a name, such as SmolLM2-135M, 7B or arXiv 2506.03230v2.
NUMBER = re.compile(r"(?<![\w.-])\d(?:[\d,.]*\d)?(?!\w|[.,]\d)")


def prose():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^## Deviations\n.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- generated.*?<!-- end of generated -->|```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)
    return " ".join(text.split())


@pytest.mark.parametrize("phrase", MADE)
def test_prose_says_what_is_saved(phrase):
    assert phrase.format(*MADE[phrase]()) in prose()


def without_producer(text):
    for phrase, make in MADE.items():
        text = text.replace(phrase.format(*make()), "")
    for pattern in NO_RESULT:
        text = re.sub(pattern, "", text)
    return {found[0]: text[max(0, found.start() - 40) : found.end() + 20] for found in NUMBER.finditer(text)}


def test_every_number_of_prose_has_a_producer_or_is_no_result():
    assert without_producer(prose()) == {}


def test_a_number_without_a_producer_is_found():
    text = "SmolLM2-135M is 1.7 times as fast in 61 steps, 1 seed, of arXiv 2506.03230v2."
    assert list(without_producer(text)) == ["1.7", "61", "1"]


def test_nothing_is_excused_that_is_not_there():
    assert [pattern for pattern in NO_RESULT if not re.search(pattern, prose())] == []
