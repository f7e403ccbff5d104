"""What a run's keys do to it: sizes, lengths, precision, several tasks."""

import json
from dataclasses import replace
from importlib.util import find_spec
from typing import get_args

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from diablo_theory import methods
from diablo_theory.errors import ConfigError, ResultsError
from diablo_theory.finetune import bases, runs, scoring, train
from diablo_theory.finetune.config import resolve
from diablo_theory.finetune.folder import state
from diablo_theory.finetune.models import load_model
from diablo_theory.finetune.setup import read_problems
from diablo_theory.finetune.tasks import TASKS, Decoding, Example, Task
from diablo_theory.finetune.tasks.base import in_both
from diablo_theory.quantise import QuantiseConfig, quantise

#: Methods whose extra is not installed.
NOT_HERE = () if find_spec("galore_torch") else ("galore",)


@pytest.fixture
def yes_or_no(monkeypatch):
    """A task with an end, and with choices."""
    examples = [Example(f"Is {n} even?", f" {n % 2 == 0}", str(n), choices=(" True", " False")) for n in range(10)]
    task = Task(
        "even",
        lambda wanted: examples[: wanted.count],
        {"exact": "right", "likelihood": "likelier"},
        in_both(Decoding(4)),
        in_both(lambda example, texts: {"exact": float(texts[0] == example.answer)}),
    )
    monkeypatch.setitem(TASKS, "even", task)


def trained(folder):
    return load_file(folder / train.WEIGHTS)


def assert_close(first, second, **tolerances):
    first, second = trained(first), trained(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], **tolerances)


def test_small_batches_that_are_summed_are_the_large_one(do):
    """The sum is over tokens, not over means of unequal batches."""
    _, whole = do("whole")
    _, parts = do("parts", micro_batch_size=1)
    _, recomputed = do("recomputed", gradient_checkpointing=True)
    assert_close(whole, parts, rtol=1e-3, atol=1e-5)
    assert_close(whole, recomputed, rtol=1e-3, atol=1e-5)
    norms = [pd.read_csv(folder / "log.csv")["grad_norm/D"] for folder in (whole, parts)]
    assert (norms[0] / norms[1] - 1).abs().max() < 1e-3


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_half_precision_trains_to_about_the_same(do, adapter):
    full, _ = do("full", steps=20)
    half, folder = do("half", steps=20, dtype="bfloat16", adapter_dtype=adapter)
    assert {value.dtype for value in trained(folder).values()} == {getattr(torch, adapter)}
    assert half["final_train_loss"] == pytest.approx(full["final_train_loss"], rel=0.2)
    loss = [found["scores"]["word_problems"]["loss_per_token"] for found in (full, half)]
    assert loss[1] == pytest.approx(loss[0], rel=0.2)


def test_epochs_and_a_slice_of_the_data(do, yes_or_no):
    even = {"train_on": "even", "evaluate_on": ["even"], "steps": None}
    metrics, folder = do("two", epochs=2, **even)
    assert (metrics["steps"], metrics["train_examples"]) == (5, 10)
    assert state(folder)["state"] == "finished"
    metrics, _ = do("slice", epochs=2, train_items=8, **even)
    assert (metrics["steps"], metrics["train_examples"]) == (4, 8)
    metrics, _ = do("whole-batches", epochs=2, drop_last=True, protocol="paper", **even)
    assert metrics["steps"] == 4


def test_several_tasks_each_with_its_own_answers(do, yes_or_no):
    metrics, folder = do("run", evaluate_on=["word_problems", "even"])
    assert {name: found["n"] for name, found in metrics["scores"].items()} == {"word_problems": 6, "even": 6}
    assert 0 <= metrics["scores"]["even"]["likelihood"] <= 1
    assert metrics["scores"]["even"]["means"] == {"exact": "right", "likelihood": "likelier"}
    assert len(scoring.read_predictions(folder / "predictions" / "even.csv")) == 6
    assert metrics["data"].keys() == {"train", "word_problems", "even"}


def test_scores_can_be_added_later_and_are_those_of_the_run(do, yes_or_no, board):
    together, _ = do("together", evaluate_on=["word_problems", "even"])
    _, folder = do("later")
    metrics = runs.add_scores(folder, ["even"], board)
    assert metrics["scores"] == together["scores"]
    assert json.loads((folder / "metrics.json").read_text())["scores"] == together["scores"]


@pytest.mark.parametrize("method", [name for name in get_args(methods.Method) if name not in NOT_HERE])
def test_scores_are_added_to_a_run_of_any_method(do, board, method):
    """Made once more from the weights, they are those that the run has made itself."""
    before, folder = do("run", method=method, steps=3, eval_items=2)
    predictions = folder / "predictions" / "word_problems.csv"
    answers = predictions.read_bytes()
    predictions.unlink()
    after = runs.add_scores(folder, ["word_problems"], board)
    assert after == before
    assert predictions.read_bytes() == answers


def test_scores_of_what_was_never_trained_are_refused(do, tmp_path, board):
    with pytest.raises(ResultsError, match=r"holds no run: there is no config\.json"):
        runs.add_scores(tmp_path, ["word_problems"], board)
    _, folder = do("light", keep_weights=False)
    with pytest.raises(ResultsError, match=r"holds no trained parameters .*keep_weights"):
        runs.add_scores(folder, ["docstrings"], board)


def test_peft_reads_the_adapter_of_a_run(do, tiny_model):
    _, folder = do("run")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "adapter")
    saved = dict(model.named_parameters())
    for name, value in trained(folder).items():
        assert torch.equal(saved[name], value)


def test_data_that_are_not_there_are_told_before_the_model_is_loaded(small, tiny_model, tmp_path, board, monkeypatch):
    def absent(wanted):
        raise ConfigError("no such data")

    monkeypatch.setitem(TASKS, "word_problems", replace(TASKS["word_problems"], examples=absent))

    def never(*arguments):
        raise AssertionError

    with pytest.raises(ConfigError, match="no such data"):
        runs.execute(resolve(small), tmp_path / "run", board, load=never)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("scale", "cut"), [("small", 1000), ("full", 1000), ("full", 1319)])
def test_only_small_runs_may_use_cut_files(tmp_path, scale, cut):
    row = json.dumps({"question": "How many?", "answer": "#### 3"}) + "\n"
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text(row * 7473)
    (tmp_path / "gsm8k" / "test.jsonl").write_text(row * cut)
    config = resolve(
        {"train_on": "gsm8k", "evaluate_on": ["gsm8k"], "data_root": tmp_path, "eval_items": 5, "scale": scale}
    )
    if scale == "small" or cut == 1319:
        assert len(read_problems(config).score["gsm8k"]) == 5
    else:
        with pytest.raises(
            ConfigError, match=r"test\.jsonl holds 1,000 records; the test split of openai/gsm8k has 1,319"
        ):
            read_problems(config)


def test_a_task_that_may_not_be_scored_says_so_first(small, tmp_path, board, monkeypatch):
    def refuse():
        raise ConfigError("not allowed here")

    monkeypatch.setitem(TASKS, "word_problems", replace(TASKS["word_problems"], ready=refuse))
    with pytest.raises(ConfigError, match="not allowed here"):
        runs.execute(resolve(small), tmp_path / "run", board)


def test_where_a_run_is_done_does_not_make_it_another(do, tmp_path):
    first, _ = do("run")
    assert do("run", eval_batch_size=2, data_root=str(tmp_path))[0] == first
    with pytest.raises(ResultsError, match="belongs to a run with batch_size=4, not 2"):
        do("run", batch_size=2)


def test_a_run_says_how_far_it_is(do, tmp_path, monkeypatch):
    step = train.AdapterTrainer.training_step

    def interrupted(self, *arguments):
        if self.state.global_step == 4:
            assert state(tmp_path / "run")["state"] == "running"
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(train.AdapterTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        do("run")
    found = state(tmp_path / "run")
    assert (found["state"], found["step"], found["steps"]) == ("stopped", 4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "give steps or epochs, the other one null; got 60 and 1"),
        ({"steps": None}, "give steps or epochs"),
        ({"steps": None, "epochs": 1}, "word_problems has no end, so no epochs"),
        ({"train_on": "word_problem"}, "no task is called 'word_problem'. Did you mean 'word_problems'"),
        ({"evaluate_on": ["wordproblems"]}, "'wordproblems' is no task with a score. Did you mean 'word_problems'"),
        ({"micro_batch_size": 3}, "batch_size 16 is no multiple of micro_batch_size 3"),
        ({"protocol": "llm_adapters"}, "protocol: word_problems has clean, paper; got 'llm_adapters'"),
        (
            {"protocol": "llm_adapters", "train_on": "boolq", "evaluate_on": ["boolq", "gsm8k"]},
            "protocol: gsm8k has clean, paper; got 'llm_adapters'",
        ),
        ({"adapter_dtype": "bfloat16"}, "adapter_dtype must be float32 or the model's float32, got bfloat16"),
    ],
)
def test_keys_that_do_not_fit_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(changes)


@pytest.mark.parametrize(
    ("changes", "steps"), [({"steps": 5}, 5), ({"steps": None, "epochs": 2}, 5), ({"steps": None, "epochs": 1}, 3)]
)
def test_a_warm_up_as_long_as_the_training_is_refused(do, yes_or_no, changes, steps):
    """Known from the configuration, or once the epochs' examples are counted."""
    even = {"train_on": "even", "evaluate_on": ["even"], **changes}
    with pytest.raises(ConfigError, match=f"warmup_steps {steps} must be below the {steps} steps of the run"):
        do("long", warmup_steps=steps, **even)
    assert do("share", warmup_steps=0.5, **even)[0]["steps"] == steps
    assert do("one-less", warmup_steps=steps - 1, **even)[0]["steps"] == steps


def test_what_is_not_trained_has_no_warm_up():
    assert resolve({"method": "none", "steps": 1}).warmup_steps == 5


def test_several_gpus_in_one_process_are_refused(do, monkeypatch):
    """Trainer would give each of them a batch."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="one process sees 2 GPUs and a run takes one: set CUDA_VISIBLE_DEVICES=0"):
        do("two")


@pytest.mark.parametrize("method", ["adalora", "corda", "eva", "lora-fa", "miss", "random-entries", "s2ft-rows"])
def test_any_method_goes_on_where_it_was_stopped(do, tmp_path, monkeypatch, method):
    """What is not a trainable parameter (allocations, starts, places) comes back too."""
    more = {"method": method, "steps": 7}
    _, whole = do("whole", **more)
    step = train.AdapterTrainer.training_step

    def interrupted(self, *arguments):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train.AdapterTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            do("parts", **more)
    _, parts = do("parts", **more)
    first, second = trained(whole), trained(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    scores = [json.loads((folder / "metrics.json").read_text())["scores"] for folder in (whole, parts)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("how", ["rtn", "magr-optq"])
def test_a_quantised_base_is_the_same_for_every_method_and_seed(do, how, tmp_path, monkeypatch):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "cache"))
    quantise = {"method": how, "bits": 4, "group_size": 12, "items": 4, "length": 32}
    tables = []
    for name, method, seed in (("a", "diablo", 0), ("b", "lora", 1)):
        metrics, folder = do(name, method=method, seed=seed, quantise=quantise)
        tables.append(pd.read_csv(folder / "quantised.csv"))
        assert metrics["steps"] == 5
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == 14  # seven matrices in each of two layers; not the output
    assert (tables[0]["output_error"].dropna() < 0.3).all()


def test_a_method_that_changes_the_base_refuses_nothing_but_what_cannot_be(do):
    with pytest.raises(ConfigError, match=r"dropout=0\.1 does not go with method full"):
        do("dropout", method="full", dropout=0.1)
    with pytest.raises(ConfigError, match="rank=4 does not go with method diablo: num_blocks gives its size"):
        do("rank", rank=4)
    with pytest.raises(ConfigError, match=r"bits.*got 3 and None|torchao-int4 needs bits=4"):
        do("bits", quantise={"method": "torchao-int4", "bits": 3})


def test_a_base_that_takes_long_is_made_once_and_again_only_for_another(small, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(bases, "quantise", lambda *arguments: calls.append(1) or quantise(*arguments))

    def made(seed=0, **how):
        config = resolve(small, {"model": str(tiny_model), "seed": seed})
        way = QuantiseConfig(**{"method": "optq", "bits": 3, "items": 4, "length": 32} | how)
        loaded = load_model(str(tiny_model), "cpu")
        report = bases.quantised_base(loaded.model, loaded.tokenizer, config, way, lambda finished: None)
        return loaded.model.state_dict(), report

    weights, report = made()
    again, same_report = made(seed=1)
    assert len(calls) == 1
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    pd.testing.assert_frame_equal(report, same_report)
    fresh = load_model(str(tiny_model), "cpu").model.state_dict()
    assert not torch.equal(fresh["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"])
    made(bits=4)
    assert len(calls) == 2
    next(tmp_path.glob("quantised/*/made_by.json")).unlink()  # stopped half-way: made again
    made()
    made(bits=4)
    assert len(calls) == 3
