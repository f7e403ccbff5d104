"""The commands on runs, as a user types them."""

import io
import json
import re
import sys

import pandas as pd
import pytest
from rich.console import Console
from rich.text import Text

from diablo_theory.cli import common
from diablo_theory.cli.common import console
from diablo_theory.finetune.config import ELSEWHERE, resolve
from diablo_theory.progress import Board
from diablo_theory.records import METRICS

RUN = ["num_blocks=6", "steps=2", "batch_size=2", "warmup_steps=1", "eval_items=4", "device=cpu", "save_every=1"]


@pytest.fixture
def words(tmp_path, tiny_model, monkeypatch):
    """A folder with two run files, and a cache."""
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "words"
    folder.mkdir()
    for method in ("lora", "diablo"):
        (folder / f"{method}.yaml").write_text(f"method: {method}\nmodel: {tiny_model}\n")
    return folder


def test_train_then_look_then_score_on_more(shell, tmp_path, words):
    assert shell("train", "words/lora.yaml", *RUN)[0] == 0
    folder = "results/runs/words/lora"
    status, out, _ = shell("show", folder, "-n", 2)
    assert status == 0
    assert "finished, step 2/2" in out
    assert "method=lora" in out
    assert "4 of 4 wrong by exact" in out
    assert out.count("prompt: 'Question:") == 2
    status, out, _ = shell("evaluate", folder, "--tasks", "docstrings")
    assert status == 0
    assert "docstrings (n=4): exact" in out
    assert "word_problems (n=4): exact" in out
    assert set(json.loads((tmp_path / folder / METRICS).read_text())["scores"]) == {"word_problems", "docstrings"}
    status, out, _ = shell("show", folder, "--task", "docstrings", "--errors")
    assert "word_problems:" not in out.split("\n", 4)[-1]
    status, _, err = shell("show", folder, "--task", "docstring")
    assert status == 1
    assert "Did you mean 'docstrings'?" in err


def test_a_run_is_scored_on_data_that_lie_elsewhere(shell, tmp_path, words):
    shell("train", "words/lora.yaml", *RUN)
    folder = "results/runs/words/lora"
    assert "name a data folder (data_root=FOLDER)" in shell("evaluate", folder, "--tasks", "hexphi")[2]
    (tmp_path / "private" / "hex_phi").mkdir(parents=True)
    (tmp_path / "private" / "hex_phi" / "prompts.txt").write_text("\n".join(f"Fold quokka {n}?" for n in range(20)))
    status, out, _ = shell("evaluate", folder, "data_root=private", "eval_batch_size=2", "--tasks", "hexphi")
    assert status == 0
    assert "hexphi" in out
    status, _, err = shell("evaluate", folder, "seed=1")
    assert status == 1
    assert "seed cannot be changed of a run that has been trained; only data_root, device, eval_batch_size" in err
    assert ", ".join(ELSEWHERE) in " ".join(shell("evaluate", "--help")[1].replace("│", " ").split())


def test_scores_that_are_not_of_the_test_split_say_so(shell, words):
    out = shell("train", "words/lora.yaml", *RUN, "eval_split=validation")[1]
    assert "word_problems (n=4, validation): exact" in out
    for command in ("evaluate", "show"):
        assert "word_problems (n=4, validation): exact" in shell(command, "results/runs/words/lora")[1]
    assert "(n=4, validation)" in " ".join(shell("status", "results")[1].split())


def test_scores_have_the_intervals_that_collect_gives(shell, tmp_path, words, monkeypatch):
    monkeypatch.setattr(console, "width", 400)
    run = "results/words/diablo"
    told = [
        shell("train", "words/diablo.yaml", *RUN, "steps=20", "learning_rate=1e-2", "eval_items=40", "--out", run)[1]
    ]
    told += [shell(*command)[1] for command in (["evaluate", run], ["status", "results"], ["show", run])]
    shell("collect", "results", "--out", "collected")
    rows = pd.read_csv(tmp_path / "collected" / "rows.csv").set_index("metric")
    for metric, name, digits, unit in (
        ("exact_match", "exact ", 1, "%"),
        ("lenient_match", "lenient ", 1, "%"),
        ("loss_per_token", "", 4, " nats/token"),
    ):
        row = rows.loc[metric]
        assert row["n"] == 40
        assert row["ci_low"] < row["ci_high"]
        shown = f"{name}{row['value']:.{digits}f}{unit} ({row['ci_low']:.{digits}f} to {row['ci_high']:.{digits}f})"
        for text in told:
            assert "word_problems (n=40): exact" in text
            assert shown in text


def test_a_run_whose_predictions_are_gone_has_scores_without_intervals(shell, tmp_path, words, monkeypatch):
    monkeypatch.setattr(console, "width", 400)
    shell("train", "words/lora.yaml", *RUN, "--out", "results/run")
    (tmp_path / "results/run/predictions/word_problems.csv").unlink()
    for command in ("status", "show"):
        status, out, _ = shell(command, "results" if command == "status" else "results/run")
        assert status == 0
        assert re.search(
            r"exact 0.0%, lenient 0.0%, \d\.\d{4} nats/token \[no intervals: .*word_problems\.csv cannot", out
        )
        assert "move it away, and `diablo-theory evaluate results/run` writes it again" in " ".join(out.split())
    assert shell("evaluate", "results/run")[0] == 0
    assert (tmp_path / "results/run/predictions/word_problems.csv").is_file()


def test_small_scale_puts_its_file_between(shell, tmp_path, words, tiny_model):
    file = words / "big.yaml"
    file.write_text("method: lora\nmodel: meta/huge\nepochs: 3\nrank: 32\nscale: full\n")
    arguments = [
        "train",
        file,
        "--scale",
        "small",
        f"model={tiny_model}",
        "num_blocks=6",
        "steps=2",
        "eval_items=2",
        "device=cpu",
    ]
    assert shell(*arguments)[0] == 0
    config = json.loads((tmp_path / "results/runs/words/big-small/config.json").read_text())
    assert (config["scale"], config["rank"], config["epochs"], config["batch_size"]) == ("small", None, None, 8)


def test_a_sweep_from_folders_and_its_status(shell, words):
    settings = [part for pair in RUN for part in ("--set", pair)]
    status, out, _ = shell("sweep", "words", "--vary", "seed=0,1", *settings, "--dry-run")
    assert status == 0
    assert "4 runs" in out
    status, out, _ = shell("sweep", "words", "--vary", "seed=0,1", *settings)
    assert status == 0
    assert "4 finished; in results/sweep" in out
    status, out, _ = shell("sweep", "words", "--vary", "seed=0,1", *settings)
    assert "4 before" in out
    status, out, _ = shell("status", "results")
    assert status == 0
    assert out.count("finished") == 4
    assert "sweep/words/lora-seed=1" in out


def test_a_sweep_with_a_failure_says_which_and_exits_with_1(shell, words):
    (words / "lora.yaml").write_text("method: lora\nmodel: no-such-model\n")
    status, out, _ = shell("sweep", "words", *[part for pair in RUN for part in ("--set", pair)])
    assert status == 1
    assert "1 finished, 1 failed" in out
    assert "failed: words/lora: model 'no-such-model' is neither" in out
    _, out, _ = shell("status", "results")
    assert re.search(r"words/lora +failed +0/\? +model 'no-such-model' is", out)
    status, out, _ = shell("show", "results/sweep/words/lora")
    assert status == 0
    assert "failed, step 0/? model 'no-such-model' is neither" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nowhere"], "no runs below nowhere"),
        (["show", "nowhere"], "nowhere holds no run: there is no config.json"),
        (["evaluate", "finished", "--tasks", "gsm9k"], "'gsm9k' is no task with a score. Did you mean 'gsm8k'?"),
        (["evaluate", "nowhere"], "nowhere holds no run: there is no config.json"),
        (["sweep", "words/nothing"], "no such file: words/nothing"),
        (["sweep", "empty"], "no run files in empty"),
        (["sweep", "words/lora.yaml", "--set", "stpes=3"], "unknown key 'stpes'. Did you mean 'steps'?"),
        (["sweep", "words/lora.yaml", "--vary", "seed"], "--vary must read KEY=A,B,..., got 'seed'"),
        (["sweep", "words", "--vary", "seed=0", "--vary", "seed=1"], "--vary seed is given twice"),
        (["sweep", "words", "--cluster-option", "timeout_min=9"], "--cluster-option needs --cluster"),
        (["plan", "all.yaml"], "all.yaml is a sweep file (it has `parts`), not a run file"),
        (["train", "words"], "words is a folder: name a file in it"),
        (["sweep", "words", "--cluster", "slurm"], "cluster 'slurm' needs timeout_min=MINUTES"),
        (["sweep", "words", "--cluster", "pbs"], "'pbs' is not one of 'slurm', 'local'"),
        (["sweep", "all.yaml", "words"], "one sweep file at a time, and nothing beside it: all.yaml is one of the 3"),
        (["sweep", "sweeps"], "one sweep file at a time, and nothing beside it: sweeps/a.yaml is one of the 2 files"),
        (["sweep", "all.yaml", "--scale", "full"], "a sweep file says itself"),
        (
            ["train", "words/lora.yaml", "scale=small"],
            "scale cannot be set here: the run file decides it (--scale small makes any run",
        ),
        (["train", "words/lora.yaml", "--scale", "tiny"], "'tiny' is not one of 'small', 'full'"),
        (["train", "words/lora.yaml", "train_on=gsm9k"], "no task is called 'gsm9k'"),
    ],
)
def test_mistakes_are_one_message(shell, tmp_path, words, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "config.json").write_text(resolve().model_dump_json())
    (tmp_path / "sweeps").mkdir()
    for name in ("all.yaml", "sweeps/a.yaml", "sweeps/b.yaml"):
        (tmp_path / name).write_text("parts:\n  - files: [words/lora.yaml]\n")
    status, _, err = shell(*arguments)
    assert status in (1, 2)
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_brackets_are_printed_as_they_are(shell, words, monkeypatch):
    """Paths, model names and messages may look like rich's markup, even like markup that is wrong."""
    settings = [part for pair in RUN for part in ("--set", pair)]
    (words / "lora.yaml").write_text("method: lora\nmodel: 'no[such]/[/tmp/x] :smile:'\n")
    status, out, _ = shell("sweep", "words", *settings, "--out", "[red]out[/]")
    assert status == 1
    assert "1 finished, 1 failed; in [red]out[/]" in out
    assert "failed: words/lora: model 'no[such]/[/tmp/x] :smile:' is neither" in out
    status, out, _ = shell("status", ".")
    assert "[red]out[/]/words/diablo" in out
    status, out, _ = shell("show", "[red]out[/]/words/diablo")
    assert "[red]out[/]/words/diablo: finished" in out
    monkeypatch.setitem(sys.modules, "submitit", None)
    status, _, err = shell("sweep", "words", *settings, "--cluster", "slurm")
    assert "error: a cluster needs submitit: pip install 'diablo-theory[cluster]'" in err


def test_progress_shows_brackets_as_they_are():
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200, _environ={})
        board = Board(console, {"a [/b] :smile:": 1.0})
        with board.stage("a [/b] :smile:"), board.piece("load [/tmp/x] :smile:", 2) as advance:
            advance(2)
        board.skip("[bold]c[/]")
        shown = Text.from_ansi(console.file.getvalue()).plain
        assert "a [/b] :smile: (about 0:01 left in all)" in shown
        assert "load [/tmp/x] :smile: 0:00" in shown
        assert "[bold]c[/] (finished before)" in shown


def test_a_spinner_shows_brackets_as_they_are(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, _environ={})
    monkeypatch.setattr(common, "console", console)
    with common.working("load [/tmp/x]"):
        pass
    assert "load [/tmp/x]" in Text.from_ansi(console.file.getvalue()).plain
