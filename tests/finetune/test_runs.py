import json
import os
import subprocess
import sys
from dataclasses import replace

import filelock
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from same_runs import assert_same_result, deterministic
from transformers import AutoModelForCausalLM

from diablo_theory import files
from diablo_theory.errors import NonFiniteError, ResultsError
from diablo_theory.finetune import evaluate, runs, scoring, train
from diablo_theory.finetune.config import resolve
from diablo_theory.finetune.folder import finished
from diablo_theory.finetune.tasks import TASKS, Wanted
from diablo_theory.reporting.results import LAYOUT_VERSION, collect

SMALL = {
    "num_blocks": 6,
    "steps": 7,
    "batch_size": 4,
    "warmup_steps": 2,
    "save_every": 2,
    "eval_items": 9,
    "eval_batch_size": 4,
    "learning_rate": 1e-2,
    "device": "cpu",
}


@pytest.fixture
def config(tiny_model):
    def make(**changes):
        return resolve(SMALL, {"model": str(tiny_model)}, changes)

    return make


@pytest.mark.parametrize(
    ("method", "groups"), [("full", ["W"]), ("lora", ["A", "B"]), ("diablo", ["D"])], ids=["full", "lora", "diablo"]
)
def test_a_run_learns_and_leaves_a_whole_record(config, tmp_path, board, method, groups):
    folder = tmp_path / "run"
    metrics = runs.execute(config(method=method, steps=30), folder, board)
    log, items, written, weights = deterministic(folder)
    assert log["step"].tolist() == list(range(1, 31))
    assert log["loss"].iloc[-5:].mean() < 0.8 * log["loss"].iloc[:5].mean()
    assert [f"grad_norm/{group}" for group in groups] == [name for name in log if name.startswith("grad_norm/")]
    # The groups are all that is trained, so their norms make up the whole one.
    whole = (log[[f"grad_norm/{group}" for group in groups]] ** 2).sum(axis=1) ** 0.5
    assert (whole / log["grad_norm"] - 1).abs().max() < 1e-4
    assert len(items["word_problems"]) == written["scores"]["word_problems"]["n"] == 9
    assert metrics["trainable_params"] == sum(value.numel() for value in weights.values())
    assert not (folder / "checkpoints").exists()
    assert [piece[1:] for piece in board.pieces] == [(1, 1), (30, 30), (9, 9)]  # load, train, evaluate


def test_lora_a_has_no_gradient_at_first(config, tmp_path, board):
    """G2 on a real Trainer: B starts at zero, so A's first gradient is zero and B's is not."""
    runs.execute(config(method="lora"), tmp_path / "run", board)
    first = pd.read_csv(tmp_path / "run" / "log.csv").iloc[0]
    assert first["grad_norm/A"] == 0.0
    assert first["grad_norm/B"] > 0.0


def test_all_methods_see_the_same_batches_in_the_same_order(config, tmp_path, board, monkeypatch):
    seen = {}
    original = train.AdapterTrainer.training_step

    def spy(self, model, inputs, *rest):
        seen.setdefault(method, []).append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(train.AdapterTrainer, "training_step", spy)
    for method in ("full", "lora", "diablo"):
        runs.execute(config(method=method), tmp_path / method, board)
    assert seen["full"] == seen["lora"] == seen["diablo"]
    assert len(seen["full"]) == 7


def test_same_seed_same_numbers_and_another_seed_others(config, tmp_path, board):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs.execute(config(method="lora", seed=seed), tmp_path / name, board)
    assert_same_result(tmp_path / "a", tmp_path / "b")
    assert not deterministic(tmp_path / "a")[0].equals(deterministic(tmp_path / "c")[0])


@pytest.mark.parametrize("method", ["full", "lora", "diablo"])
@pytest.mark.parametrize("stop_at", [1, 5])
def test_interrupted_and_continued_equals_undisturbed(config, tmp_path, board, monkeypatch, method, stop_at):
    runs.execute(config(method=method), tmp_path / "undisturbed", board)
    original = train.AdapterTrainer.training_step

    def interrupted(self, *arguments):
        if self.state.global_step == stop_at:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.AdapterTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.execute(config(method=method), tmp_path / "continued", board)
    whole = train.last_whole_checkpoint(tmp_path / "continued" / "checkpoints")
    assert (whole is not None) == (stop_at == 5)
    runs.execute(config(method=method), tmp_path / "continued", board)
    assert_same_result(tmp_path / "undisturbed", tmp_path / "continued")


def test_a_half_written_checkpoint_is_not_read(config, tmp_path, board, monkeypatch):
    """Stopped while the second checkpoint was written: the first one, which is whole, is used."""
    runs.execute(config(), tmp_path / "undisturbed", board)

    def torn(self, args, state, control, **rest):
        if state.global_step == 4:
            (tmp_path / "continued" / "checkpoints" / "checkpoint-4" / train.WEIGHTS).write_bytes(b"torn")
            raise KeyboardInterrupt
        return original(self, args, state, control, **rest)

    original = train._Seal.on_save
    with monkeypatch.context() as patch:
        patch.setattr(train._Seal, "on_save", torn)
        with pytest.raises(KeyboardInterrupt):
            runs.execute(config(), tmp_path / "continued", board)
    checkpoints = tmp_path / "continued" / "checkpoints"
    assert (checkpoints / "checkpoint-4").is_dir()
    assert train.last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    runs.execute(config(), tmp_path / "continued", board)
    assert_same_result(tmp_path / "undisturbed", tmp_path / "continued")


def test_interrupted_evaluation_does_not_train_again(config, tmp_path, board, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.execute(config(), tmp_path / "run", board)
    monkeypatch.setattr(runs, "train", interrupted)
    assert runs.execute(config(), tmp_path / "run", board)["scores"]["word_problems"]["n"] == 9


def test_a_finished_run_is_not_done_again(config, tmp_path, board):
    first = runs.execute(config(), tmp_path / "run", board)

    def never(name, device, dtype):
        raise AssertionError

    assert runs.execute(config(), tmp_path / "run", board, load=never) == first


def test_a_truncated_record_is_named_and_can_be_made_again(config, tmp_path, board):
    folder = tmp_path / "run"
    first = runs.execute(config(keep_weights=False), folder, board)
    (folder / "metrics.json").write_text('{"run_id":')
    with pytest.raises(ResultsError, match=r"metrics.json is truncated or damaged .* Delete it and run"):
        runs.execute(config(keep_weights=False), folder, board)
    (folder / "metrics.json").unlink()
    again = runs.execute(config(keep_weights=False), folder, board)  # the weights are gone: trained anew
    assert again["scores"] == first["scores"]


def test_a_finished_run_that_does_not_say_which_it_is_is_refused(config, tmp_path, board):
    (tmp_path / "metrics.json").write_text('{"exact": 1.0}')
    with pytest.raises(ResultsError, match=r"holds metrics\.json, but no config\.json says of which run"):
        runs.execute(config(), tmp_path, board)


def test_a_folder_of_another_run_is_refused_untouched(config, tmp_path, board):
    runs.execute(config(), tmp_path / "run", board)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*.*") if file.is_file()}
    with pytest.raises(ResultsError, match="belongs to a run with seed=0, not 1"):
        runs.execute(config(seed=1), tmp_path / "run", board)
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*.*") if file.is_file()}


def test_nan_stops_before_the_update_and_keeps_the_last_good_state(config, tmp_path, board, monkeypatch):
    original = train.AdapterTrainer.compute_loss

    def poisoned(self, *arguments, **options):
        loss = original(self, *arguments, **options)
        return loss * float("nan") if self.state.global_step == 5 else loss

    monkeypatch.setattr(train.AdapterTrainer, "compute_loss", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(
        NonFiniteError,
        match=r"loss nan .* at step 6 \(training examples 20, 21, 22, 23\).*kept in .*last_good.*checkpoint-4",
    ):
        runs.execute(config(), folder, board)
    good = load_file(folder / "last_good.safetensors")
    assert all(torch.isfinite(value).all() for value in good.values())
    assert any(value.abs().max() > 0 for value in good.values())
    assert train.last_whole_checkpoint(folder / "checkpoints").name == "checkpoint-4"
    assert finished(folder) is None
    # Started again it does not train up to the same NaN once more; told to, it goes on from the checkpoint.
    with pytest.raises(NonFiniteError, match=r"at step 6.*earlier attempt; delete .*failed.json"):
        runs.execute(config(), folder, board)
    monkeypatch.undo()
    (folder / "failed.json").unlink()
    assert runs.execute(config(), folder, board)["steps"] == 7


def test_nan_in_the_model_stops_at_step_one(config, tmp_path, board, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    for file in tiny_model.glob("token*"):
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(NonFiniteError, match="at step 1"):
        runs.execute(config(model=str(tmp_path / "bad")), tmp_path / "run", board)


def test_whatever_a_model_writes_is_kept_to_the_letter(config, tmp_path, board, monkeypatch):
    written = ["a\rb", "", "nan", "NA", "x\r\ny", "\x00z", 'q"q,', "12", " 7\n"]
    expected = list(written)

    def complete(model, tokenizer, batch, decoding, seed=0):
        return [[written[int(example.cluster)]] for example in batch]

    monkeypatch.setattr(evaluate, "complete", complete)
    numbered = [replace(e, cluster=str(i)) for i, e in enumerate(TASKS["word_problems"].examples(Wanted("test", 9)))]
    monkeypatch.setitem(TASKS, "word_problems", replace(TASKS["word_problems"], examples=lambda wanted: numbered))
    runs.execute(config(method="none"), tmp_path / "runs" / "run", board)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": LAYOUT_VERSION, "scale": "small"}))
    assert collect(tmp_path).items["completion"].tolist() == expected


def test_nan_in_evaluation_names_the_problem_and_writes_no_scores(config, tmp_path, board, monkeypatch):
    original = scoring.evaluate

    def poisoned(*arguments, **options):
        items = original(*arguments, **options)
        items.loc[3, "loss_sum"] = float("nan")
        return items

    monkeypatch.setattr(scoring, "evaluate", poisoned)
    with pytest.raises(NonFiniteError, match=r"loss of test problem 3 \(word_problems\) is not finite"):
        runs.execute(config(method="none"), tmp_path / "run", board)
    assert not list((tmp_path / "run").rglob("*.csv"))


def test_two_processes_in_one_folder_are_kept_apart(config, tmp_path, board, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    (tmp_path / "run").mkdir()
    with (
        filelock.FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(ResultsError, match="another process is at work"),
    ):
        runs.execute(config(), tmp_path / "run", board)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
@pytest.mark.parametrize("limit", [3_000, 15_000], ids=["weights", "optimizer"])
@pytest.mark.parametrize("saved", [0, 4], ids=["first", "third"])
def test_a_disk_that_fills_up_in_a_checkpoint_is_an_os_error_and_loses_nothing(
    config, tmp_path, board, monkeypatch, limit, saved
):
    """The kernel refuses to let files grow, as on a full disk, in a process of its own; earlier checkpoints stay."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
from pathlib import Path
from conftest import SilentBoard
from diablo_theory.finetune import runs, train
from diablo_theory.finetune.config import RunConfig

def train_step(self, *arguments):
    if self.state.global_step == {saved}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return step(self, *arguments)

step, train.AdapterTrainer.training_step = train.AdapterTrainer.training_step, train_step
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = RunConfig.model_validate_json({config().model_dump_json()!r})
try:
    runs.execute(config, Path({str(tmp_path / "run")!r}), SilentBoard())
except OSError as error:
    sys.exit(f"refused: {{error.strerror}}: {{error.filename}}")
"""
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "refused: " in died.stderr, died.stderr
    assert "could not be written" in died.stderr
    assert f"checkpoint-{saved + 2}" in died.stderr or limit == 15_000  # torch does not say which file
    assert list((tmp_path / "run").glob(".partial-*")) == []
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = train.last_whole_checkpoint(checkpoints)
    assert whole == (checkpoints / "checkpoint-4" if saved else None)
    if whole is not None:
        assert all(torch.isfinite(value).all() for value in load_file(whole / train.WEIGHTS).values())
    steps, step = [], train.AdapterTrainer.training_step

    def counted(self, *arguments):
        steps.append(self.state.global_step)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.AdapterTrainer, "training_step", counted)
        runs.execute(config(), tmp_path / "run", board)
    assert steps == list(range(saved, 7))  # on from the checkpoint, not from the beginning
    runs.execute(config(), tmp_path / "undisturbed", board)
    assert_same_result(tmp_path / "undisturbed", tmp_path / "run")


def test_weights_are_dropped_when_not_wanted(config, tmp_path, board):
    runs.execute(config(keep_weights=False), tmp_path / "run", board)
    assert not (tmp_path / "run" / train.WEIGHTS).exists()
