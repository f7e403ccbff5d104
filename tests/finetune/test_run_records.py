"""What a run remembers: its inputs, its attempts, and which files stand for the trained model."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from diablo_theory.errors import ConfigError, NonFiniteError, ResultsError
from diablo_theory.finetune import runs, train
from diablo_theory.finetune.config import load_run, resolve
from diablo_theory.methods import move_state


@pytest.fixture
def stopped(do, monkeypatch):
    """A run that was interrupted at its fourth step."""
    step = train.AdapterTrainer.training_step

    def interrupted(self, *arguments):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    def stop(**changes):
        with monkeypatch.context() as patch:
            patch.setattr(train.AdapterTrainer, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                do(**changes)

    return stop


@pytest.fixture
def gsm8k(tmp_path):
    def write(answer):
        folder = tmp_path / "data" / "gsm8k"
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in (("train", 40), ("test", 8)):
            rows = [{"question": f"{split} {i}?", "answer": f"It is {answer}.\n#### {answer}"} for i in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"train_on": "gsm8k", "evaluate_on": ["gsm8k"], "data_root": str(folder.parent), "max_length": 64}

    return write


def test_a_run_does_not_go_on_with_other_data(do, stopped, gsm8k):
    stopped(**gsm8k(1))
    with pytest.raises(ResultsError, match=r"begun with other contents of (train|gsm8k): SHA-256 \w+, now \w+"):
        do(**gsm8k(2))
    assert do(**gsm8k(1))[0]["steps"] == 5


def test_a_run_does_not_go_on_with_another_base(do, stopped, tiny_model, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    stopped(model=str(copy))
    weights = load_file(copy / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResultsError, match="begun with other contents of the base's weights"):
        do(model=str(copy))


def test_later_scores_are_of_the_same_base_and_say_where_they_were_made(do, board, tiny_model, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    metrics, folder = do(model=str(copy))
    assert "scored_later" not in metrics
    later = runs.add_scores(folder, ["docstrings"], board)["scored_later"]
    assert list(later) == ["docstrings"]
    assert later["docstrings"]["processes"] == 1
    weights = load_file(copy / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResultsError, match="other contents of the base's weights"):
        runs.add_scores(folder, ["docstrings"], board)


def test_data_that_have_moved_are_named_and_have_to_be_the_same(do, board, gsm8k, tmp_path):
    metrics, folder = do(**gsm8k(1))
    written = (folder / "config.json").read_bytes()
    (folder / "predictions" / "gsm8k.csv").unlink()
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"data_root: .*data is not a folder"):
        runs.add_scores(folder, [], board)
    there = {"data_root": str(tmp_path / "moved"), "eval_batch_size": 3}
    again = runs.add_scores(folder, [], board, elsewhere=there)
    assert (again["scores"], again["data"]) == (metrics["scores"], metrics["data"])
    later = runs.add_scores(folder, ["gsm8k_math10k"], board, elsewhere=there)["scored_later"]["gsm8k_math10k"]
    assert there.items() <= later.items()
    assert (folder / "config.json").read_bytes() == written  # how it was trained and scored at first
    gsm8k(2)
    with pytest.raises(ResultsError, match="begun with other contents of gsm8k: SHA-256"):
        runs.add_scores(folder, [], board, elsewhere={"data_root": tmp_path / "data"})


@pytest.mark.parametrize(
    "changes",
    [{"method": "corda"}, {"quantise": {"method": "optq", "bits": 4, "items": 2, "length": 32}}],
    ids=["start", "quantised"],
)
def test_what_looks_at_training_data_looks_at_the_same_again(do, board, gsm8k, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("DIABLO_THEORY_CACHE", str(tmp_path / "cache"))
    _, folder = do(**gsm8k(1), **changes)
    assert runs.add_scores(folder, ["word_problems"], board)["scores"].keys() == {"gsm8k", "word_problems"}
    gsm8k(2)
    with pytest.raises(ResultsError, match="begun with other contents of train: SHA-256"):
        runs.add_scores(folder, ["docstrings"], board)


@pytest.mark.parametrize(
    ("key", "more"),
    [("seed", ""), ("quantise.bits", ""), ("data_rot", " Did you mean 'data_root'")],
    ids=["another-run", "part", "misspelt"],
)
def test_what_a_trained_run_is_cannot_be_changed(do, board, key, more):
    _, folder = do(steps=1, warmup_steps=0, eval_items=1)
    with pytest.raises(
        ConfigError,
        match=f"{key} cannot be changed of a run that has been trained; only data_root, device, eval_batch_size can, "
        f"which say where it is done.{more}",
    ):
        runs.add_scores(folder, [], board, elsewhere={key: 1})
    with pytest.raises(ConfigError, match="eval_batch_size"):
        runs.add_scores(folder, [], board, elsewhere={"eval_batch_size": 0})


def test_every_attempt_is_recorded_and_a_changed_checkout_is_not_forgotten(do, stopped, monkeypatch):
    made = runs.provenance
    monkeypatch.setattr(runs, "provenance", lambda device: made(device) | {"commit": "one", "dirty": True})
    stopped()
    monkeypatch.setattr(runs, "provenance", lambda device: made(device) | {"commit": "two", "dirty": False})
    metrics, folder = do()
    found = metrics["provenance"]
    assert (found["commit"], found["commits"], found["dirty"]) == ("two", ["one", "two"], True)
    assert (found["attempts"], found["processes"]) == (2, 1)
    assert [a["commit"] for a in json.loads((folder / "environment.json").read_text())["attempts"]] == ["one", "two"]


def test_examples_that_were_cut_are_counted(do):
    assert do("whole")[0]["cut_examples"] == 0
    assert do("cut", max_length=60)[0]["cut_examples"] == 20


@pytest.mark.parametrize(
    "changes",
    [{"quantise": {"method": "rtn", "bits": 4, "group_size": 12}}, {"method": "lora-ga"}, {"method": "corda"}],
    ids=["quantised", "lora-ga", "corda"],
)
def test_no_adapter_is_left_that_would_load_as_something_else(do, changes):
    _, folder = do(**changes)
    assert not (folder / "adapter").exists()
    assert (folder / train.WEIGHTS).is_file()


@pytest.mark.parametrize("method", ["pissa", "olora", "lora-ga", "corda", "full", "galore"])
def test_what_changes_the_base_is_no_method_for_a_quantised_one(method):
    with pytest.raises(ConfigError, match=f"method {method} changes the base's weights, which then are not of 2 bits"):
        resolve({"method": method, "quantise": {"method": "rtn", "bits": 2}})


@pytest.mark.parametrize("change", ["scale=full", "suite=arithmetic"])
def test_what_rows_stand_for_is_not_a_user_s_to_say(change):
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key} cannot be set here: the run file decides it"):
        load_run(Path("experiments/blocks/diablo.yaml"), [change])


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ([], "full"),
        (["seed=1", "learning_rate=1e-4", "data_root=/data", "micro_batch_size=2"], "full"),
        (["epochs=3"], "full"),
        (["epochs=5"], "full"),
        (["max_length=128"], "small"),
        (["epochs=1"], "small"),
        (["eval_items=20"], "small"),
        (["steps=10", "epochs=null", "warmup_steps=2"], "small"),
    ],
)
def test_a_full_run_that_does_less_is_a_small_one(changes, scale):
    assert load_run(Path("experiments/blocks/diablo.yaml"), changes).scale == scale


@pytest.mark.parametrize(
    ("model", "scale"),
    [
        ("meta-llama/Llama-2-7b-hf", "full"),
        ("/models/llama-2-7b-hf/", "full"),
        ("somebody/Llama-2-7b-hf", "full"),
        ("SmolLM2-135M-Instruct", "small"),
        ("meta-llama/Llama-2-13b-hf", "small"),
        ("/models/Llama-2-7b-hf/snapshots/0a1b", "small"),
    ],
)
def test_a_full_run_of_another_model_is_a_small_one(model, scale):
    assert load_run(Path("experiments/commonsense/llama2-7b_diablo-n64.yaml"), [f"model={model}"]).scale == scale


@pytest.mark.parametrize(
    ("file", "scale"), [("efficiency/diablo.yaml", "small"), ("commonsense/llama2-7b_diablo-n64.yaml", "full")]
)
def test_smaller_batches_are_less_where_the_steps_are_fixed(file, scale):
    assert load_run(Path("experiments") / file, ["batch_size=8"]).scale == scale
    assert load_run(Path("experiments") / file, ["batch_size=32"]).scale == "full"


class Scaler(torch.amp.GradScaler):
    """As a GPU would have it in float16."""

    def __init__(self, scale):
        super().__init__("cpu", init_scale=scale, growth_interval=10_000)


@pytest.fixture
def scaled(monkeypatch):
    def use(scale):
        made = train.AdapterTrainer.__init__

        def with_scaler(self, *arguments, **options):
            made(self, *arguments, **options)
            self.accelerator.scaler = Scaler(scale)
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"

        monkeypatch.setattr(train.AdapterTrainer, "__init__", with_scaler)

    return use


def test_gradient_norms_are_those_of_the_loss_not_of_its_scaled_self(do, scaled):
    _, plain = do("plain")
    scaled(1024.0)
    _, other = do("scaled")
    logs = [pd.read_csv(folder / "log.csv") for folder in (plain, other)]
    # Products in float16 come with the scaler; a norm that still holds the scale is off by a thousand.
    for column in (name for name in logs[0] if name.startswith(("loss", "grad_norm"))):
        assert logs[0][column].to_numpy() == pytest.approx(logs[1][column].to_numpy(), rel=0.02), column


def test_a_scale_that_overflows_is_made_smaller_and_training_goes_on(do, scaled):
    scaled(2.0**127)
    metrics, folder = do()
    log = pd.read_csv(folder / "log.csv")
    assert metrics["steps"] == 5
    assert not math.isfinite(log["grad_norm/D"].iloc[0])


def test_a_loss_that_is_not_finite_stops_under_a_scaler_too(do, scaled, monkeypatch):
    scaled(1024.0)
    loss = train.AdapterTrainer.compute_loss
    monkeypatch.setattr(train.AdapterTrainer, "compute_loss", lambda self, *a, **k: loss(self, *a, **k) * float("inf"))
    with pytest.raises(NonFiniteError, match="at step 1"):
        do()


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["no-scaler", "scaler"])
@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_a_loss_that_is_not_finite_in_any_micro_batch_stops(do, scaled, monkeypatch, scale, micro_batch):
    if scale is not None:
        scaled(scale)
    loss, calls = train.AdapterTrainer.compute_loss, []

    def poisoned(self, *arguments, **options):
        calls.append(1)
        found = loss(self, *arguments, **options)
        return found * float("nan") if len(calls) == 3 * 4 + micro_batch + 1 else found

    monkeypatch.setattr(train.AdapterTrainer, "compute_loss", poisoned)
    with pytest.raises(
        NonFiniteError, match=r"loss nan .* at step 4 \(training examples 12, 13, 14, 15\).*checkpoint-2"
    ):
        do(micro_batch_size=1)


def test_steps_that_a_scaler_leaves_out_are_no_divergence_with_micro_batches_either(do, scaled):
    scaled(2.0**127)
    metrics, folder = do(micro_batch_size=1)
    log = pd.read_csv(folder / "log.csv")
    assert metrics["steps"] == 5
    assert not math.isfinite(log["grad_norm/D"].iloc[0])
    assert log["loss"].map(math.isfinite).all()


def test_optimizer_state_comes_to_the_parameters_whatever_its_keys():
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    projector = type("Projector", (), {"ortho_matrix": torch.zeros(2)})()
    optimizer.state["layer"] = {"step": 3, "exp_avg_B": torch.zeros(2)}
    optimizer.state[parameter] = {"step": torch.zeros(()), "projector": projector}
    move_state(optimizer)
    assert optimizer.state["layer"]["exp_avg_B"].device.type == "meta"
    assert optimizer.state[parameter]["projector"].ortho_matrix.device.type == "meta"
    assert optimizer.state[parameter]["step"].device.type == "cpu"  # torch keeps it there
