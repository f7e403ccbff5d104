"""Run folders whose files are truncated, emptied, edited, gone, or of another version."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from same_runs import assert_same_result

from diablo_theory.errors import ResultsError
from diablo_theory.finetune import runs, saved, train
from diablo_theory.finetune.checkpoints import SEAL, last_whole_checkpoint, seal
from diablo_theory.finetune.config import resolve
from diablo_theory.finetune.folder import check_owner, finished, state
from diablo_theory.records import read_log, read_predictions

METRICS = {
    "label": "LoRA r=3",
    "trainable_params": 10,
    "trainable_pct": 1,
    "steps": 5,
    "train_seconds": None,
    "scores": {"word_problems": {"n": 6, "exact": 0.5, "loss_per_token": 2.5, "means": {"exact": "right"}}},
}
SCORES = {"word_problems": METRICS["scores"]["word_problems"]}
LOG = "step,loss,learning_rate,grad_norm,seconds"
HEADER = "item,cluster,prompt,answer,gold,completion,exact,loss_sum,tokens"


def cut(file):
    file.write_bytes(file.read_bytes()[:60])


@pytest.fixture
def stopped(do, monkeypatch):
    """A run that was stopped in its last step, with checkpoints after the second and the fourth."""
    steps = []

    def interrupted(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    original = train.AdapterTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(train.AdapterTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            do("stopped")


@pytest.fixture
def scored(do):
    """A run that was stopped between training and scoring."""
    folder = do("run")[1]
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "predictions")
    return folder


@pytest.mark.parametrize("damage", [cut, lambda file: file.write_bytes(b""), lambda file: file.unlink()])
def test_a_checkpoint_that_has_lost_something_is_not_gone_on_with(do, stopped, tmp_path, damage):
    checkpoints = tmp_path / "stopped" / "checkpoints"
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    damage(checkpoints / "checkpoint-4" / "optimizer.pt")
    assert last_whole_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    do("stopped")
    do("undisturbed")
    assert_same_result(tmp_path / "undisturbed", tmp_path / "stopped")


def test_seals_say_what_they_are_of(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(b"1234")
        seal(tmp_path / f"checkpoint-{step}", step)
    newest, older = tmp_path / "checkpoint-10", tmp_path / "checkpoint-2"
    assert last_whole_checkpoint(tmp_path) == newest
    for content in ("{}", '{"step": "x"}', '{"step": 99}', '{"step": 10, "files": 3}'):
        (newest / SEAL).write_text(content)
        assert last_whole_checkpoint(tmp_path) == older
    (newest / SEAL).write_text('{"step": 10}')  # as earlier versions wrote it
    assert last_whole_checkpoint(tmp_path) == newest
    newest.rename(tmp_path / "checkpoint-copy")
    assert last_whole_checkpoint(tmp_path) == older
    (older / SEAL).write_text("")
    with pytest.raises(ResultsError, match=r"complete\.json is truncated or damaged"):
        last_whole_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["log.csv", "trainable.safetensors", "predictions", "adapter", "checkpoints", "failed.json"]
)
def test_what_no_configuration_claims_is_neither_taken_nor_replaced(do, tmp_path, name):
    (tmp_path / "mine" / name / "inside").mkdir(parents=True)
    with pytest.raises(
        ResultsError, match=rf"mine holds {name}, but no config\.json says of which run: choose another"
    ):
        do("mine")
    assert (tmp_path / "mine" / name / "inside").is_dir()


def test_a_damaged_configuration_is_not_to_be_deleted(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ResultsError, match=r"config\.json is truncated or damaged .*\. Put back what was there"):
        check_owner(tmp_path, resolve())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "label=None is not allowed: Input should be a valid string"),
        ({"steps": "x"}, "steps='x' is not allowed"),
        ({"train_seconds": "x"}, "train_seconds='x' is not allowed"),
        ({"scores": 3}, "scores=3 is not allowed"),
        ({"scores": {"a": {"n": 1}}}, r"scores\.a\.loss_per_token is missing"),
        ({"scores": {"a": SCORES["word_problems"] | {"exact": "x"}}}, r"scores\.a\.exact='x' is not allowed"),
        ({"scores": {"a": SCORES["word_problems"] | {"later": {"b": 1}}}}, r"scores\.a\.later=.* is not allowed"),
        ({"scores": {"a": SCORES["word_problems"] | {"exact": float("nan")}}}, r"scores\.a\.exact=nan is not allowed"),
    ],
)
def test_metrics_that_cannot_be_used_are_told(tmp_path, changes, message):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS | {"later": [1]}))
    assert finished(tmp_path) == METRICS | {"later": [1]}
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS | changes))
    with pytest.raises(ResultsError, match=rf"metrics\.json was edited, or is of another version: {message}"):
        finished(tmp_path)
    assert "metrics.json was edited" in state(tmp_path)["note"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"later": 3}, "unknown key 'later'"),
        ({"evaluate_on": 3}, "evaluate_on=3 is not allowed: Input should be a valid list"),
        ({"method": "later"}, "method='later' is not allowed"),
        ({"rank": ...}, "rank is missing"),
    ],
)
def test_configurations_that_cannot_be_used_are_told(tmp_path, board, changes, message):
    values = resolve().model_dump(mode="json") | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    with pytest.raises(ResultsError, match=rf"config\.json was edited, or is of another version: {message}"):
        runs.add_scores(tmp_path, [], board)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("completion", "text") + "\n0,c,p,a,g,t,1.0,2.0,3\n", r"lacks the column\(s\) completion"),
        (HEADER.replace("tokens", "toks") + "\n0,c,p,a,g,t,1.0,2.0,3\n", r"lacks the column\(s\) tokens"),
        (HEADER + "\n0,c,p,a,g,t,x,2.0,3\n", r"exact of problem 0 \(row 1\) is 'x'; allowed: a number from 0 to 1"),
        (HEADER + "\n0,c,p,a,g,t,1.0,2.0,3\n1,c,p,a,g,t,1.0\n", r"loss_sum of problem 1 \(row 2\) is ''"),
        ("", "cannot be read"),
    ],
)
def test_damaged_predictions_are_told(tmp_path, text, message):
    file = tmp_path / "word_problems.csv"
    file.write_text(f"{HEADER}\n0,c,p,a,g,t,1.0,2.0,3\n")
    assert len(read_predictions(file)) == 1
    file.write_text(text)
    with pytest.raises(ResultsError, match=rf"word_problems\.csv:? {message}.*Delete it and run the same"):
        read_predictions(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("\xff", "cannot be read"),
        (f"{LOG}\n1,2.0,0.1,1.0,3.0\n", "does not hold the steps 1 to 2"),
        (f"{LOG}\n1,2.0,0.1,1.0,3.0\n2,2.0\n", "has no whole column seconds"),
        ("step,loss,learning_rate,grad_norm\n1,2.0,0.1,1.0\n2,2.0,0.1,1.0\n", "has no whole column seconds"),
        (f"{LOG}\n1,x,0.1,1.0,3.0\n2,2.0,0.1,1.0,3.0\n", "has no whole column loss"),
    ],
)
def test_damaged_logs_are_told(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ResultsError, match=rf"log\.csv {message}"):
        read_log(tmp_path / "log.csv", 2)


def test_a_log_that_lost_steps_is_not_a_shorter_training(do, scored):
    log = (scored / "log.csv").read_text()
    (scored / "log.csv").write_text("".join(log.splitlines(keepends=True)[:3]))
    with pytest.raises(ResultsError, match=r"log\.csv does not hold the steps 1 to 5"):
        do("run")
    (scored / "log.csv").unlink()
    assert do("run")[0]["steps"] == 5


def test_damaged_weights_are_told_whoever_reads_them(do, scored, board):
    weights = scored / "trainable.safetensors"
    whole = weights.read_bytes()
    cut(weights)
    with pytest.raises(ResultsError, match=r"trainable\.safetensors is truncated or damaged"):
        do("run")
    weights.write_bytes(whole)
    do("run")
    cut(weights)
    with pytest.raises(ResultsError, match=r"trainable\.safetensors is truncated or damaged"):
        runs.add_scores(scored, [], board)
    weights.write_bytes(whole)
    save_file({name: torch.zeros(2) for name in load_file(weights)}, weights)
    with pytest.raises(
        ResultsError, match=r"trainable\.safetensors is of another run than the config\.json beside it"
    ):
        runs.add_scores(scored, [], board)


@pytest.mark.parametrize("attempts", [3, [1], [{}], [{"commit": "a"}]])
def test_attempts_that_say_nothing_are_told(tmp_path, attempts):
    (tmp_path / "environment.json").write_text(json.dumps({"attempts": attempts}))
    with pytest.raises(ResultsError, match=r"environment\.json: attempts must each have commit and dirty\. Delete it"):
        saved.read_attempts(tmp_path / "environment.json")


def test_a_failure_that_does_not_say_why_is_one_all_the_same(tmp_path):
    (tmp_path / "error.txt").write_bytes(b"out of \xff")
    assert (state(tmp_path)["state"], state(tmp_path)["note"]) == ("failed", "out of \N{REPLACEMENT CHARACTER}")
    (tmp_path / "failed.json").write_text("{}")
    assert state(tmp_path)["state"] == "failed"
    assert "failed.json does not say why" in state(tmp_path)["note"]
