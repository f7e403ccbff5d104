"""What README promises is there: its tables are those of the saved results, its files and commands exist."""

import re
import runpy
from datetime import date
from pathlib import Path

import pandas as pd
import pytest

from diablo_theory.cli import app
from diablo_theory.finetune.config import load_run
from diablo_theory.finetune.tasks import TASKS
from diablo_theory.reporting.claims import readable_claims
from diablo_theory.reporting.evidence import Evidence
from diablo_theory.reporting.overview import decided_claims, overview
from diablo_theory.reporting.published import METHOD_NAMES
from diablo_theory.reporting.report import named_tables
from diablo_theory.reporting.results import collect, tidy_rows
from diablo_theory.reporting.speeds import read_speeds
from diablo_theory.reporting.tables import build, write_all, write_tables
from diablo_theory.theory.checks import run_checks
from diablo_theory.theory.maps import Grid, map_cells

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_saved_results():
    script = runpy.run_path(str(ROOT / "figures" / "make_figures.py"))
    saved = build(collect(script["SAVED"])), read_speeds(script["SPEEDS"]), script["STEPS"]
    assert script["with_tables"](README, *saved, script["saved_suites"]()) == README


def test_the_saved_rows_and_tables_are_those_of_the_saved_results(tmp_path):
    saved = ROOT / "paper_results" / "reproduced"
    data = collect(saved)
    tidy_rows(data).to_csv(tmp_path / "rows.csv", index=False)
    write_tables(build(data), tmp_path / "tables")
    evidence = Evidence(saved, saved.parent)
    write_all(readable_claims(decided_claims(evidence)), tmp_path / "tables", "claims")
    for name, frame in named_tables(overview(evidence, date(2030, 1, 1), pd.DataFrame(columns=["input", "date"]))):
        if name != "inputs":  # it says how old they are today
            write_all(frame, tmp_path / "tables", name)
    made = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*.*") if path.suffix != ".html"}
    again = "run `diablo-theory report --out paper_results/reproduced`"
    kept = {path.name for path in (saved / "tables").iterdir() if path.suffix != ".html" and path.stem != "inputs"}
    assert kept == {path.name for path in made} - {"rows.csv"}, again
    for name, path in made.items():
        assert path.read_text() == (saved / name).read_text(), f"{name}: {again}"


def test_the_saved_theory_is_what_the_code_says():
    folder = ROOT / "paper_results" / "reproduced" / "theory"
    saved, made = pd.read_csv(folder / "verdicts.csv"), run_checks(trials=1)
    what = ["check", "statement", "role", "instance", "tolerance", "tolerance_reason", "premise_holds", "passed"]
    pd.testing.assert_frame_equal(saved.loc[saved["trial"] == 0, what].reset_index(drop=True), made[what])
    cells = pd.DataFrame([cell for task in Grid().tasks() for cell in map_cells(**task)])
    pd.testing.assert_frame_equal(pd.read_csv(folder / "map.csv"), cells, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_every_command_is_listed_and_every_listed_command_exists():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\| `diablo-theory (\w+)", README, flags=re.MULTILINE)) == commands


def test_the_examples_run(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sums, example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(sums, names)
    assert int(names["problem"].space.rank) == 6
    exec(example.replace("path/to/model", str(tiny_model)).replace("num_blocks=64", "num_blocks=6"), names)
    assert not any("diablo" in name for name, _ in names["plain"].named_parameters())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_published_methods_without_a_run_file_are_named():
    files = [*(ROOT / "paper_results" / "published").glob("*_diablo*.csv")]
    rows = pd.concat(map(pd.read_csv, files))
    runs = {(load_run(file).suite, load_run(file).method) for file in (ROOT / "experiments").glob("[!s]*/*.yaml")}
    runs |= {("safety", load_run(file).method) for file in (ROOT / "experiments" / "safety").glob("*.yaml")}
    runs.add(("quantised", "gptq-lora"))  # LoRA on a base of OPTQ's, which is GPTQ
    missing = {
        method for suite, method in zip(rows["suite"], rows["method"], strict=True) if (suite, method) not in runs
    }
    (told,) = re.findall(r"without a method here are (.*?) has a stand-in", README)
    assert set(re.split(r", | and |, and ", told.replace(", and ", ", "))) == {METHOD_NAMES[name] for name in missing}


def test_data_sets_of_full_runs_whose_length_is_not_checked_are_named():
    files = [file for file in (ROOT / "experiments").glob("*/*.yaml") if file.parent.name != "sweeps"]
    full = [config for config in map(load_run, files) if config.scale == "full"]
    assert all("test" in TASKS[name].sizes for config in full for name in config.evaluate_on)
    (told,) = re.findall(
        r"published number of records, but for the training sets (.*?), whose", " ".join(README.split())
    )
    unchecked = {config.train_on for config in full if "train" not in TASKS[config.train_on].sizes}
    assert set(re.findall(r"`(\w+)`", told)) == unchecked


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
