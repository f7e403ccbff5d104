"""Collections that are made of several: of parts of a sweep, done on different machines and days."""

import shutil

import pandas as pd
import pytest
from rich.console import Console

from diablo_theory.errors import ResultsError
from diablo_theory.finetune import runs
from diablo_theory.finetune.config import resolve
from diablo_theory.progress import Board
from diablo_theory.reporting.joining import collected, gather
from diablo_theory.reporting.suites import collect_suites, read_suites, save_suites

OPTIONS = {
    "suite": "word_problems",
    "num_blocks": 6,
    "steps": 2,
    "batch_size": 2,
    "warmup_steps": 0,
    "eval_items": 4,
    "device": "cpu",
    "learning_rate": 1e-2,
}
#: Folders of a sweep, in an order in which names as strings and as folders differ ("a-b/x" and "a/x").
NAMES = {
    "word_problems/diablo": {},
    "word_problems/none": {"method": "none"},
    "word_problems-other/lora": {"method": "lora"},
}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, own in NAMES.items():
        runs.execute(resolve(OPTIONS, {"model": str(tiny_model), **own}), root / name, Board(Console(quiet=True)))
    return root


def part(whole, root, *names):
    for name in names:
        shutil.copytree(whole / name, root / name)
    return root


def saved(suites, folder):
    return {file.name: file.read_bytes() for file in save_suites(suites, folder)}


def test_parts_make_the_files_that_the_whole_makes(whole, tmp_path):
    """Also where a column has gaps in one part alone: of the untouched model alone, no training time is a number."""
    first, *others = NAMES
    kept = tmp_path / "kept"
    save_suites(collect_suites(part(whole, tmp_path / "monday", *others)), kept)
    joined = gather([part(whole, tmp_path / "tuesday", first), kept])
    assert saved(joined, kept) == saved(collect_suites(whole), tmp_path / "whole")


def test_a_run_that_several_have_counts_once(whole, tmp_path):
    kept = tmp_path / "kept"
    before = saved(collect_suites(whole), kept)
    assert saved(gather([kept, whole, kept]), tmp_path / "again") == before


def test_sources_that_disagree_on_a_run_are_refused_or_the_first_is_taken(whole, tmp_path):
    other = collect_suites(whole)
    other.outcomes.loc[other.outcomes["run_id"] == "word_problems/none", "loss_sum"] += 1.0
    save_suites(other, tmp_path / "kept")
    with pytest.raises(ResultsError, match=r"word_problems/none is in .* other outcomes, in .*kept: .*--replace"):
        gather([whole, tmp_path / "kept"])
    taken = gather([whole, tmp_path / "kept"], replace=True)
    pd.testing.assert_frame_equal(taken.outcomes, collect_suites(whole).outcomes)
    taken = gather([tmp_path / "kept", whole], replace=True)
    pd.testing.assert_frame_equal(taken.outcomes, other.outcomes)


def test_another_time_or_machine_is_no_disagreement(whole, tmp_path):
    other = collect_suites(whole)
    other.configs["train_seconds"] *= 2
    other.configs["cpu"] = "another one"
    save_suites(other, tmp_path)
    pd.testing.assert_frame_equal(gather([tmp_path, whole]).configs, other.configs)


def test_a_collection_knows_its_runs_by_what_makes_them_other_runs(whole, tiny_model, tmp_path):
    save_suites(collect_suites(whole), tmp_path)
    asked = {name: resolve(OPTIONS, {"model": str(tiny_model), **own}) for name, own in NAMES.items()}
    configs = {name: config.identity for name, config in asked.items()}
    assert collected(tmp_path, configs) == set(NAMES)
    name = "word_problems/diablo"
    others = {"seed": 1, "rank": 3, "quantise": {"method": "rtn", "bits": 4}, "target_modules": ["q_proj"], "new": 1}
    for key, value in others.items():
        assert collected(tmp_path, {name: configs[name] | {key: value}}) == set(), key
    assert collected(tmp_path, {"word_problems/another": configs[name]}) == set()


def test_a_sweep_goes_on_where_a_collection_ends(tiny_model, shell, tmp_path):
    said = ["sweep", "word_problems/none.yaml", "--set", f"model={tiny_model}", "--set", "eval_items=4"]
    said += ["--set", "num_blocks=6", "--out"]
    assert shell(*said, tmp_path / "first", "--vary", "seed=0")[0] == 0
    assert shell("collect", tmp_path / "first", "--out", tmp_path / "kept")[0] == 0
    again = [*said, tmp_path / "second", "--vary", "seed=0,1", "--collected", tmp_path / "kept"]
    assert "1 runs, and 1 in" in shell(*again, "--dry-run")[1].replace("\n", " ")
    status, out, _ = shell(*again)
    assert status == 0
    assert "1 finished, 1 collected before" in out
    assert not (tmp_path / "second" / "word_problems" / "none-seed=0").exists()
    assert shell("collect", tmp_path / "second", tmp_path / "kept", "--out", tmp_path / "kept")[0] == 0
    assert len(read_suites(tmp_path / "kept").configs) == 2


def test_a_sweep_asked_to_skip_what_no_collection_holds_says_so(shell, tmp_path):
    status, _, told = shell("sweep", "word_problems/none.yaml", "--collected", tmp_path, "--dry-run")
    assert status == 1
    assert "rows.csv cannot be read" in told.replace("\n", " ")
