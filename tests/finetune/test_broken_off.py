"""Runs that end in the middle, by a real kill -9 or a full disk, and are started again by the same command."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from safetensors.torch import load_file
from same_runs import assert_same_result

from diablo_theory.finetune import runs, train
from diablo_theory.finetune.config import resolve
from diablo_theory.progress import Board

SMALL = {
    "num_blocks": 6,
    "steps": 7,
    "batch_size": 4,
    "warmup_steps": 2,
    "save_every": 2,
    "evaluate_on": ["word_problems", "docstrings"],
    "eval_items": 3,
    "learning_rate": 1e-2,
    "device": "cpu",
}
#: Where runs are killed: the owner of a function and its name, which call of it, whether after it has returned; what
#: is there then, and how many partial files and folders.
TRAINED = {"trainable", "log"}
SCORED = TRAINED | {"word_problems", "docstrings"}
PLACES = {
    "step": ("train.AdapterTrainer", "training_step", 6, False, set(), 0),
    "checkpoint": ("train", "write_tensors", 2, True, set(), 0),  # the second one: weights, and no optimizer yet
    "weights-log": ("runs", "write_with", 1, False, {"trainable"}, 0),
    "tasks": ("scoring", "evaluate", 2, False, TRAINED | {"word_problems"}, 0),
    "predictions": ("scoring.pd.DataFrame", "to_csv", 3, True, TRAINED | {"word_problems"}, 1),
    "adapter": ("runs.PeftModel", "save_pretrained", 1, True, SCORED, 1),
    "inputs": ("runs", "write_json", 2, False, set(), 0),  # noted, and the folder has no owner yet
    "conclusion": ("runs", "write_json", 4, False, SCORED | {"adapter"}, 0),
}
#: Does a run in a process for each place, in a folder called after it, and kills that process there.
DRIVER = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import SilentBoard
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from diablo_theory.finetune import runs, scoring, train
from diablo_theory.finetune.config import RunConfig
from diablo_theory.finetune.tasks import TASKS, Wanted
TASKS["docstrings"].examples(Wanted("test", 1))  # it reads much code, and so here once for all processes

def deadly(original, call, after):
    calls = []
    def function(*arguments, **options):
        calls.append(1)
        result = original(*arguments, **options) if after or len(calls) != call else None
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return function

ends = {{}}
for place, (owner, name, call, after, *_) in {places!r}.items():
    child = os.fork()
    if child == 0:
        setattr(eval(owner), name, deadly(getattr(eval(owner), name), call, after))
        runs.execute(RunConfig.model_validate_json({config!r}), Path({folder!r}) / place, SilentBoard())
        os._exit(0)
    ends[place] = os.waitpid(child, 0)[1]
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def config(tiny_model):
    def make(**changes):
        return resolve(SMALL, {"model": str(tiny_model), "method": "lora"}, changes)

    return make


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.execute(config(), folder, Board(Console(quiet=True)))
    return folder


def there(folder):
    """What of a run's record is there, and how many partial files and folders."""
    names = ("trainable.safetensors", "log.csv", "predictions/word_problems.csv", "predictions/docstrings.csv")
    found = {Path(name).stem for name in (*names, "adapter", "metrics.json") if (folder / name).exists()}
    return found, len(list(folder.rglob(".partial-*")))


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """The folder of the runs that were killed, and how their processes ended."""
    folder = tmp_path_factory.mktemp("killed")
    tests = os.path.dirname(os.path.dirname(__file__))
    script = DRIVER.format(tests=tests, places=PLACES, config=config().model_dump_json(), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", PLACES)
def test_killed_without_warning_and_continued_equals_undisturbed(config, undisturbed, killed, board, place):
    """A real kill -9, in a process of its own."""
    folder, ends = killed[0] / place, killed[1]
    assert ends[place] == signal.SIGKILL
    assert there(folder) == PLACES[place][-2:]
    assert (folder / "checkpoints").exists() == (place not in ("inputs", "conclusion"))
    runs.execute(config(), folder, board)
    assert there(folder) == (SCORED | {"adapter", "metrics"}, 0)
    assert_same_result(undisturbed, folder)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (undisturbed, folder)]
    assert all(adapters[0][key].equal(adapters[1][key]) for key in adapters[0].keys() | adapters[1].keys())


def test_a_disk_that_fills_up_with_predictions_is_one_message_and_loses_nothing(
    shell, config, undisturbed, tiny_model, tmp_path, monkeypatch
):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "lora.yaml").write_text(f"method: lora\nmodel: {tiny_model}\n")
    settings = [f"{key}={value}" for key, value in SMALL.items()]
    to_csv, calls = pd.DataFrame.to_csv, []

    def full(self, path, **options):
        calls.append(path)
        if len(calls) == 3:  # the log, the first task's, the second's
            path.write_text("item,clus")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return to_csv(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        status, _, err = shell("train", "none/lora.yaml", *settings, "--out", "run")
    assert status == 1
    assert err.count("error:") == 1
    assert "No space left on device" in err
    assert "Nothing that was whole is lost: mend it and run the same command again" in err
    assert there(tmp_path / "run") == (TRAINED | {"word_problems"}, 0)
    assert shell("train", "none/lora.yaml", *settings, "--out", "run")[0] == 0
    assert_same_result(undisturbed, tmp_path / "run")


def test_a_run_with_dropout_draws_it(config, undisturbed, tmp_path, board):
    runs.execute(config(dropout=0.3), tmp_path / "run", board)
    losses = [pd.read_csv(folder / "log.csv")["loss"] for folder in (undisturbed, tmp_path / "run")]
    assert (losses[0] != losses[1]).any()


@pytest.mark.parametrize("stop_at", [1, 5], ids=["before-a-checkpoint", "after-one"])
@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3},
        {"micro_batch_size": 2},
        {"dropout": 0.3, "micro_batch_size": 2},
        {"dropout": 0.3, "micro_batch_size": 2, "method": "diablo"},
    ],
    ids=["dropout", "micro", "both", "both-diablo"],
)
def test_what_is_drawn_and_what_is_summed_goes_on_where_it_was(config, tmp_path, board, monkeypatch, changes, stop_at):
    wanted = config(evaluate_on=["word_problems"], **changes)
    runs.execute(wanted, tmp_path / "whole", board)
    step, parts = train.AdapterTrainer.training_step, []

    def interrupted(self, *arguments):
        if self.state.global_step == stop_at:
            parts.append(1)
            if len(parts) == (2 if wanted.micro_batch_size else 1):  # with micro-batches in the middle of a step
                raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.AdapterTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.execute(wanted, tmp_path / "parts", board)
    runs.execute(wanted, tmp_path / "parts", board)
    assert_same_result(tmp_path / "whole", tmp_path / "parts")
